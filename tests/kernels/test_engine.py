"""The Triton engine in the interpreter: what it promises beyond the conformance suite."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastdpop import engines, fused_logps, fused_preference_loss, losses, reference
from fastdpop.engines import Engine, Problem, Wanted
from fastdpop.engines.triton import TritonEngine, cheaper
from fastdpop.head import Head
from tests.batches import HEADS, batch
from tests.engines.test_conformance import compare
from tests.engines.test_conformance import problem as conformance_problem

ALL = Wanted(True, True, True)
CPU = torch.device("cpu")


def problem(rows: int = 60, dtype: torch.dtype = torch.float32, **changes: object) -> Problem:
    example = Problem(
        hidden=torch.randn(rows, 40).to(dtype),
        weight=(torch.randn(100, 40) * 0.3).to(dtype),
        bias=torch.randn(100).to(dtype),
        targets=torch.randint(0, 100, (rows,)),
        groups=[0, rows // 3, rows],
        head=Head(),
        compute_dtype=dtype,
        workspace_bytes=1 << 26,
    )
    return dataclasses.replace(example, **changes)  # type: ignore[arg-type]


def one_pass(engine: Engine, p: Problem, c: Tensor) -> list[Tensor]:
    result, found = engine.logps_and_gradients(
        p, (), lambda a, b, *_: c[p.groups[a] : p.groups[b]], ALL
    )
    return [result.logps, result.lse, *(g for g in found if g is not None)]


def test_auto_never_takes_the_interpreter() -> None:
    assert "triton" in engines.available(CPU)
    assert engines.choose("auto", CPU, torch.float32) != "triton"
    assert engines.choose("triton", CPU, torch.float32) == "triton"
    with pytest.raises(ValueError, match="it computes in float32, bfloat16 and float16"):
        engines.choose("triton", CPU, torch.float64)


@pytest.mark.parametrize("workspace", [3000, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_by_cublas_conform(dtype: torch.dtype, workspace: int) -> None:
    """The suite runs with the kernels' products; these are the others."""
    compare(
        TritonEngine(products="cublas"),
        conformance_problem(dtype, head=HEADS["all"], workspace=workspace),
    )


def test_near_certainty_keeps_its_gradient() -> None:
    p = problem(64, torch.bfloat16, bias=None)
    p.hidden.copy_(p.weight[p.targets] * 4)
    exact_hidden = p.hidden.double().requires_grad_()
    logps = reference.token_logps(exact_hidden, p.weight, p.targets)
    assert logps.median() > -0.01
    (want,) = torch.autograd.grad(logps.sum(), exact_hidden)
    _, direction = TritonEngine().logps_and_direction(p, ())
    error = (direction.double() - want).norm(dim=1) / want.norm(dim=1)
    assert error.max() < 0.05


@pytest.mark.parametrize("products", ["kernels", "cublas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_coefficient_are_skipped(dtype: torch.dtype, products: str) -> None:
    """The same gradients as without those rows, whose hidden states are not even read."""
    engine = TritonEngine(products=products)
    p, c = problem(60, dtype), torch.randn(60)
    dead = torch.arange(60) % 3 != 1
    c[dead] = 0.0
    live = dataclasses.replace(p, hidden=p.hidden[~dead], targets=p.targets[~dead], groups=[0, 20])
    lse = engine.logps(p, ()).lse
    got = engine.gradients(p, lse, c, ALL)
    want = engine.gradients(live, lse[~dead], c[~dead], ALL)
    assert got.hidden is not None
    assert want.hidden is not None
    assert torch.equal(got.hidden[dead], torch.zeros(40, 40))
    torch.testing.assert_close(got.hidden[~dead], want.hidden, rtol=0, atol=1e-6)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", ["rows apart", "transposed", "misaligned", "odd width"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_as_they_lie(dtype: torch.dtype, weight: str) -> None:
    engine = TritonEngine(products="kernels")
    p = problem(40, dtype)
    if weight == "odd width":
        p = dataclasses.replace(p, hidden=p.hidden[:, :33].contiguous(), weight=p.weight[:, :33])
        other = p.weight.contiguous()
    elif weight == "rows apart":
        other = torch.cat([p.weight, p.weight], dim=1)[:, :40]
    elif weight == "transposed":
        other = p.weight.T.contiguous().T
    else:
        room = torch.empty(p.weight.numel() + 1, dtype=dtype)
        other = room[1:].view_as(p.weight).copy_(p.weight)
    c = torch.randn(40)
    want = one_pass(engine, dataclasses.replace(p, weight=p.weight.contiguous()), c)
    got = one_pass(engine, dataclasses.replace(p, weight=other), c)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_rounds_the_operands() -> None:
    engine, p, c = TritonEngine(), problem(40), torch.randn(40)
    half = torch.bfloat16
    rounded = problem(
        40, half, hidden=p.hidden.to(half), weight=p.weight.to(half), targets=p.targets
    )
    assert p.bias is not None
    rounded = dataclasses.replace(rounded, bias=p.bias.to(half))
    got = one_pass(engine, dataclasses.replace(p, compute_dtype=half), c)
    assert all(torch.equal(a, b) for a, b in zip(got, one_pass(engine, rounded, c), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filtering_leaves_out_no_more_than_it_says(dtype: torch.dtype) -> None:
    threshold = 1e-2
    exact, filtering = TritonEngine(products="kernels"), TritonEngine(filter_below=threshold)
    p = problem(48, dtype, bias=None)
    p.weight[32:].mul_(0.01)
    p.weight[:32].mul_(3.0)
    p.hidden.copy_(p.weight[p.targets % 16] * 0.25)
    c = torch.randn(48)
    want, got = one_pass(exact, p, c), one_pass(filtering, p, c)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    difference = (got[2] - want[2]).norm(dim=1)
    assert difference.max() > 0, "the case filters nothing"
    largest = p.weight.float().norm(dim=1).max()
    assert (difference <= c.abs() * threshold * 100 * largest + 1e-6).all()
    assert (got[3] - want[3]).abs().max() <= threshold * c.abs().sum() * p.hidden.abs().max() + 1e-6


def test_filtering_is_an_engine_of_its_own_name() -> None:
    name = "triton-filter-test"
    engines.register(TritonEngine(filter_below=1e-6, name=name), first=False)
    try:
        assert name in engines.available(CPU)
    finally:
        engines._ENGINES.pop(name)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="products is 'fast', expected one of"):
        TritonEngine(products="fast")
    with pytest.raises(ValueError, match=r"filter_below is 2.0, expected a number in \(0, 1\)"):
        TritonEngine(filter_below=2.0)
    with pytest.raises(ValueError, match="only the kernels can leave"):
        TritonEngine(filter_below=0.1, products="cublas")


def test_the_environment_chooses_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    p, c = problem(20, torch.bfloat16), torch.randn(20)
    for products in ("kernels", "cublas"):
        monkeypatch.setenv("FASTDPOP_PRODUCTS", products)
        got = one_pass(TritonEngine(), p, c)
        want = one_pass(TritonEngine(products=products), p, c)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    monkeypatch.setenv("FASTDPOP_PRODUCTS", "mine")
    with pytest.raises(ValueError, match="FASTDPOP_PRODUCTS is 'mine'"):
        TritonEngine().logps(p, ())


def test_cheaper_weighs_memory_against_rate() -> None:
    assert cheaper(8192, 128_256, 1024, 132) == "kernels"
    # many rows of wide states: the rate decides, not what is moved
    assert cheaper(65_536, 128_256, 16_384, 132) == "cublas"
    # dHidden has fewer tiles than the chip has processors
    assert cheaper(2048, 128_256, 256, 132) == "cublas"


@pytest.mark.parametrize("workspace", [1, 12_000, None])
@pytest.mark.parametrize("name", ["dpop", "ipo", "hinge"])
def test_the_loss_kernel_gives_what_the_callback_gives(
    name: str, workspace: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = batch(pairs=3, length=14, width=16, vocabulary=50)

    def run() -> list[Tensor]:
        out = fused_preference_loss(
            example.hidden,
            example.weight,
            example.labels,
            loss=losses.get(name),
            ref_logps=example.ref_logps,
            engine="triton",
            workspace_bytes=workspace,
        )
        assert out.loss.requires_grad
        return [out.loss.detach(), out.chosen_logps, *torch.autograd.grad(out.loss, example.inputs)]

    fused = run()
    monkeypatch.setattr("fastdpop.kernels.losses.jitted", lambda *_: None)
    for a, b in zip(fused, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
    assert torch.equal(fused[1], run()[1]), "sums are the same bits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_equal_to_its_reference_has_no_penalty(dtype: torch.dtype) -> None:
    labels = torch.randint(0, 60, (4, 20))
    labels[:, :5] = -100
    hidden = torch.randn(4, 20, 16).to(dtype).requires_grad_()
    weight = torch.randn(60, 16).to(dtype)
    with torch.no_grad():
        ref_logps = fused_logps(hidden, weight, labels, engine="triton")
    for trained in (False, True):
        for workspace in (1, None):
            weight.requires_grad_(trained)
            out = fused_preference_loss(
                hidden,
                weight,
                labels,
                ref_logps=ref_logps,
                engine="triton",
                workspace_bytes=workspace,
            )
            assert out.penalty is not None
            assert torch.equal(out.penalty, torch.zeros(2))
            assert torch.equal(out.margins, torch.zeros(2))
