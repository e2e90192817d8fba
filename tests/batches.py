"""Random batches, the float64 definition of a preference loss through real logits, and how exact a
result must be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpop import PreferenceOutput, fused_preference_loss, losses, naive
from fastdpop.losses import (
    PairLogps,
    PreferenceLoss,
    length_desensitised,
    pairwise,
    wpo_weighted,
)
from fastdpop.transform import LogitTransform

HEADS = {
    "plain": LogitTransform(),
    "softcap": LogitTransform(softcap=3.0),
    "scaled": LogitTransform(logit_scale=0.25),
    "temperature": LogitTransform(temperature=1.7),
    "all": LogitTransform(softcap=2.0, logit_scale=1.5, temperature=0.7),
}

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def margin(pairs: PairLogps) -> Tensor:
    """A user's loss of one pair, with a reference."""
    return F.softplus(-0.2 * (pairs.chosen - pairs.rejected) / pairs.chosen_lengths.clamp(min=1))


LOSSES: dict[str, PreferenceLoss] = {
    **{name: losses.get(name) for name in losses.available()},
    # The default tau, 0.05, multiplies the last bits of log-probs, ours and PyTorch's, by 20.
    "discopop": losses.get("discopop", tau=0.5),
    "dpop outside": losses.get("dpop", form="outside", lam=15.0),
    "dpop additive": losses.get("dpop", form="additive", lam=3.0, label_smoothing=0.1),
    "cdpo": losses.get("dpo", label_smoothing=0.2),
    "dpo forward_kl": losses.get("dpo", divergence="forward_kl"),
    "dpo js": losses.get("dpo", divergence="js"),
    "dpo alpha": losses.get("dpo", divergence="alpha", alpha=0.3),
    "ipo sums": losses.get("ipo", average=False),
    "bco shifted": losses.get("bco_pair", batch_shift=True),
    "aft detached": losses.get("aft", detach_rejected=True),
    "wpo": wpo_weighted(losses.get("dpo")),
    "wpo ipo": wpo_weighted(losses.get("ipo")),
    "ld": length_desensitised(losses.get("dpo"), 0.3),
    "ld dpop": length_desensitised(losses.get("dpop"), 0.0),
    "ld wpo aot": length_desensitised(wpo_weighted(losses.get("aot")), 0.5),
    "sum": losses.get("dpop") + 0.3 * losses.get("sft"),
    "sum with aot": 0.5 * losses.get("aot") + 2.0 * losses.get("simpo"),
    "pairwise": pairwise(margin, beta=0.2),
}
"""Every loss, and what can be made of them."""

Loss = str | PreferenceLoss | Callable[[PairLogps], Tensor]


@dataclass
class Batch:
    """2B sequences of T positions, chosen first, with ragged prompts and padding."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ref_logps: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        """The differentiable inputs."""
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def trained(self) -> list[Tensor]:
        """The inputs that require gradients."""
        return [t for t in self.inputs if t.requires_grad]

    def to(self, dtype: torch.dtype) -> Batch:
        """The same numbers in another dtype, as new leaves."""

        def leaf(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

        hidden, weight = leaf(self.hidden), leaf(self.weight)
        assert hidden is not None
        assert weight is not None
        return Batch(hidden, weight, leaf(self.bias), self.labels, self.ref_logps)


def batch(
    pairs: int = 3,
    length: int = 9,
    width: int = 16,
    vocabulary: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    trained: bool = True,
    scale: float = 1.0,
) -> Batch:
    """A random batch; sequence 1 has an empty completion where there is more than one pair."""
    labels = torch.randint(0, vocabulary, (2 * pairs, length))
    for line in labels:
        prompt = int(torch.randint(0, max(length // 2, 1), ()))
        end = int(torch.randint(min(prompt + 1, length), length + 1, ()))
        line[:prompt] = -100
        line[end:] = -100
    if pairs > 1:
        labels[1] = -100
    hidden = (torch.randn(2 * pairs, length, width) * scale).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) * 0.3).to(dtype).requires_grad_(trained)
    offset = torch.randn(vocabulary).to(dtype).requires_grad_(trained) if bias else None
    example = Batch(hidden, weight, offset, labels, torch.zeros(2 * pairs))
    logps = token_logps(example).sum(1).detach()
    example.ref_logps = (
        (logps + torch.randn(2 * pairs))
        .clamp(max=0.0)
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
    )
    return example


def logits(example: Batch, head: LogitTransform | None = None) -> Tensor:
    """``(S, T, V)`` logits as PyTorch computes them, in the dtype of the inputs."""
    head = head or LogitTransform()
    z = F.linear(example.hidden, example.weight, example.bias) * head.logit_scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def token_logps(
    example: Batch, head: LogitTransform | None = None, *, shift: bool = True, plain: bool = False
) -> Tensor:
    """The log-prob of every label, 0 where it is not scored, shaped as the labels: in float64 by
    the definition, or `plain`: as PyTorch computes it in the dtype of the inputs.
    """
    if plain:
        labels = _aligned(example.labels, shift)
        logps = torch.log_softmax(logits(example, head), -1)
        logps = logps.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels != -100)
    else:
        labels = _aligned(example.labels, shift)
        logps = naive.token_logps(example.hidden, example.weight, labels, example.bias, head)
    return F.pad(logps[:, :-1], (1, 0)) if shift else logps


def _aligned(labels: Tensor, shift: bool) -> Tensor:
    """The labels that the hidden states at their own positions predict."""
    return F.pad(labels[:, 1:], (0, 1), value=-100) if shift else labels


def aligned_logps(
    example: Batch, head: LogitTransform | None = None, *, shift: bool = True
) -> Tensor:
    """``logp - log sum_v p_v**2`` of every scored label, shaped as the labels; float64, no
    gradient.
    """
    with torch.no_grad():
        wide = example.to(torch.float64)
        collision = (2 * torch.log_softmax(logits(wide, head), -1)).logsumexp(-1)
        collision = collision * (_aligned(example.labels, shift) != -100)
        collision = F.pad(collision[:, :-1], (1, 0)) if shift else collision
        return token_logps(wide, head, shift=shift) - collision


def sides_of(sequences: int, pairs: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """Chosen and rejected sequence of every pair."""
    if pairs is not None:
        return [list(pair) for pair in pairs]
    return [[i, i + sequences // 2] for i in range(sequences // 2)]


def losses_by_definition(
    example: Batch,
    loss: Loss,
    head: LogitTransform | None = None,
    *,
    pairs: Sequence[Sequence[int]] | None = None,
    kl: Tensor | None = None,
    shift: bool = True,
    plain: bool = False,
) -> Tensor:
    """``(P,)`` losses through real logits, differentiable, gathered pair by pair and token by
    token.
    """
    function = losses.as_loss(loss)
    scored = example.labels != -100
    if shift:
        scored[:, 0] = False
    logps = token_logps(example, head, shift=shift, plain=plain)
    aligned = None
    if "aligned_logps" in function.traits.statistics:
        aligned = aligned_logps(example, head, shift=shift).to(logps.dtype)
    sides = sides_of(len(scored), pairs)
    zero = 0.0 * logps.sum()

    def gather(values: Tensor, side: int) -> Tensor:
        sums = []
        for pair in sides:
            if pair[side] < 0:
                sums.append(zero)
                continue
            own = values[pair[side]][scored[pair[side]]]
            near = min(int(scored[s].sum()) for s in pair if s >= 0)
            alpha = function.traits.ld_alpha
            tail = own[near:].sum() * (1.0 if alpha is None else alpha)
            sums.append(own[:near].sum() + tail)
        return torch.stack(sums)

    def lengths(side: int) -> Tensor:
        return torch.stack([zero + scored[p[side]].sum() if p[side] >= 0 else zero for p in sides])

    def ref(side: int) -> Tensor | None:
        if not function.traits.needs_reference:
            return None
        return torch.stack(
            [example.ref_logps[p[side]].to(zero) if p[side] >= 0 else zero for p in sides]
        )

    present = [torch.tensor([pair[side] >= 0 for pair in sides]) for side in (0, 1)]
    plain_aligned = [None, None]
    if aligned is not None:
        plain_aligned = [
            torch.stack([aligned[p[side]].sum() if p[side] >= 0 else zero for p in sides])
            for side in (0, 1)
        ]
    return function(
        PairLogps(
            chosen=gather(logps, 0),
            rejected=gather(logps, 1),
            chosen_lengths=lengths(0),
            rejected_lengths=lengths(1),
            ref_chosen=ref(0),
            ref_rejected=ref(1),
            chosen_aligned_logps=plain_aligned[0],
            rejected_aligned_logps=plain_aligned[1],
            chosen_present=present[0],
            rejected_present=present[1],
            kl=None if kl is None else kl.to(logps.dtype),
            batch_pairs=zero + len(sides),
            batch_sides=zero + present[0].sum() + present[1].sum(),
            batch_chosen_tokens=lengths(0).sum(),
            values={n: value.to(logps.dtype) for n, value in needed_values(len(sides)).items()},
        )
    )


def needed_values(count: int) -> dict[str, Tensor]:
    """What some losses cannot do without, for so many pairs: each pair is a list of its own, and rewards
    differ from pair to pair.
    """
    number = torch.arange(count, dtype=torch.float64)
    return {"list": number, "chosen_score": number.cos(), "rejected_score": -number.sin()}


def fused(
    example: Batch, loss: Loss, head: LogitTransform | None = None, **options: object
) -> PreferenceOutput:
    """The function under test on a batch, with the reference only where the loss reads it, and what it
    needs of each pair.
    """
    head = head or LogitTransform()
    function = losses.as_loss(loss)
    if function.traits.needs_reference and "ref_hidden" not in options:
        options.setdefault("ref_logps", example.ref_logps)
    if function.traits.needs:
        sides = sides_of(len(example.labels), options.get("pairs"))  # type: ignore[arg-type]
        made_up = needed_values(len(sides))
        needed = {n: value for n, value in made_up.items() if n in function.traits.needs}
        options.setdefault("pair_values", needed)
    return fused_preference_loss(
        example.hidden,
        example.weight,
        example.labels,
        loss=loss,
        bias=example.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=head.temperature,
        **options,  # type: ignore[arg-type]
    )


def assert_as_exact_as_torch(
    got: Tensor, exact: Tensor, torchs: Tensor, *, factor: float = 2.0, slack: float = 0.0
) -> None:
    """Our largest error is at most `factor` times PyTorch's, give or take a few last bits of the
    largest value, or a part `slack` of it.
    """
    assert got.isfinite().all()
    kind = torch.finfo(got.dtype)
    last_bits = (4 * kind.eps + slack) * float(exact.abs().max())
    last_bits += kind.eps * kind.smallest_normal  # the least that float16 can tell from 0
    error, torchs_error = (float((t.double() - exact).abs().max()) for t in (got, torchs))
    assert error <= factor * torchs_error + last_bits


def assert_by_definition(
    example: Batch,
    loss: Loss,
    head: LogitTransform | None = None,
    *,
    pairs: Sequence[Sequence[int]] | None = None,
    kl: Tensor | None = None,
    shift: bool = True,
    reduction: str = "mean",
    slack: float = 0.0,
    **options: object,
) -> PreferenceOutput:
    """Loss and gradients agree with the definition: for float64 inputs to 1e-11 of the largest
    value, else within four times the error that PyTorch makes in float32 on the same numbers.

    Four, because a loss multiplies the last bit of a few log-probs (DPOP by 15), and in so few
    numbers PyTorch is sometimes lucky.
    """
    if kl is not None:
        options["kl"] = kl
    out = fused(
        example, loss, head, pairs=pairs, shift_labels=shift, reduction=reduction, **options
    )

    def reduced(values: Tensor) -> tuple[Tensor, Tensor]:
        total = {"mean": values.mean, "sum": values.sum, "none": lambda: values}[reduction]()
        # Unequal weights tell the pairs of reduction="none" apart.
        return total, (total * torch.arange(1, total.numel() + 1).view_as(total)).sum()

    wide = example.to(torch.float64)
    options_of = {"pairs": pairs, "kl": kl, "shift": shift}
    exact, exact_sum = reduced(losses_by_definition(wide, loss, head, **options_of))
    got = reduced(out.loss)[1]
    gradients = torch.autograd.grad(got, example.trained, retain_graph=True)
    exact_gradients = torch.autograd.grad(exact_sum, wide.trained)
    if example.hidden.dtype == torch.float64:
        for ours, want in zip((out.loss, *gradients), (exact, *exact_gradients), strict=True):
            assert ours.dtype == torch.float64
            # Gradients that cancel leave the last bits of what cancelled.
            bound = 1e-11 * float(want.detach().abs().max()) + 1e-14
            torch.testing.assert_close(ours, want, rtol=0, atol=bound)
        return out
    single = example.to(torch.float32)
    torchs, torchs_sum = reduced(losses_by_definition(single, loss, head, plain=True, **options_of))
    torchs_gradients = torch.autograd.grad(torchs_sum, single.trained)
    assert out.loss.dtype == torch.float32
    assert_as_exact_as_torch(
        out.loss.detach(), exact.detach(), torchs.detach(), factor=4.0, slack=slack
    )
    for leaf, ours, want, theirs in zip(
        example.trained, gradients, exact_gradients, torchs_gradients, strict=True
    ):
        assert ours.dtype == leaf.dtype
        assert_as_exact_as_torch(ours, want, theirs, factor=4.0, slack=slack)
    return out
