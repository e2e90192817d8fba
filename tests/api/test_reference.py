"""Where the reference's log-probs come from, and a policy that equals its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastdpop import fused_dpop_loss, fused_logps, fused_preference_loss, losses
from fastdpop.given_logps import sound
from fastdpop.transform import LogitTransform
from tests.batches import DTYPES, HEADS, Batch, assert_by_definition, batch, fused, token_logps

SHAPES = {
    "small": (2, 7, 8, 19, 5_000),
    "ragged": (3, 13, 33, 129, 50_000),
    "realistic": (4, 60, 64, 1000, 400_000),
}
"""Pairs, positions, width, vocabulary, and a workspace that makes several tiles of them."""


def sums(example: Batch, head: LogitTransform | None = None) -> Tensor:
    return token_logps(example.to(torch.float64), head).sum(1).detach()


def test_a_pair_of_tensors_or_one() -> None:
    example = batch(3, dtype=torch.float64)
    want = fused(example, "dpop")
    chosen, rejected = example.ref_logps.chunk(2)
    for given in ((chosen, rejected), [chosen, rejected]):
        out = fused(example, "dpop", ref_logps=given)
        assert torch.equal(out.loss, want.loss)
        assert torch.equal(out.penalty, want.penalty)
    swapped = fused(example, "dpop", ref_logps=(rejected, chosen))
    assert not torch.equal(swapped.loss, want.loss)


def test_with_pairs_one_tensor_is_by_sequence_and_two_are_by_pair() -> None:
    example = batch(3, dtype=torch.float64)
    pairs = [[0, 3], [0, 4], [2, 5], [1, 3]]
    out = assert_by_definition(example, "dpop", pairs=pairs)
    by_pair = (example.ref_logps[[0, 0, 2, 1]], example.ref_logps[[3, 4, 5, 3]])
    assert torch.equal(fused(example, "dpop", pairs=pairs, ref_logps=by_pair).loss, out.loss)


def test_ref_logps_in_float64_beside_float32() -> None:
    example = batch(3)
    example.ref_logps = example.ref_logps.double()
    assert_by_definition(example, "dpop")


def test_no_gradient_reaches_the_reference() -> None:
    example = batch(3, bias=True)
    other = batch(3, bias=True)
    ref = example.ref_logps.clone().requires_grad_()
    out = fused(example, "dpop", ref_logps=ref)
    assert torch.autograd.grad(out.loss, ref, allow_unused=True) == (None,)
    options = {"ref_hidden": other.hidden, "ref_weight": other.weight, "ref_bias": other.bias}
    for name in ("dpop", "aot"):
        out = fused(example, name, **options)
        assert torch.autograd.grad(out.loss, other.inputs, allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("own", ["its head", "the policy's head", "another width", "no bias"])
def test_ref_hidden(own: str, head: str, trained: bool) -> None:
    """The reference is scored in the same call, through the same transform of the logits."""
    example = batch(3, dtype=torch.float64, bias=True, trained=trained)
    width = 5 if own == "another width" else 16
    ref_hidden = torch.randn(*example.labels.shape, width, dtype=torch.float64)
    ref_weight, ref_bias = torch.randn(37, width).double() * 0.3, torch.randn(37).double()
    options: dict[str, Tensor] = {"ref_hidden": ref_hidden}
    scored = Batch(ref_hidden, ref_weight, ref_bias, example.labels, example.ref_logps)
    if own == "the policy's head":
        scored.weight, scored.bias = example.weight, example.bias
    elif own == "no bias":
        scored.bias = None
        options["ref_weight"] = ref_weight
    else:
        options |= {"ref_weight": ref_weight, "ref_bias": ref_bias}
    example.ref_logps = sums(scored, HEADS[head])
    want = assert_by_definition(example, "dpop", HEADS[head])
    out = fused(example, "dpop", HEADS[head], **options)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-11, atol=0)
    for a, b in zip(
        torch.autograd.grad(out.loss, example.trained),
        torch.autograd.grad(fused(example, "dpop", HEADS[head]).loss, example.trained),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_ref_hidden_in_another_dtype_with_its_own_head() -> None:
    example, other = batch(3), batch(3, dtype=torch.bfloat16)
    other.labels = example.labels
    out = fused(example, "dpop", ref_hidden=other.hidden, ref_weight=other.weight)
    example.ref_logps = sums(other).float()
    torch.testing.assert_close(out.loss, fused(example, "dpop").loss, rtol=2e-5, atol=0)


def test_ref_hidden_serves_pairs_that_share_and_lack_sides() -> None:
    example, other = batch(3, dtype=torch.float64), batch(3, dtype=torch.float64)
    other.labels = example.labels
    pairs = [[0, 3], [0, 4], [-1, 3], [2, -1]]
    out = fused(example, "kto", pairs=pairs, ref_hidden=other.hidden, ref_weight=other.weight)
    example.ref_logps = sums(other)
    want = assert_by_definition(example, "kto", pairs=pairs)
    torch.testing.assert_close(out.losses, want.losses, rtol=1e-11, atol=0)
    torch.testing.assert_close(out.margins, want.margins, rtol=1e-11, atol=1e-12)


def test_ref_hidden_is_desensitised_like_the_policy() -> None:
    example, other = batch(3, dtype=torch.float64), batch(3, dtype=torch.float64)
    other.labels = example.labels
    pairs = [[0, 3], [0, 4], [2, 5]]
    loss = losses.length_desensitised(losses.get("dpop"), 0.25)
    tokens = token_logps(other).detach()
    scored = example.labels != -100
    scored[:, 0] = False
    ref: list[list[Tensor]] = [[], []]
    for pair in pairs:
        near = min(int(scored[s].sum()) for s in pair)
        for side, s in enumerate(pair):
            own = tokens[s][scored[s]]
            ref[side].append(own[:near].sum() + 0.25 * own[near:].sum())
    want = fused(example, loss, pairs=pairs, ref_logps=(torch.stack(ref[0]), torch.stack(ref[1])))
    out = fused(example, loss, pairs=pairs, ref_hidden=other.hidden, ref_weight=other.weight)
    torch.testing.assert_close(out.losses, want.losses, rtol=1e-11, atol=0)


def equal_policy(
    example: Batch, source: str, head: LogitTransform, workspace: int | None
) -> dict[str, Tensor]:
    """The reference of a policy that has not taken a step."""
    if source == "ref_hidden":
        return {"ref_hidden": example.hidden.detach().clone()}
    with torch.no_grad():
        ref_logps = fused_logps(
            example.hidden,
            example.weight,
            example.labels,
            bias=example.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            temperature=head.temperature,
            workspace_bytes=workspace,
        )
    return {"ref_logps": ref_logps}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("source", ["ref_logps", "ref_hidden"])
@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "whole"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step_of_dpop_is_dpos(
    shape: str, dtype: torch.dtype, tiled: bool, source: str, trained: bool
) -> None:
    """Where policy equals reference every log-ratio is exactly 0, and so the hinge is off."""
    pairs, length, width, vocabulary, tiles = SHAPES[shape]
    workspace = tiles if tiled else None
    head = HEADS["all"] if shape == "ragged" else LogitTransform()
    example = batch(
        pairs, length, width, vocabulary, dtype=dtype, bias=shape == "ragged", trained=trained
    )
    options = equal_policy(example, source, head, workspace)
    want = fused(example, losses.get("dpo", beta=0.3), head, workspace_bytes=workspace, **options)
    want_gradients = torch.autograd.grad(want.loss, example.trained)
    assert any(g.abs().max() > 0 for g in want_gradients)
    for form in ("inside", "outside", "additive"):
        loss = losses.get("dpop", beta=0.3, lam=50.0, form=form)
        out = fused(example, loss, head, workspace_bytes=workspace, **options)
        zero = torch.zeros_like(out.margins)
        assert torch.equal(out.penalty, zero)
        assert torch.equal(out.chosen_rewards, zero)
        assert torch.equal(out.rejected_rewards, zero)
        assert torch.equal(out.loss, want.loss)
        gradients = torch.autograd.grad(out.loss, example.trained)
        for a, b in zip(gradients, want_gradients, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_policy_equal_to_its_reference_on_two_threads(dtype: torch.dtype, trained: bool) -> None:
    """However a library splits a product between threads, it splits policy and reference alike."""
    example = batch(*SHAPES["realistic"][:4], dtype=dtype, trained=trained)
    torch.set_num_threads(2)
    try:
        out = fused(example, "dpop", **equal_policy(example, "ref_logps", LogitTransform(), None))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(out.margins, torch.zeros(4))
    assert torch.equal(out.penalty, torch.zeros(4))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_policy_equal_to_its_reference_under_autocast(trained: bool) -> None:
    example = batch(3, 20, 32, 99, bias=True, trained=trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for source in ("ref_logps", "ref_hidden"):
            options = equal_policy(example, source, LogitTransform(), None)
            out = fused(example, "dpop", **options)
            assert torch.equal(out.penalty, torch.zeros(3))
            assert torch.equal(out.margins, torch.zeros(3))


@pytest.mark.parametrize("pairs", [[[0, 3], [0, 4], [0, 5]], [[4, 0], [1, 2]]], ids=["one", "two"])
def test_a_policy_equal_to_its_reference_with_pairs(pairs: list[list[int]]) -> None:
    example = batch(3, 20, 32, 99)
    out = fused(example, "dpop", pairs=pairs, ref_hidden=example.hidden.detach())
    assert torch.equal(out.margins, torch.zeros(len(pairs)))
    assert torch.equal(out.penalty, torch.zeros(len(pairs)))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_policy_equal_to_its_desensitised_reference(alpha: float) -> None:
    example = batch(3, 20, 32, 99)
    ref = fused_logps(*example.inputs, example.labels, ld_alpha=alpha).detach()
    out = fused(example, losses.length_desensitised(losses.get("dpop"), alpha), ref_logps=ref)
    assert torch.equal(out.margins, torch.zeros(3))
    plain = fused(example, losses.length_desensitised(losses.get("dpop"), 1.0), ref_logps=ref)
    assert not torch.equal(plain.margins, torch.zeros(3))


def test_a_function_of_ones_own_logs_the_penalty_when_there_is_a_reference() -> None:
    example = batch(3)
    function = losses.pairwise(lambda pairs: pairs.rejected - pairs.chosen)
    without = fused(example, function)
    assert without.penalty is None
    given = fused_preference_loss(
        example.hidden, example.weight, example.labels, loss=function, ref_logps=example.ref_logps
    )
    assert torch.equal(given.loss, without.loss)
    want = fused_dpop_loss(
        example.hidden, example.weight, example.labels, ref_logps=example.ref_logps
    )
    assert torch.equal(given.penalty, want.penalty)


WRONG = (
    "expected the log-prob of a completion in nats, the sum over its tokens: finite and at most 0"
)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), f"ref_logps is nan for the rejected side of pair 1, {WRONG}$"),
        (float("-inf"), f"ref_logps is -inf for the rejected side of pair 1, {WRONG}$"),
        (float("inf"), "ref_logps is inf for the rejected side of pair 1"),
        (35.25, f"ref_logps is 35.25 .*, {WRONG}; of a negative log-likelihood, take -ref_logps"),
    ],
)
def test_log_probs_that_are_none(value: float, message: str, trained: bool) -> None:
    example = batch(3, trained=trained)
    chosen, rejected = example.ref_logps.chunk(2)
    rejected = rejected.clone()
    rejected[1] = value
    for given in (torch.cat([chosen, rejected]), (chosen, rejected)):
        with pytest.raises(ValueError, match=message):
            fused(example, "dpop", ref_logps=given)


def test_log_probs_of_sides_that_are_not_there_may_be_anything() -> None:
    example = batch(2)
    sides = example.ref_logps.new_tensor([[-9.0, torch.nan], [torch.inf, -8.0]])
    out = fused(example, "kto", pairs=[[0, -1], [-1, 2]], ref_logps=sides.unbind())
    assert bool(torch.isfinite(out.loss))


def test_certain_completions_may_be_rounded_to_above_0() -> None:
    example = batch(2)
    assert bool(fused(example, "dpop", ref_logps=torch.full((4,), 1e-3)).loss.isfinite())


def test_log_probs_are_looked_at_in_a_graph() -> None:
    example = batch(2)

    def run(hidden: Tensor, ref_logps: Tensor) -> Tensor:
        return fused_preference_loss(
            hidden, example.weight, example.labels, ref_logps=ref_logps
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = run(example.hidden, example.ref_logps)
    assert torch.equal(compiled(example.hidden, example.ref_logps), want)
    with pytest.raises(ValueError, match="ref_logps is nan for the chosen side of pair 0"):
        compiled(example.hidden, example.ref_logps * torch.nan)
    torch._dynamo.reset()
    opcheck(sound, (torch.full((2, 3), -1.0), torch.arange(6).view(3, 2)))
