"""The public functions: hidden states in, loss or log-probs out, differentiable, with no
full-vocabulary logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdpop import checks, engines, losses, ops
from fastdpop.engines.base import Wanted, default_workspace
from fastdpop.head import Head
from fastdpop.losses.base import PairLogps, PreferenceLoss
from fastdpop.output import PreferenceOutput
from fastdpop.pairing import Totals, pair_logps
from fastdpop.rows import Rows

Pairs = Tensor | Sequence[Sequence[int]]
RefLogps = Tensor | Sequence[Tensor]

LOGGED = ("entropy", "mean_logits", "token_accuracy")
"""Statistics that a caller may ask for."""


def fused_dpop_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ref_logps: RefLogps | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.3,
    lam: float = 50.0,
    form: str = "inside",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    pairs: Pairs | None = None,
    shift_labels: bool = True,
    reduction: str = "mean",
    engine: str = "auto",
    workspace_bytes: int | None = None,
    statistics: Sequence[str] = (),
    check_finite: bool = False,
) -> PreferenceOutput:
    """DPO-Positive, Eq. 3 of Smaug (arXiv:2402.13228), from hidden states to loss and gradients.

    ``L = -log sigmoid(beta * (r_w - r_l - lam * max(0, -r_w)))`` with ``r = log pi(y|x) - log
    ref(y|x)``, w chosen and l rejected. Where the policy equals the reference the hinge is off
    (slope 0), so the first step is DPO's.

    Args:
        beta: inverse temperature of the Bradley-Terry model; the paper uses 0.3.
        lam: weight of the penalty; the paper uses 50 and reports little difference over [5, 500].
        form: where lambda stands: ``"inside"`` (Eq. 3), ``"outside"``: ``-log sigmoid(beta * (r_w -
            r_l) - lam * p)``, the same with ``lam_outside = beta * lam_inside``; or ``"additive"``:
            ``-log sigmoid(beta * (r_w - r_l)) + lam * p``.
        label_smoothing: probability in [0, 0.5) that a preference is flipped (cDPO).

    Everything else is as in :func:`fused_preference_loss`.
    """
    loss = losses.get("dpop", beta=beta, lam=lam, form=form, label_smoothing=label_smoothing)
    return fused_preference_loss(
        hidden,
        weight,
        labels,
        loss=loss,
        ref_logps=ref_logps,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        bias=bias,
        cu_seqlens=cu_seqlens,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        pairs=pairs,
        shift_labels=shift_labels,
        reduction=reduction,
        engine=engine,
        workspace_bytes=workspace_bytes,
        statistics=statistics,
        check_finite=check_finite,
    )


def fused_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss: str | PreferenceLoss | Callable[[PairLogps], Tensor] = "dpop",
    ref_logps: RefLogps | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    pairs: Pairs | None = None,
    shift_labels: bool = True,
    reduction: str = "mean",
    engine: str = "auto",
    workspace_bytes: int | None = None,
    statistics: Sequence[str] = (),
    check_finite: bool = False,
) -> PreferenceOutput:
    """Any preference loss, from hidden states to loss and gradients.

    Args:
        hidden: last hidden states, after the final norm: ``(S, T, H)``, or packed ``(positions,
            H)`` with `cu_seqlens`. Without `pairs`, S = 2B and the B chosen sequences come first.
            float64, float32, bfloat16 or float16.
        weight: ``(V, H)`` lm_head weight, in the dtype of `hidden` (under autocast, any).
        labels: ``(S, T)`` or ``(positions,)`` int64, aligned with the input ids as in Hugging Face;
            -100 is not scored.
        loss: a name (:func:`fastdpop.losses.available`), a loss (:func:`fastdpop.losses.get`), or a
            function of :class:`~fastdpop.losses.PairLogps` (see :func:`fastdpop.losses.pairwise`).
        ref_logps: the reference's summed log-probs: ``(chosen, rejected)``, each ``(P,)``, or one
            ``(S,)`` tensor. For a loss with LD-DPO's token weights they must be weighted alike
            (`ld_alpha` of :func:`fused_logps`).
        ref_hidden: the reference's hidden states instead, shaped as `hidden` up to H; scored in
            this call, without gradients.
        ref_weight, ref_bias: the reference's head; the policy's, without gradients, when
            `ref_weight` is None.
        kl: 0-d estimate of KTO's reference point z_0 in nats; an error for losses that do not read
            it.
        bias: ``(V,)`` lm_head bias.
        cu_seqlens: ``(S + 1,)`` bounds of the packed sequences, from 0 to the number of positions.
            Labels never cross them.
        softcap, logit_scale, temperature: see :class:`fastdpop.head.Head`.
        pairs: ``(P, 2)`` indices of chosen and rejected sequence; by default the first half against
            the second. A sequence may serve several pairs and is scored once; one that no pair uses
            is not scored. -1 stands for a side that does not exist, for losses that take unpaired
            data (KTO).
        shift_labels: the hidden state at t predicts the label at t + 1. False: labels are already
            shifted.
        reduction: ``"mean"`` or ``"sum"`` over pairs, or ``"none"``: a ``(P,)`` loss, which costs a
            trained head 8 units, not 6.
        engine: ``"auto"`` or a name in :func:`fastdpop.engines.available`.
        workspace_bytes: bound on scratch memory, gradients and the copied rows ``(N, H)`` excluded;
            512 MiB by default, on a GPU a sixteenth of its memory if that is more. A pair whose
            logits do not fit is computed in pieces, twice.
        statistics: any of ``"entropy"``, ``"mean_logits"``, ``"token_accuracy"``, computed in the
            same pass.
        check_finite: raise if the loss is not finite (waits for the device).

    Returns:
        :class:`PreferenceOutput`; `loss` is differentiable in hidden, weight and bias.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not as described; the message
            names it.
        TypeError: an argument is of the wrong type.
        FloatingPointError: `check_finite` is set and the loss is not finite.
    """
    function = losses.as_loss(loss)
    traits = function.traits
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.flag("shift_labels", shift_labels)
    checks.flag("check_finite", check_finite)
    checks.statistics(statistics, LOGGED)
    call = _Call.of(
        hidden,
        weight,
        labels,
        bias,
        cu_seqlens,
        Head(softcap, logit_scale, temperature),
        engine,
        workspace_bytes,
    )
    count = call.sequences
    sides = checks.pairs(pairs, count, traits.accepts_unpaired, hidden.device)
    checks.reference(ref_logps, ref_hidden, ref_weight, ref_bias, traits.needs_reference)
    if kl is not None:
        checks.kl(kl, traits.uses_kl, hidden.device)
        kl = kl.detach().to(call.result_dtype)

    rows = call.rows(labels, sides, shift_labels, ld_alpha=traits.ld_alpha)
    given = sides if sides is not None else _halves(count, hidden.device)
    reference = None
    if ref_hidden is not None:
        ref_call = call.for_reference(ref_hidden, ref_weight, ref_bias, hidden)
        with torch.no_grad():
            ref_sums = rows.sums(ref_call.row_logps(rows, ())[0])
        reference = _by_pair(ref_sums, rows.pairs)
    elif ref_logps is not None:
        by_pair = traits.ld_alpha is not None and sides is not None
        reference = checks.ref_logps(ref_logps, given, count, by_pair, hidden.device)

    names = tuple(dict.fromkeys((*statistics, *traits.statistics)))
    wanted = call.wanted
    coupled = traits.couples_pairs or (traits.couples_pairs_without_kl and kl is None)
    if (wanted.weight or wanted.bias) and not coupled and reduction != "none":
        total, sums, found = call.pair_loss(
            rows, reference, kl, function, reduction == "mean", names
        )
        total_losses = None
    else:
        row_logps, found = call.row_logps(rows, names)
        sums = rows.sums(row_logps)
        batch = _pairs(rows, sums, found, names, reference, kl)
        total_losses = function(batch)
        total = total_losses
        if reduction != "none":
            total = total_losses.mean() if reduction == "mean" else total_losses.sum()
    with torch.no_grad():
        batch = _pairs(rows, sums.detach(), found, names, reference, kl)
        values = function(batch) if total_losses is None else total_losses.detach()
        output = _output(total, values, batch, function, rows, found, names, statistics, count)
    if check_finite:
        checks.finite(
            output.loss,
            hidden=hidden,
            weight=weight,
            bias=bias,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=None if ref_logps is None else reference,
            kl=kl,
        )
    return output


def fused_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    shift_labels: bool = True,
    reduction: str = "sequence",
    token_weights: Tensor | None = None,
    ld_alpha: float | None = None,
    engine: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """Differentiable log-probabilities of the labels, for anything that has no loss here.

    Args:
        reduction: ``"sequence"``: weighted sums, ``(S,)``; ``"token"``: one value a label, shaped
            as `labels`, 0 where not scored.
        token_weights: weight of every label in its sequence's sum, shaped as `labels`; not
            differentiable.
        ld_alpha: LD-DPO's weight, in [0, 1], of the tokens past the length of the shorter of
            sequences i and i + S / 2.

    The others are as in :func:`fused_preference_loss`. Costs 2 units without gradients, 4 with a
    frozen head and 8 with a trained one, whose loss cannot be known here.

    Returns:
        float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: as in :func:`fused_preference_loss`.
    """
    checks.choice("reduction", reduction, ("sequence", "token"))
    checks.flag("shift_labels", shift_labels)
    call = _Call.of(
        hidden,
        weight,
        labels,
        bias,
        cu_seqlens,
        Head(softcap, logit_scale, temperature),
        engine,
        workspace_bytes,
    )
    checks.weighting(token_weights, ld_alpha, labels, call.sequences, reduction)
    rows = call.rows(labels, None, shift_labels, token_weights=token_weights, ld_alpha=ld_alpha)
    logps, _ = call.row_logps(rows, ())
    if reduction == "token":
        flat = logps.new_zeros(labels.numel())
        return flat.index_put((rows.index + int(shift_labels),), logps).reshape(labels.shape)
    sums = rows.sums(logps)
    return torch.zeros_like(sums).index_put((rows.inputs,), sums)


@dataclass(frozen=True)
class _Call:
    """One head and the hidden states that go through it, checked."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    cu_seqlens: Tensor | None
    sequences: int
    head: Head
    compute_dtype: torch.dtype
    wanted_engine: str
    engine: str
    workspace_bytes: int

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        head: Head,
        engine: str,
        workspace_bytes: int | None,
    ) -> _Call:
        sequences = checks.batch(hidden, labels, cu_seqlens)
        checks.projection(hidden, weight, bias)
        compute_dtype = checks.compute_dtype(hidden, weight, bias)
        return _Call(
            hidden=hidden.reshape(-1, hidden.shape[-1]),
            weight=weight,
            bias=bias,
            cu_seqlens=cu_seqlens,
            sequences=sequences,
            head=head,
            compute_dtype=compute_dtype,
            wanted_engine=engine,
            engine=engines.choose(engine, hidden.device, compute_dtype),
            workspace_bytes=checks.workspace(workspace_bytes, default_workspace(hidden.device)),
        )

    def for_reference(
        self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, policy_hidden: Tensor
    ) -> _Call:
        """The same rows through the reference's hidden states and head."""
        checks.like("ref_hidden", hidden, "hidden", policy_hidden)
        if weight is None:
            weight, bias = self.weight, self.bias
        checks.projection(hidden, weight, bias, prefix="ref_")
        checks.same_vocabulary(weight, self.weight)
        compute_dtype = checks.compute_dtype(hidden, weight, bias, prefix="ref_")
        return replace(
            self,
            hidden=hidden.reshape(-1, hidden.shape[-1]),
            weight=weight,
            bias=bias,
            compute_dtype=compute_dtype,
            engine=engines.choose(self.wanted_engine, hidden.device, compute_dtype),
        )

    @property
    def result_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def wanted(self) -> Wanted:
        """The gradients that autograd will ask for."""
        if not torch.is_grad_enabled():
            return Wanted(False, False, False)
        return Wanted(
            self.hidden.requires_grad,
            self.weight.requires_grad,
            self.bias is not None and self.bias.requires_grad,
        )

    def rows(
        self,
        labels: Tensor,
        pairs: Tensor | None,
        shift: bool,
        *,
        token_weights: Tensor | None = None,
        ld_alpha: float | None = None,
    ) -> Rows:
        tensors = ops.lay_out(
            labels, self.weight.shape[0], self.cu_seqlens, pairs, shift, token_weights, ld_alpha
        )
        return ops.rows_from(
            tensors,
            members=ld_alpha is not None,
            weights=token_weights is not None or ld_alpha is not None,
        )

    def _options(self) -> tuple[list[float], torch.dtype, int, str]:
        return ops.head_numbers(self.head), self.compute_dtype, self.workspace_bytes, self.engine

    def row_logps(self, rows: Rows, statistics: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Log-probs ``(N,)``, differentiable, and statistics ``(K, N)``."""
        wanted = self.wanted
        logps, _, found, _ = ops.row_logps(
            self.hidden.index_select(0, rows.index),
            self.weight,
            self.bias,
            rows.targets,
            rows.groups[0],
            *self._options(),
            ",".join(statistics),
            wanted.hidden and not (wanted.weight or wanted.bias),
        )
        return logps, found.detach()

    def pair_loss(
        self,
        rows: Rows,
        reference: Tensor | None,
        kl: Tensor | None,
        loss: PreferenceLoss,
        mean: bool,
        statistics: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, differentiable; sequence log-probs ``(S,)`` and statistics ``(K, N)``, detached."""
        total, sums, found, *_ = ops.pair_loss(
            self.hidden.index_select(0, rows.index),
            self.weight,
            self.bias,
            ops.rows_to(rows),
            reference,
            kl,
            losses.key_of(loss),
            mean,
            list(self.wanted),
            *self._options(),
            ",".join(statistics),
        )
        return total, sums.detach(), found.detach()


def _halves(sequences: int, device: torch.device) -> Tensor:
    half = torch.arange(sequences // 2, device=device)
    return torch.stack([half, half + sequences // 2], dim=1)


def _by_pair(sequence_values: Tensor, pairs: Tensor) -> Tensor:
    """``(S,)`` values as ``(2, P)``, arbitrary where a side is absent."""
    return sequence_values[pairs.clamp_min(0)].T.contiguous()


def _pairs(
    rows: Rows,
    sums: Tensor,
    found: Tensor,
    names: tuple[str, ...],
    reference: Tensor | None,
    kl: Tensor | None,
) -> PairLogps:
    aligned = None
    if "aligned_logps" in names:
        aligned = rows.unweighted().sums(found[names.index("aligned_logps")])
    return pair_logps(
        rows, sums, Totals.of(rows, sums.dtype), reference=reference, aligned=aligned, kl=kl
    )


def _output(
    total: Tensor,
    values: Tensor,
    pairs: PairLogps,
    loss: PreferenceLoss,
    rows: Rows,
    found: Tensor,
    names: tuple[str, ...],
    statistics: Sequence[str],
    sequences: int,
) -> PreferenceOutput:
    chosen_rewards, rejected_rewards = loss.rewards(pairs)
    chosen_rewards = chosen_rewards * pairs.chosen_present
    rejected_rewards = rejected_rewards * pairs.rejected_present
    both = pairs.chosen_present & pairs.rejected_present
    margins = chosen_rewards - rejected_rewards
    plain = rows.unweighted()
    lengths = rows.lengths.new_zeros(sequences).index_put((rows.inputs,), rows.lengths)
    means: dict[str, Any] = {}
    for name in statistics:
        mean = plain.sums(found[names.index(name)]) / rows.lengths.clamp_min(1)
        means[name] = mean.new_zeros(sequences).index_put((rows.inputs,), mean.to(values.dtype))
    return PreferenceOutput(
        loss=total,
        losses=values,
        chosen_logps=pairs.chosen,
        rejected_logps=pairs.rejected,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        margins=margins,
        accuracy=((margins > 0) & both).sum() / both.sum().clamp_min(1).to(margins.dtype),
        penalty=None if pairs.ref_chosen is None else (pairs.ref_chosen - pairs.chosen).relu(),
        lengths=lengths,
        **means,
    )
