"""What the C++ kernels promise beyond the conformance suite."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastdpop import engines, fused_logps, fused_preference_loss, losses, naive
from fastdpop.engines import GroupLoss, NeedsGrad, Problem
from fastdpop.engines.cpu import CPUEngine, instruction_sets
from fastdpop.engines.cpu_library import load
from fastdpop.transform import LogitTransform

pytestmark = pytest.mark.skipif(
    not instruction_sets(), reason="fastdpop was installed without a C++ compiler"
)
ALL = NeedsGrad(True, True, True)


@pytest.fixture(params=instruction_sets())
def engine(request: pytest.FixtureRequest) -> CPUEngine:
    return CPUEngine(request.param)


def problem(rows: int, dtype: torch.dtype, **changes: object) -> Problem:
    example = Problem(
        hidden=torch.randn(rows, 40).to(dtype),
        weight=(torch.randn(700, 40) * 0.3).to(dtype),
        bias=torch.randn(700).to(dtype),
        targets=torch.randint(0, 700, (rows,)),
        groups=[0, rows // 3, rows],
        transform=LogitTransform(),
        compute_dtype=dtype,
        workspace_bytes=1 << 26,
    )
    return dataclasses.replace(example, **changes)  # type: ignore[arg-type]


def one_pass(engine: CPUEngine, p: Problem, c: Tensor) -> list[Tensor]:
    result = engine.logps_and_gradients(
        p, (), GroupLoss(lambda a, b, *_: c[p.groups[a] : p.groups[b]]), ALL
    )
    found = result.gradients
    return [result.logps, result.lse, *(g for g in found if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(
    engine: CPUEngine, dtype: torch.dtype
) -> None:
    p, c, before = problem(150, dtype), torch.randn(150), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(one_pass(engine, p, c))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_log_prob_does_not_depend_on_its_neighbours(
    engine: CPUEngine, dtype: torch.dtype
) -> None:
    """Reference log-probs computed in other batches are still bitwise those of the policy."""
    p = problem(500, dtype)
    alone = dataclasses.replace(p, hidden=p.hidden[7:12], targets=p.targets[7:12], groups=[0, 5])
    assert torch.equal(engine.logps(p, ()).logps[7:12], engine.logps(alone, ()).logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_softmax_and_one_computed_again_agree(engine: CPUEngine, dtype: torch.dtype) -> None:
    p, c = problem(150, dtype), torch.randn(150)
    kept = one_pass(engine, p, c)
    again = one_pass(engine, dataclasses.replace(p, workspace_bytes=1), c)
    for a, b in zip(kept[:3], again[:3], strict=True):
        assert torch.equal(a, b)
    rounding = 2**-7 if dtype == torch.bfloat16 else 2**-10
    for a, b in zip(kept[3:], again[3:], strict=True):
        assert (a - b).abs().max() <= rounding * b.abs().max()


def test_a_larger_workspace_keeps_larger_groups(
    engine: CPUEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, c = problem(300, torch.bfloat16), torch.randn(300)
    kept = one_pass(engine, p, c)
    monkeypatch.setattr("fastdpop.engines.cpu._KEPT_BYTES", 0)
    assert 0 < engine.chunk_rows(p, (), ALL) < 100, "smaller than the first group"
    again = one_pass(engine, p, c)
    larger = dataclasses.replace(p, workspace_bytes=1 << 30)
    assert engine.chunk_rows(larger, (), ALL) == 300, "all of them"
    for a, b, other in zip(kept[3:], one_pass(engine, larger, c)[3:], again[3:], strict=True):
        assert torch.equal(a, b)
        assert (a - other).abs().max() > 1e-5 * a.abs().max()


def test_near_certainty_keeps_its_gradient(engine: CPUEngine) -> None:
    """1 - p of a token with p = 0.9999 must not drown in the rounding of p to bfloat16."""
    p = problem(64, torch.bfloat16, bias=None)
    p.hidden.copy_(p.weight[p.targets] * 4)
    exact_hidden = p.hidden.double().requires_grad_()
    logps = naive.token_logps(exact_hidden, p.weight, p.targets)
    assert logps.median() > -0.01
    (want,) = torch.autograd.grad(logps.sum(), exact_hidden)
    direction = engine.logps_and_dlogp_dhidden(p, ()).dlogp_dhidden
    error = (direction.double() - want).norm(dim=1) / want.norm(dim=1)
    assert error.max() < 0.05  # float32 logits of size 40 leave 1 - p = 1e-4 that much


def repeated(rows: Tensor) -> Tensor:
    """The first 60 of 100 rows again after them, as a rejected completion repeats the chosen
    one.
    """
    return torch.cat([rows, rows[:60]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_rows_are_computed_once_and_exactly(engine: CPUEngine, dtype: torch.dtype) -> None:
    p = problem(100, dtype)
    twice = dataclasses.replace(
        p, hidden=repeated(p.hidden), targets=repeated(p.targets), groups=[0, 160]
    )
    library = load(engine.instructions)
    assert not isinstance(library, str)
    found = library.distinct(twice.hidden, twice.targets)
    assert found is not None
    assert found[0].tolist() == list(range(100))
    assert found[1].tolist() == [*range(100), *range(60)]
    assert library.distinct(p.hidden, p.targets) is None

    c = torch.randn(160)
    logps, lse, hidden, weight, bias = one_pass(engine, twice, c)
    own = c[:100].clone()
    own[:60] += c[100:]
    own_logps, own_lse, own_hidden, own_weight, own_bias = one_pass(
        engine, dataclasses.replace(p, groups=[0, 100]), own
    )
    assert torch.equal(logps, repeated(own_logps))
    assert torch.equal(lse, repeated(own_lse))
    assert torch.equal(weight, own_weight)
    assert torch.equal(bias, own_bias)
    # The direction of a row that repeats comes from the kept softmax, which was rounded once more.
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-14
    direction = own_hidden / own[:, None]
    error = (hidden - repeated(direction) * c[:, None]).norm(dim=1)
    assert (error <= rounding * hidden.norm(dim=1)).all()


@pytest.mark.parametrize("certain", [False, True])
def test_directions_that_wait_for_their_coefficients(engine: CPUEngine, certain: bool) -> None:
    """Rows that repeat get theirs in a second pass over the kept softmax, where they need one."""
    p = problem(200, torch.bfloat16, bias=None)
    if certain:
        p.hidden.copy_(p.weight[p.targets] * 4)
    p.hidden[100:160], p.targets[100:160] = p.hidden[:60].clone(), p.targets[:60].clone()
    c = torch.rand(200) + 0.5
    c[:32], c[100:132] = 0.37, -0.37  # cancel in dWeight, not in dHidden
    c[32:60] = c[132:160] = 0.0
    exact = p.hidden.double().requires_grad_()
    logps = naive.token_logps(exact, p.weight, p.targets)
    (want,) = torch.autograd.grad((c.double() * logps).sum(), exact)
    hidden = one_pass(engine, dataclasses.replace(p, groups=[0, 200]), c)[2].double()
    assert torch.equal(hidden[c == 0], torch.zeros_like(hidden[c == 0]))
    direction = engine.logps_and_dlogp_dhidden(p, ()).dlogp_dhidden
    at_once = direction.double() * c[:, None].double()
    error, theirs = (((x - want).norm(dim=1) / want.norm(dim=1))[c != 0] for x in (hidden, at_once))
    assert (error <= 2 * theirs + 2**-8).all()
    both = hidden[:32] + hidden[100:132]
    assert torch.equal(both, torch.zeros_like(both))


def test_shared_rows_of_a_dpo_pair_add_nothing_to_the_weights(engine: CPUEngine) -> None:
    """Their coefficients cancel exactly, so their rows are not computed in the second pass."""
    p = problem(100, torch.float32)
    twice = dataclasses.replace(
        p, hidden=repeated(p.hidden), targets=repeated(p.targets), groups=[0, 160]
    )
    c = torch.full((160,), 0.37)
    c[100:] = -0.37
    weight = one_pass(engine, twice, c)[3]
    unshared = dataclasses.replace(p, hidden=p.hidden[60:], targets=p.targets[60:], groups=[0, 40])
    assert torch.equal(weight, one_pass(engine, unshared, c[60:100])[3])


@pytest.mark.parametrize("weight", ["rows apart", "transposed", "misaligned", "odd width"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_as_they_lie(engine: CPUEngine, dtype: torch.dtype, weight: str) -> None:
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


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_operands_and_nothing_else(
    engine: CPUEngine, compute: torch.dtype
) -> None:
    p, c = problem(60, torch.float32), torch.randn(60)
    rounded = dataclasses.replace(
        p,
        hidden=p.hidden.to(compute),
        weight=p.weight.to(compute),
        bias=None if p.bias is None else p.bias.to(compute),
        compute_dtype=compute,
    )
    got = one_pass(engine, dataclasses.replace(p, compute_dtype=compute), c)
    assert all(torch.equal(a, b) for a, b in zip(got, one_pass(engine, rounded, c), strict=True))


def test_auto_takes_it_for_all_but_float64() -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert engines.choose("auto", cpu, dtype) == "cpu"
    assert engines.choose("auto", cpu, torch.float64) == "eager"
    with pytest.raises(ValueError, match="it computes in float32, bfloat16 and float16"):
        engines.choose("cpu", cpu, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_policy_equal_to_its_reference_has_no_penalty(dtype: torch.dtype) -> None:
    """Through every route: log-probs alone, frozen head, trained head, other chunks."""
    labels = torch.randint(0, 700, (6, 50))
    labels[:, :10] = -100
    hidden = torch.randn(6, 50, 40).to(dtype).requires_grad_()
    weight = (torch.randn(700, 40) * 0.3).to(dtype)
    with torch.no_grad():
        ref_logps = fused_logps(hidden, weight, labels, engine="cpu")
    for trained in (False, True):
        for workspace in (1, 1 << 20, None):
            weight.requires_grad_(trained)
            out = fused_preference_loss(
                hidden,
                weight,
                labels,
                loss=losses.get("dpop"),
                ref_logps=ref_logps,
                engine="cpu",
                workspace_bytes=workspace,
            )
            assert out.penalty is not None
            assert torch.equal(out.penalty, torch.zeros(3))
            assert torch.equal(out.margins, torch.zeros(3))


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(ValueError, match=r"instructions is 'mmx', expected one of \["):
        CPUEngine("mmx").logps(problem(4, torch.float32), ())
