"""The Triton engine in the interpreter: what it promises beyond the conformance suite."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpop import engines, fused_logps, fused_preference_loss, losses, naive
from fastdpop.engines import STATISTICS, Engine, GroupLoss, NeedsGrad, Problem
from fastdpop.engines.triton import TritonEngine
from fastdpop.kernels import gradients, target_logit
from fastdpop.transform import LogitTransform
from tests.batches import HEADS, batch
from tests.engines.test_conformance import compare
from tests.engines.test_conformance import problem as conformance_problem

ALL = NeedsGrad(True, True, True)
CPU = torch.device("cpu")


def problem(rows: int = 60, dtype: torch.dtype = torch.float32, **changes: object) -> Problem:
    example = Problem(
        hidden=torch.randn(rows, 40).to(dtype),
        weight=(torch.randn(100, 40) * 0.3).to(dtype),
        bias=torch.randn(100).to(dtype),
        targets=torch.randint(0, 100, (rows,)),
        groups=[0, rows // 3, rows],
        transform=LogitTransform(),
        compute_dtype=dtype,
        workspace_bytes=1 << 26,
    )
    return dataclasses.replace(example, **changes)  # type: ignore[arg-type]


def one_pass(engine: Engine, p: Problem, c: Tensor) -> list[Tensor]:
    result = engine.logps_and_gradients(
        p, (), GroupLoss(lambda a, b, *_: c[p.groups[a] : p.groups[b]]), ALL
    )
    found = result.gradients
    return [result.logps, result.lse, *(g for g in found if g is not None)]


def test_auto_never_takes_the_interpreter() -> None:
    assert "triton" in engines.available(CPU)
    assert engines.choose("auto", CPU, torch.float32) != "triton"
    assert engines.choose("triton", CPU, torch.float32) == "triton"
    with pytest.raises(ValueError, match="it computes in float32, bfloat16 and float16"):
        engines.choose("triton", CPU, torch.float64)


@pytest.mark.parametrize("workspace", [3000, 1 << 20])
@pytest.mark.parametrize("head", HEADS)
def test_products_by_the_kernels_conform(head: str, workspace: int) -> None:
    """The suite runs with cuBLAS's products where they are the default: in bfloat16."""
    compare(
        TritonEngine(products="kernels"),
        conformance_problem(torch.bfloat16, head=HEADS[head], workspace=workspace),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_near_certainty_keeps_its_gradient(dtype: torch.dtype) -> None:
    """1 - p of a token, down to 1e-7, is a sum of small numbers, not a difference of large ones."""
    engine = TritonEngine()
    p = problem(64, dtype, bias=None)
    p.weight.mul_(0.1)
    p.weight[0], p.weight[1] = 1.0, -1.0
    p.targets.zero_()
    p.hidden.mul_(0.01).add_(torch.linspace(12.0, 19.0, 64)[:, None] / 40)
    exact_hidden = p.hidden.double().requires_grad_()
    logps = naive.token_logps(exact_hidden, p.weight, p.targets)
    assert 1e-8 < -logps.max() < 1e-6
    (want,) = torch.autograd.grad(logps.sum(), exact_hidden)
    got = engine.logps_and_dlogp_dhidden(p, ())
    direction = got.dlogp_dhidden
    torch.testing.assert_close(got.logps.double(), logps.detach(), rtol=1e-5, atol=0)
    error = (direction.double() - want).norm(dim=1) / want.norm(dim=1)
    # float16 itself holds directions of this size to a part of 2**-24 / 1e-7.
    bound = 0.01 if dtype != torch.float16 else 0.5
    assert error.max() < bound
    c = torch.ones(64)
    for found in (
        engine.logps_and_gradients(
            p, (), GroupLoss(lambda a, b, *_: c[p.groups[a] : p.groups[b]]), ALL
        ).gradients,
        engine.gradients(p, got.lse, c, ALL),
    ):
        assert found.hidden is not None
        assert ((found.hidden.double() - want).norm(dim=1) / want.norm(dim=1)).max() < 0.01


@pytest.mark.parametrize("error", [-2e-5, 0.0, 2e-5])
@pytest.mark.parametrize("logit", [15.0, 60.0, 300.0])
def test_float16_of_all_certainties(
    logit: float, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 - p from 1e-1 to 1e-7, with the target's logit off by as much as a tensor core may be: what
    is kept neither leaves float16's range nor vanishes.
    """
    original = target_logit.target_logit
    monkeypatch.setattr(
        target_logit,
        "target_logit",
        lambda *args, **options: original(*args, **options) * (1 + error),
    )
    rows = 48
    p = problem(rows, torch.float16, bias=None)
    p.weight.mul_(0.05)
    p.weight[0], p.weight[1], p.weight[2] = 1.0, 1.0, 0.25
    p.weight[1, 20:] = 0.0
    p.targets.zero_()
    odds = torch.logspace(-1, -7, rows).log()
    p.hidden.zero_()
    p.hidden[:, :20] = (logit + odds[:, None]) / 20
    p.hidden[:, 20:] = -odds[:, None] / 20
    c = torch.randn(rows)
    leaves = [t.double().requires_grad_() for t in (p.hidden, p.weight)]
    logps = naive.token_logps(*leaves, p.targets)
    want = torch.autograd.grad((c.double() * logps).sum(), leaves)
    engine = TritonEngine()
    got = engine.logps_and_dlogp_dhidden(p, ())
    again = engine.gradients(p, got.lse, c, ALL)
    once = one_pass(engine, p, c)
    for ours, exact in (
        (once[2], want[0]),
        (again.hidden, want[0]),
        (once[3], want[1]),
        (again.weight, want[1]),
    ):
        assert ours is not None
        assert (ours.double() - exact).norm() <= 2e-3 * exact.norm()
    for hidden in (once[2], again.hidden, got.dlogp_dhidden * c[:, None]):
        # float16 itself loses directions below 6e-8; float32 logits, what 1 - p has of their size.
        assert hidden is not None
        slack = 1e-6 * logit * c.abs() + 2e-6
        off = (hidden.double() - want[0]).norm(dim=1)
        assert (off <= 0.02 * want[0].norm(dim=1) + slack).all()


@pytest.mark.filterwarnings("ignore:no token of the batch is scored")  # of the whole batch
@pytest.mark.parametrize("workspace", [1, None])
@pytest.mark.parametrize("empty", [(1,), (0, 1, 2)])
def test_pairs_without_scored_tokens_have_a_loss(
    empty: tuple[int, ...], workspace: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs of 0, in chunks of their own too, in memory that is NaN where nobody writes."""
    example = batch(pairs=3, length=8, width=16, vocabulary=50)
    for pair in empty:
        example.labels[pair] = example.labels[3 + pair] = -100
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **options: Any) -> Tensor:
        made = new_empty(self, *args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    results = []
    for engine in ("triton", "eager"):
        out = fused_preference_loss(
            example.hidden,
            example.weight,
            example.labels,
            loss=losses.get("dpop"),
            ref_logps=example.ref_logps,
            engine=engine,
            workspace_bytes=workspace,
        )
        results.append([out.loss.detach(), out.chosen_logps, out.rejected_logps])
        results[-1] += torch.autograd.grad(out.loss, example.inputs)
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("products", ["auto", "kernels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_impossible_target(dtype: torch.dtype, products: str) -> None:
    """p(target) = 1e-60, where its own logit is no reference for the others: finite and right."""
    engine = TritonEngine(products=products)
    p = problem(40, dtype, bias=None)
    p.weight[0] = 1.0
    p.hidden[::5] = 150.0 / 40
    p.targets[::5] = 7
    p.weight[7] = p.weight[7] * 0.1
    c = torch.randn(40)
    compared = [t.double().requires_grad_() for t in (p.hidden, p.weight)]
    logps = naive.token_logps(compared[0], compared[1], p.targets)
    assert logps[::5].max() < -138
    want = torch.autograd.grad((c.double() * logps).sum(), compared)
    alone = engine.logps(p, STATISTICS)
    torch.testing.assert_close(alone.logps.double(), logps.detach(), rtol=1e-5, atol=1e-6)
    assert alone.statistics.isfinite().all()
    got = one_pass(engine, p, c)
    assert torch.equal(got[0], alone.logps)
    direction = engine.logps_and_dlogp_dhidden(p, ()).dlogp_dhidden
    again = engine.gradients(p, alone.lse, c, ALL)
    eps = torch.finfo(dtype).eps
    for ours, exact in (
        (got[2], want[0]),
        (got[3], want[1]),
        (again.hidden, want[0]),
        (again.weight, want[1]),
        (direction * c[:, None], want[0]),
    ):
        assert ours is not None
        assert (ours.double() - exact).norm() <= (eps + 1e-5) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_a_coefficient_are_skipped(dtype: torch.dtype) -> None:
    """The same gradients as without those rows, where logits are computed again."""
    engine = TritonEngine()
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
    nothing = engine.gradients(p, lse, torch.zeros(60), ALL)
    assert all(g is not None and (g == 0).all() for g in nothing)


def test_dweight_of_many_pairs() -> None:
    """After 128 pairs dWeight, rounded to bfloat16, is off by at most 1.5 times what float32 sums
    of float32 operands, rounded once, are off by.
    """
    torch.manual_seed(3)
    pairs, length, width, vocabulary = 128, 6, 32, 64
    hidden = torch.randn(2 * pairs, length + 1, width).bfloat16()
    weight = (torch.randn(vocabulary, width) * 4.0 * width**-0.5).bfloat16()
    labels = torch.randint(vocabulary, (2 * pairs, length + 1))
    ref_logps = fused_logps(hidden, weight, labels, engine="eager") + torch.randn(2 * pairs)

    def dweight(dtype: torch.dtype, engine: str) -> Tensor:
        leaf = weight.to(dtype).requires_grad_()
        fused_preference_loss(
            hidden.to(dtype), leaf, labels, ref_logps=ref_logps, engine=engine
        ).loss.backward()
        assert leaf.grad is not None
        return leaf.grad.bfloat16().double()

    wide = weight.double().requires_grad_()
    fused_preference_loss(
        hidden.double(), wide, labels, ref_logps=ref_logps.double(), engine="eager"
    ).loss.backward()
    exact = wide.grad
    assert exact is not None
    torchs = (dweight(torch.float32, "eager") - exact).norm()
    assert (dweight(torch.bfloat16, "triton") - exact).norm() <= 1.5 * torchs


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


def test_wrong_options_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="products is 'fast', expected one of"):
        TritonEngine(products="fast")
    with pytest.raises(ValueError, match="forward is 'fast', expected one of"):
        TritonEngine(forward="fast")
    for name in ("FASTDPOP_PRODUCTS", "FASTDPOP_FORWARD"):
        monkeypatch.setenv(name, "mine")
        with pytest.raises(ValueError, match=f"the environment variable {name} is 'mine'"):
            TritonEngine().logps(problem(20, torch.bfloat16), ())
        monkeypatch.delenv(name)


def test_the_environment_chooses_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    p, c = problem(20, torch.bfloat16), torch.randn(20)
    asked: list[bool] = []
    original = gradients.weight_gradient

    def recorded(*args: Any, cublas: bool, **options: Any) -> None:
        asked.append(cublas)
        original(*args, cublas=cublas, **options)

    monkeypatch.setattr(gradients, "weight_gradient", recorded)
    for products, cublas in (("auto", True), ("kernels", False)):
        monkeypatch.setenv("FASTDPOP_PRODUCTS", products)
        got = one_pass(TritonEngine(), p, c)
        want = one_pass(TritonEngine(products=products), p, c)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert set(asked) == {cublas}
        asked.clear()


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
