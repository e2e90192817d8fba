"""The operators by torch.library's own checks, and first derivatives by finite differences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from fastdpop import fused_logps, losses, ops
from fastdpop.engines import NeedsGrad
from fastdpop.rows import Rows
from fastdpop.spec import Spec
from fastdpop.transform import LogitTransform
from tests.batches import HEADS, LOSSES, Batch, batch, fused

WORKSPACE = 20_000
ALL = NeedsGrad(True, True, True)


def spec_of(dtype: torch.dtype = torch.float32, transform: str = "all", **more: Any) -> str:
    return Spec(HEADS[transform], dtype, WORKSPACE, "eager", **more).text()


def rows_of(example: Batch, **given: Any) -> Rows:
    alpha = given.get("ld_alpha")
    pairs = given.get("pairs", HALVES)
    tensors = ops.rows_from_labels(example.labels, 37, pairs, None, True, False, None, alpha)
    return Rows.of_tensors(tensors, weighted=alpha is not None)


HALVES = torch.tensor([[0, 3], [1, 4], [2, 5]])


def row_inputs(example: Batch, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    hidden = example.hidden.detach().flatten(0, 1)[rows.index]
    hidden.requires_grad_(example.hidden.requires_grad)
    return hidden, example.weight, example.bias, rows.targets, rows.groups[0]


def test_a_spec_and_its_text() -> None:
    for transform in HEADS.values():
        spec = Spec(
            transform, torch.bfloat16, 7, "cpu", ("entropy",), ALL, "sum", "DPO(beta=0.1, x='y')"
        )
        assert Spec.parse(spec.text()) == spec
        assert len({spec, Spec.parse(spec.text())}) == 1


@pytest.mark.parametrize("keep_unpaired", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pairs": torch.tensor([[0, 3], [0, 4]])},
        {"pairs": torch.tensor([[0, -1], [-1, 4], [0, 4]]), "ld_alpha": 0.5},
        {"ld_alpha": 0.5},
        {"token_weights": torch.rand(6, 9)},
        {"token_weights": torch.rand(6, 9), "ld_alpha": 0.0},
    ],
    ids=lambda given: " ".join(given) or "default",
)
def test_rows_from_labels(given: dict[str, Any], shift: bool, keep_unpaired: bool) -> None:
    example = batch(3)
    pairs, weights = given.get("pairs", HALVES), given.get("token_weights")
    alpha = given.get("ld_alpha")
    how = (shift, keep_unpaired and alpha is None)
    opcheck(ops.rows_from_labels, (example.labels, 37, pairs, None, *how, weights, alpha))
    bounds = torch.arange(7) * 9
    flat = None if weights is None else weights.flatten()
    labels = example.labels.flatten()
    opcheck(ops.rows_from_labels, (labels, 37, pairs, bounds, *how, flat, alpha))


def test_rows_from_labels_of_int32_and_of_nothing() -> None:
    example = batch(3)
    nothing, one = torch.full((2, 3), -100), torch.tensor([[0, 1]])
    no_pairs = torch.zeros(0, 2, dtype=torch.int64)
    for labels, pairs, keep, alpha in (
        (example.labels.int(), HALVES, False, None),
        (nothing, one, False, 0.5),
        (example.labels[:5], no_pairs, True, None),
    ):
        opcheck(ops.rows_from_labels, (labels, 37, pairs, None, True, keep, None, alpha))


@pytest.mark.parametrize("keep_direction", [True, False])
@pytest.mark.parametrize("statistics", [(), ("entropy", "aligned_logps")])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_row_logps(
    dtype: torch.dtype, bias: bool, statistics: tuple[str, ...], keep_direction: bool
) -> None:
    example = batch(3, dtype=dtype, bias=bias, trained=not keep_direction)
    inputs = row_inputs(example, rows_of(example))
    needs_grad = NeedsGrad(True, not keep_direction, bias and not keep_direction)
    spec = spec_of(dtype, statistics=statistics, needs_grad=needs_grad)
    opcheck(ops.row_logps, (*inputs, spec))


def test_row_logps_under_autocasts_dtype() -> None:
    example = batch(3, bias=True)
    inputs = row_inputs(example, rows_of(example))
    opcheck(ops.row_logps, (*inputs, spec_of(torch.bfloat16, needs_grad=ALL)))


@pytest.mark.parametrize(
    "needs_grad", [[True, True, True], [False, True, False], [True, False, False]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_logps_backward(dtype: torch.dtype, needs_grad: list[bool]) -> None:
    example = batch(3, dtype=dtype, bias=True)
    rows = rows_of(example)
    inputs = [t.detach() for t in row_inputs(example, rows) if t is not None]
    lse = ops.row_logps(*inputs, spec_of(dtype))[1]
    dlogp = torch.randn(len(rows.index))
    spec = spec_of(dtype, needs_grad=NeedsGrad(*needs_grad))
    opcheck(ops.row_logps_backward, (dlogp, *inputs, lse, spec))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dpop", "kto", "wpo", "ld", "shared"])
def test_pair_loss(name: str, dtype: torch.dtype, bias: bool) -> None:
    example = batch(3, dtype=dtype, bias=bias)
    loss = losses.get("dpop") if name == "shared" else LOSSES[name]
    pairs = torch.tensor([[0, 3], [0, 4], [2, 5]]) if name == "shared" else HALVES
    rows = rows_of(example, pairs=pairs, ld_alpha=loss.traits.ld_alpha)
    hidden, weight, offset, *_ = row_inputs(example, rows)
    reference = torch.randn(2, 3, dtype=example.ref_logps.dtype)
    kl = torch.tensor(0.5, dtype=reference.dtype) if name == "kto" else None
    spec = spec_of(
        dtype,
        statistics=("entropy", *loss.traits.statistics),
        needs_grad=NeedsGrad(True, True, bias),
        loss=losses.key_of(loss),
    )
    opcheck(
        ops.pair_loss, (hidden, weight, offset, rows.tensors(), reference, kl, None, None, spec)
    )


def test_pair_loss_of_some_gradients() -> None:
    example = batch(3, bias=True)
    example.hidden.requires_grad_(False)
    rows = rows_of(example)
    hidden, weight, offset, *_ = row_inputs(example, rows)
    spec = spec_of(
        needs_grad=NeedsGrad(False, True, True),
        reduction="sum",
        loss=losses.key_of(losses.get("sft")),
    )
    opcheck(ops.pair_loss, (hidden, weight, offset, rows.tensors(), None, None, None, None, spec))


def derivatives_agree(
    example: Batch, loss: losses.PreferenceLoss, head: LogitTransform, **more: Any
) -> None:
    leaves = example.trained

    def run(*changed: Tensor) -> Tensor:
        given = dict(zip(map(id, leaves), changed, strict=True))
        hidden, weight, bias = (
            None if t is None else given.get(id(t), t)
            for t in (example.hidden, example.weight, example.bias)
        )
        assert hidden is not None
        assert weight is not None
        own = Batch(hidden, weight, bias, example.labels, example.ref_logps)
        return fused(own, loss, head, workspace_bytes=WORKSPACE, **more).loss

    assert gradcheck(run, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["dpop", "dpop additive", "ipo", "orpo", "sft", "ld", "sum"])
def test_gradcheck_of_losses(name: str, reduction: str, trained: bool) -> None:
    example = batch(2, 5, 4, 7, dtype=torch.float64, bias=True, trained=trained)
    loss = LOSSES[name]
    derivatives_agree(example, loss, HEADS["plain"], reduction=reduction)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("head", HEADS)
def test_gradcheck_of_heads(head: str, trained: bool) -> None:
    example = batch(2, 5, 4, 7, dtype=torch.float64, bias=True, trained=trained)
    derivatives_agree(example, LOSSES["dpop"], HEADS[head])
    derivatives_agree(example, LOSSES["dpo"], HEADS[head], pairs=[[0, 2], [0, 3]])


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_gradcheck_of_logps(reduction: str, trained: bool) -> None:
    example = batch(2, 5, 4, 7, dtype=torch.float64, trained=trained)

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_logps(
            hidden, weight, example.labels, reduction=reduction, workspace_bytes=WORKSPACE
        )

    assert gradcheck(run, (example.hidden, example.weight), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (0, 5), (3, 2**19), (2**19 + 3, 3)])
def test_scale(shape: tuple[int, int], by_row: bool, dtype: torch.dtype) -> None:
    """Rounded once, whole or in pieces."""
    gradient = torch.randn(shape)
    factor = torch.randn(shape[0], 1) if by_row else torch.tensor(-0.3)
    got = ops.scale(gradient, factor, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, (gradient * factor).to(dtype))
    if gradient.numel() < 100:
        opcheck(ops.scale, (gradient, factor, dtype))


def test_engines_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is launched on the current device, whatever the tensors' own is."""
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(own: torch.device) -> Iterator[None]:
        entered.append(own)
        yield
        entered.append(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "device", device)
    second = torch.device("cuda", 1)
    with ops._engine_context(second):
        assert entered == [second]
    assert entered == [second, torch.device("cpu")]
    with ops._engine_context(torch.device("cpu")), torch.autocast("cpu", torch.bfloat16):
        assert len(entered) == 2


def test_every_operator_with_an_engine_sets_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def context(own: torch.device) -> Iterator[None]:
        entered.append(own)
        yield

    monkeypatch.setattr(ops, "_engine_context", context)
    example = batch(2, trained=True)
    fused(example, LOSSES["dpo"])
    assert len(entered) == 1, "pair_loss"
    logps = fused_logps(example.hidden, example.weight, example.labels)
    assert len(entered) == 2, "row_logps"
    logps.sum().backward()
    assert len(entered) == 3, "row_logps_backward"
