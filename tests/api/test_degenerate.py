"""Batches at the edge: nothing to score, one of everything, enormous logits, NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdpop import fused_logps, losses
from tests.batches import LOSSES, Batch, assert_by_definition, batch, fused, token_logps


def repeat(example: Batch, kept: list[int]) -> Batch:
    """Some sequences of a batch, again as leaves."""
    return Batch(
        example.hidden[kept].detach().requires_grad_(),
        example.weight,
        example.bias,
        example.labels[kept],
        example.ref_logps[kept],
    )


@pytest.mark.filterwarnings("ignore:no token of the batch is scored")
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_scored(name: str, trained: bool) -> None:
    """All prompts: every log-prob is 0 and so is every gradient, exactly."""
    example = batch(3, dtype=torch.float64, bias=True, trained=trained)
    example.labels.fill_(-100)
    example.ref_logps.zero_()
    out = assert_by_definition(example, LOSSES[name])
    assert out.loss.isfinite()
    assert torch.equal(out.chosen_logps, torch.zeros(3, dtype=torch.float64))
    for leaf, gradient in zip(
        example.trained, torch.autograd.grad(out.loss, example.trained), strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.filterwarnings("ignore:no token of the batch is scored")
@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("name", ["dpop", "aot", "ld"])
def test_sequences_too_short_to_predict_anything(name: str, length: int) -> None:
    example = batch(3, 9, dtype=torch.float32, bias=True)
    example.hidden = torch.randn(6, length, 16, requires_grad=True)
    example.labels = torch.zeros(6, length, dtype=torch.int64)
    out = fused(example, LOSSES[name], statistics=("entropy", "token_accuracy"))
    out.loss.backward()
    assert out.lengths.tolist() == [0] * 6
    assert torch.equal(out.entropy, torch.zeros(6))
    assert example.hidden.grad is not None
    assert example.hidden.grad.shape == (6, length, 16)
    assert torch.equal(example.weight.grad, torch.zeros_like(example.weight))
    assert fused_logps(*example.inputs[:2], example.labels).tolist() == [0.0] * 6


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("pairs", "length"), [(1, 2), (1, 9), (3, 2)])
def test_one_pair_or_one_token(pairs: int, length: int, name: str, trained: bool) -> None:
    example = batch(pairs, length, dtype=torch.float64, bias=True, trained=trained)
    example.labels[0, -1] = 5
    out = assert_by_definition(example, LOSSES[name])
    assert int(out.lengths[0]) >= 1


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_completion(name: str, side: str, trained: bool) -> None:
    example = batch(3, dtype=torch.float64, bias=True, trained=trained)
    empty = {"chosen": [0], "rejected": [3], "both": [0, 3]}[side]
    example.labels[empty] = -100
    example.ref_logps[empty] = 0.0
    out = assert_by_definition(example, LOSSES[name])
    assert (out.lengths[empty] == 0).all()


@pytest.mark.parametrize("vocabulary", [1, 2])
@pytest.mark.parametrize("name", ["dpop", "orpo", "wpo"])
def test_a_tiny_vocabulary(name: str, vocabulary: int) -> None:
    """With one token every completion has probability 1."""
    example = batch(3, width=1, vocabulary=vocabulary, dtype=torch.float64, bias=True)
    if vocabulary == 1:
        out = fused(example, LOSSES[name])
        assert torch.equal(out.chosen_logps, torch.zeros(3, dtype=torch.float64))
        for gradient in torch.autograd.grad(out.loss, example.trained):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    else:
        assert_by_definition(example, LOSSES[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_chosen_equal_to_rejected(trained: bool, dtype: torch.dtype) -> None:
    """DPO cannot tell them apart, and its gradients of the two sides cancel; DPOP still pulls the
    chosen side up.
    """
    half = batch(2, dtype=dtype, trained=trained)
    example = repeat(half, [0, 2, 0, 2])
    example.ref_logps += 3.0  # the policy has lost ground: the hinge is on
    out = fused(example, "dpo")
    assert torch.equal(out.margins, torch.zeros(2, dtype=out.loss.dtype))
    torch.testing.assert_close(out.loss.item(), math.log(2.0), rtol=1e-7, atol=0)
    assert out.accuracy == 0.0
    hidden = torch.autograd.grad(out.loss, example.trained, retain_graph=True)[0]
    assert torch.equal(hidden[:2], -hidden[2:])
    assert hidden.abs().max() > 0
    if trained:
        weight = torch.autograd.grad(out.loss, example.weight)[0]
        assert weight.abs().max() <= 1e-6 * hidden.abs().max()
    assert_by_definition(example, "dpop")
    assert (fused(example, "dpop").penalty > 0).all()


def test_one_sequence_is_chosen_and_rejected_at_once() -> None:
    """Row coefficients of the two roles add up: DPO's to exactly 0."""
    example = batch(2, dtype=torch.float64)
    out = fused(example, "dpo", pairs=[[0, 0]])
    for gradient in torch.autograd.grad(out.loss, example.trained):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("near", [True, False], ids=["reference near", "reference far"])
@pytest.mark.parametrize("name", LOSSES)
def test_logits_of_magnitude_ten_thousand(
    name: str, near: bool, dtype: torch.dtype, trained: bool
) -> None:
    """Log-probs of -1e5 a sequence, log-ratios near zero or as large, and gradients stay finite."""
    example = batch(3, dtype=dtype, bias=True, trained=trained, scale=1e4)
    wide = example.to(torch.float64)
    exact = token_logps(wide).sum(1).detach()
    assert exact.min() < -1e5
    example.ref_logps = (exact.float() + (1.0 if near else 1e5) * torch.randn(6)).clamp(max=0.0)
    out = fused(example, LOSSES[name])
    assert out.loss.isfinite()
    alpha = LOSSES[name].traits.ld_alpha
    if alpha is None:
        logps = torch.cat([out.chosen_logps, out.rejected_logps])
        torch.testing.assert_close(logps.double(), exact, rtol=1e-6, atol=0)
    for gradient in torch.autograd.grad(out.loss, example.trained):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_large_logits_through_softcap(trained: bool) -> None:
    from fastdpop.transform import LogitTransform

    example = batch(3, dtype=torch.float64, trained=trained, scale=1e4)
    assert_by_definition(example, "sft", LogitTransform(softcap=30.0))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
def test_nan_hidden_gives_a_nan_loss(name: str, trained: bool) -> None:
    example = batch(3, trained=trained)
    example.labels[0, 4] = 2
    with torch.no_grad():
        example.hidden[0, 3, 7] = torch.nan
    out = fused(example, LOSSES[name])
    assert out.loss.isnan()
    assert out.chosen_logps.isnan().tolist() == [True, False, False]
    for gradient in torch.autograd.grad(out.loss, example.trained):
        assert gradient.isnan().any()
    with pytest.raises(FloatingPointError, match="the loss is not finite: hidden not finite"):
        fused(example, LOSSES[name], check_finite=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bad", ["hidden", "weight", "bias", "kl"])
def test_check_finite_names_the_input(bad: str, reduction: str) -> None:
    example = batch(3, bias=True)
    example.labels[0, 4] = 2
    kl = torch.tensor(0.5)
    tensors = {**vars(example), "kl": kl}
    with torch.no_grad():
        tensors[bad].view(-1)[...] = torch.inf if bad == "bias" else torch.nan
    with pytest.raises(FloatingPointError, match=f"the loss is not finite: {bad} not finite"):
        fused(example, "kto", kl=kl, check_finite=True, reduction=reduction)


@pytest.mark.parametrize("bad", ["ref_hidden", "ref_weight", "ref_bias"])
def test_check_finite_names_the_references_input(bad: str) -> None:
    example, other = batch(3, bias=True), batch(3, bias=True)
    example.labels[0, 4] = 2
    options = dict(zip(("ref_hidden", "ref_weight", "ref_bias"), other.inputs, strict=True))
    options[bad] = torch.full_like(options[bad], torch.nan)
    with pytest.raises(FloatingPointError, match=f"the loss is not finite: {bad} not finite"):
        fused(example, "dpop", check_finite=True, **options)


def test_check_finite_of_an_overflow() -> None:
    example = batch(3)
    huge = losses.pairwise(lambda pairs: torch.exp(-100.0 * pairs.chosen))
    with pytest.raises(FloatingPointError, match="every input is finite, so the loss overflowed"):
        fused(example, huge, check_finite=True)


def test_check_finite_lets_a_finite_loss_pass() -> None:
    example = batch(3)
    with torch.no_grad():
        example.hidden[:, -1] = torch.nan  # predicts nothing
    out = fused(example, "dpop", check_finite=True)
    assert torch.equal(out.loss, fused(example, "dpop").loss)


def test_a_nan_pair_leaves_the_other_pairs_alone() -> None:
    example = batch(3)
    example.labels[0, 4] = 2
    want = fused(example, "dpop", reduction="none")
    with torch.no_grad():
        example.hidden[0, 3, 7] = torch.nan
    out = fused(example, "dpop", reduction="none")
    assert out.loss.isnan().tolist() == [True, False, False]
    assert torch.equal(out.loss[1:], want.loss[1:])
    hidden: Tensor = torch.autograd.grad(out.loss[1:].sum(), example.hidden)[0]
    assert hidden[[1, 2, 4, 5]].isfinite().all()
