"""Every loss through every head: value and gradients against autograd through real logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpop import fused_dpop_loss, losses
from fastdpop.losses import PairLogps, pairwise
from tests.batches import DTYPES, HEADS, LOSSES, assert_by_definition, batch, fused, margin


def centred(pairs: PairLogps) -> Tensor:
    """A user's loss in which pairs meet."""
    margins = pairs.chosen_logratios - pairs.rejected_logratios
    return (margins - margins.mean()) ** 2


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name: str, engine: str, dtype: torch.dtype, trained: bool) -> None:
    example = batch(4, dtype=dtype, bias=True, trained=trained)
    assert_by_definition(example, LOSSES[name], engine=engine)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("function", [margin, pairwise(margin)], ids=["bare", "pairwise"])
def test_a_users_function(function: losses.PreferenceLoss, trained: bool) -> None:
    assert_by_definition(batch(dtype=torch.float64, trained=trained), function)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_users_function_in_which_pairs_meet(trained: bool) -> None:
    example = batch(4, dtype=torch.float64, trained=trained)
    out = fused(example, centred, ref_logps=example.ref_logps)
    own = losses.FunctionLoss(centred, losses.Traits(couples_pairs=True))
    want = assert_by_definition(example, own)
    assert torch.equal(out.loss, want.loss)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["kto", "kto and sft"])
def test_kl(name: str, dtype: torch.dtype, trained: bool) -> None:
    loss = losses.get("kto", beta=0.5) if name == "kto" else losses.get("kto") + losses.get("sft")
    kl = torch.tensor(1.25)
    out = assert_by_definition(batch(4, dtype=dtype, trained=trained), loss, kl=kl)
    without = fused(batch(4, dtype=dtype, trained=trained), loss)
    assert not torch.equal(out.loss, without.loss)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("workspace", [1, 20_000, None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_head(
    dtype: torch.dtype, head: str, bias: bool, workspace: int | None, trained: bool
) -> None:
    example = batch(2, 6, dtype=dtype, bias=bias, trained=trained)
    assert_by_definition(example, "dpop", HEADS[head], workspace_bytes=workspace)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["dpop", "aot", "kto", "sft", "wpo", "ld"])
def test_reductions(name: str, reduction: str, trained: bool) -> None:
    example = batch(4, dtype=torch.float64, bias=True, trained=trained)
    out = assert_by_definition(example, LOSSES[name], reduction=reduction)
    one_by_one = fused(example, LOSSES[name], reduction="none")
    torch.testing.assert_close(out.losses, one_by_one.loss, rtol=1e-13, atol=0)
    assert not out.losses.requires_grad


@pytest.mark.parametrize("form", ["inside", "outside", "additive"])
def test_fused_dpop_loss_is_the_loss_named_dpop(form: str) -> None:
    example = batch(dtype=torch.float64, bias=True)
    options = {"beta": 0.2, "lam": 5.0, "form": form, "label_smoothing": 0.1}
    out = fused_dpop_loss(
        example.hidden,
        example.weight,
        example.labels,
        bias=example.bias,
        ref_logps=example.ref_logps,
        softcap=4.0,
        reduction="sum",
        **options,  # type: ignore[arg-type]
    )
    head = HEADS["plain"].__class__(softcap=4.0)
    want = assert_by_definition(example, losses.get("dpop", **options), head, reduction="sum")
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(out.penalty, want.penalty)
