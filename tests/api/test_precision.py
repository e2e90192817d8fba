"""Sixteen bits: autocast with float32 master weights, bfloat16 and float16 inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpop import fused_dpop_loss, fused_logps, fused_preference_loss, naive
from fastdpop.transform import LogitTransform
from tests.batches import HEADS, Batch, batch, fused, losses_by_definition, token_logps

HALF = [torch.bfloat16, torch.float16]


def rounded(example: Batch, dtype: torch.dtype) -> Batch:
    """The float32 inputs as autocast's products see them, in float64."""
    return example.to(dtype).to(torch.float64)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sequence_logps_within_1e4_of_float64(inputs: torch.dtype, dtype: torch.dtype) -> None:
    """Issue 2's criterion through the public function; a path through 16-bit logits fails it."""
    example = batch(3, 30, 128, 2003, dtype=inputs, scale=4.0)
    seen = inputs if inputs != torch.float32 else dtype
    exact = token_logps(rounded(example, seen)).sum(1).detach()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=inputs == torch.float32):
        ours = fused_logps(*example.inputs, example.labels)
        z = F.linear(example.hidden.to(seen), example.weight.to(seen))[:, :-1].float()
    labels = example.labels[:, 1:]
    through_logits = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    through_logits = (through_logits * (labels != -100)).sum(1)
    scored = exact != 0

    def worst(logps: Tensor) -> float:
        return float(((logps.double() - exact) / exact)[scored].abs().max())

    assert ours.dtype == torch.float32
    assert worst(ours) < 1e-6
    if seen == torch.bfloat16:
        assert worst(through_logits) > 1e-4


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["dpop", "aot"])
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_autocast_rounds_what_products_take_and_nothing_else(
    engine: str, dtype: torch.dtype, head: str, name: str, trained: bool
) -> None:
    """The inputs; and, in engines with 16-bit products, the gradient of the logits."""
    example = batch(4, bias=True, trained=trained)
    with torch.autocast("cpu", dtype=dtype):
        out = fused(example, name, HEADS[head], engine=engine)
    gradients = torch.autograd.grad(out.loss, example.trained)
    wide = rounded(example, dtype)
    wide.ref_logps = example.ref_logps
    exact = losses_by_definition(wide, name, HEADS[head]).mean()
    torch.testing.assert_close(out.loss.double(), exact, rtol=1e-5, atol=1e-6)
    for ours, want in zip(gradients, torch.autograd.grad(exact, wide.trained), strict=True):
        assert ours.dtype == torch.float32
        rounding = 2e-5 if engine == "eager" else torch.finfo(dtype).eps
        bound = rounding * float(want.abs().max())
        torch.testing.assert_close(ours.double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_dweight_of_master_weights_is_more_exact_than_autocasts_own(dtype: torch.dtype) -> None:
    example = batch(3, 40, 64, 501, bias=True)
    scored = example.labels[:, 1:] != -100

    def total(logps: Tensor) -> Tensor:
        return logps.sum(1).mean()

    wide = example.to(torch.float64)
    exact = torch.autograd.grad(total(token_logps(wide)), wide.trained)
    with torch.autocast("cpu", dtype=dtype):
        ours = fused_logps(*example.inputs[:2], example.labels, bias=example.bias)
        z = F.linear(example.hidden, example.weight, example.bias)[:, :-1]
        theirs = -F.cross_entropy(
            z.flatten(0, 1), example.labels[:, 1:].flatten(), reduction="none"
        )
    theirs = theirs.view_as(scored)
    for own, other, want in zip(
        torch.autograd.grad(ours.mean(), example.trained),
        torch.autograd.grad(total(theirs), example.trained),
        exact,
        strict=True,
    ):
        assert own.dtype == torch.float32
        assert (own - want).norm() < (other - want).norm()


def test_autocast_takes_master_weights_and_sixteen_bit_hidden_states() -> None:
    example = batch(3, bias=True)
    mixed = Batch(
        example.hidden.detach().bfloat16().requires_grad_(),
        example.weight,
        example.bias,
        example.labels,
        example.ref_logps,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, out = fused(example, "dpop"), fused(mixed, "dpop")
    assert torch.equal(out.loss, want.loss)
    gradients = torch.autograd.grad(out.loss, mixed.trained)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(gradients, torch.autograd.grad(want.loss, example.trained), strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_autocast_leaves_float64_alone() -> None:
    example = batch(3, dtype=torch.float64)
    want = fused(example, "dpop").loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused(example, "dpop").loss, want)


def test_backward_inside_autocast_is_backward_outside() -> None:
    example = batch(3, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("dpop", "aot"):
            inside = torch.autograd.grad(fused(example, name).loss, example.trained)
            loss = fused(example, name).loss
            with torch.autocast("cpu", enabled=False):
                outside = torch.autograd.grad(loss, example.trained)
            assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_long_sequence_is_summed_exactly(dtype: torch.dtype) -> None:
    """4,000 tokens of 7 nats: a running sum in 16 bits would stop at 256 or at infinity."""
    hidden = torch.zeros(2, 4001, 1, dtype=dtype)
    weight = torch.zeros(1097, 1, dtype=dtype)
    labels = torch.zeros(2, 4001, dtype=torch.int64)
    out = fused_preference_loss(hidden, weight, labels, loss="sft")
    want = -4000 * torch.tensor(1097.0, dtype=torch.float64).log()
    torch.testing.assert_close(out.chosen_logps.double(), want[None], rtol=1e-7, atol=0)
    assert out.loss.isfinite()


def test_autocast_on_another_device_type_changes_nothing() -> None:
    example = batch(3)
    want = fused(example, "dpop", LogitTransform(softcap=2.0)).loss
    with torch.autocast("cpu", enabled=False):
        assert torch.equal(fused(example, "dpop", LogitTransform(softcap=2.0)).loss, want)


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_log_ratios_of_long_completions_are_not_rounded(engine: str) -> None:
    """At -6,000 nats the next float32 is 5e-4 away, and DPOP multiplies by 15: with sums rounded to
    float32 the gradient is off by 2e-5 and more of its largest value.
    """
    hidden = torch.randn(4, 701, 64, requires_grad=True)
    weight = (torch.randn(5_003, 64) * 0.02).requires_grad_()
    labels = torch.randint(0, 5_003, (4, 701))
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logps = naive.sequence_logps(*wide, labels)
    assert (logps < -5_900).all()
    ref_logps = logps.detach() + torch.tensor([0.5, -0.3, 0.2, 0.1], dtype=torch.float64)
    exact = naive.dpop_loss(logps, ref_logps)
    out = fused_dpop_loss(hidden, weight, labels, engine=engine, ref_logps=ref_logps)
    assert out.loss.dtype == out.chosen_logps.dtype == out.margins.dtype == torch.float32
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    for ours, want in zip(gradients, torch.autograd.grad(exact, wide), strict=True):
        error = (ours.double() - want).abs().max() / want.abs().max()
        assert error < 5e-6


def test_log_probs_in_float64_keep_what_float32_does_not() -> None:
    hidden, weight = torch.randn(2, 701, 32), torch.randn(503, 32) * 0.02
    labels = torch.randint(0, 503, (2, 701))
    exact = naive.sequence_logps(hidden, weight, labels)
    for_reference = fused_logps(hidden, weight, labels, dtype=torch.float64)
    assert for_reference.dtype == torch.float64
    torch.testing.assert_close(for_reference, exact, rtol=0, atol=1e-4)
    rounded = fused_logps(hidden, weight, labels)
    assert torch.equal(rounded, for_reference.float())
    assert not torch.equal(rounded.double(), for_reference)
    with pytest.raises(ValueError, match=r"dtype is torch\.float16, expected one of"):
        fused_logps(hidden, weight, labels, dtype=torch.float16)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_policy_equal_to_its_reference_is_compared_as_that_was_rounded(
    dtype: torch.dtype, trained: bool
) -> None:
    hidden = torch.randn(4, 301, 32, requires_grad=True)
    weight = (torch.randn(503, 32) * 0.3).requires_grad_(trained)
    labels = torch.randint(0, 503, (4, 301))
    with torch.no_grad():
        ref_logps = fused_logps(hidden, weight, labels, dtype=dtype)
    out = fused_dpop_loss(hidden, weight, labels, ref_logps=ref_logps)
    assert torch.equal(out.penalty, torch.zeros(2))
    assert torch.equal(out.margins, torch.zeros(2))
