"""What every engine owes, checked on every engine that can run here.

Errors are bounded by PyTorch's own on the same inputs: logits and log-softmax in float32, gradients
by autograd.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdpop import naive
from fastdpop.engines import STATISTICS, Engine, GroupLoss, NeedsGrad, Problem, RowValues
from fastdpop.engines.cpu import CPUEngine, instruction_sets
from fastdpop.engines.eager import EagerEngine
from fastdpop.engines.triton import TritonEngine
from fastdpop.transform import LogitTransform
from tests.batches import HEADS, assert_as_exact_as_torch

ALL = NeedsGrad(True, True, True)
TINY = 1
"""A workspace of one byte: one row and one token at a time."""


ENGINES: dict[str, Engine] = {"eager": EagerEngine()}
ENGINES |= {f"cpu-{name}": CPUEngine(name) for name in instruction_sets()}
if TritonEngine().unavailable(torch.device("cpu"), torch.float32) is None:
    # Under TRITON_INTERPRET=1 (`make test` runs the suite a second time): the others had their turn.
    ENGINES = {"triton": TritonEngine()}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


def skip_unless_supported(engine: Engine, dtype: torch.dtype) -> None:
    reason = engine.unavailable(torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(reason)


def problem(
    dtype: torch.dtype = torch.float32,
    *,
    groups: tuple[int, ...] = (0, 3, 3, 10, 14),
    width: int = 24,
    vocabulary: int = 53,
    head: LogitTransform | None = None,
    bias: bool = True,
    workspace: int = 1 << 20,
    scale: float = 1.0,
) -> Problem:
    rows = groups[-1]
    return Problem(
        hidden=(torch.randn(rows, width) * scale).to(dtype),
        weight=torch.randn(vocabulary, width).to(dtype) * 0.3,
        bias=torch.randn(vocabulary).to(dtype) if bias else None,
        targets=torch.randint(0, vocabulary, (rows,)),
        groups=list(groups),
        transform=head or LogitTransform(),
        compute_dtype=dtype,
        workspace_bytes=workspace,
    )


def autograd(
    p: Problem, c: Tensor, dtype: torch.dtype, *, define: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Log-probs and gradients of ``sum(c * logps)`` by PyTorch in a dtype, or by the definition."""
    leaves = [
        t.to(dtype, copy=True).requires_grad_()
        for t in (p.hidden, p.weight, p.bias)
        if t is not None
    ]
    hidden, weight, *bias = leaves
    if define:
        logps = naive.token_logps(hidden, weight, p.targets, bias[0] if bias else None, p.transform)
    else:
        logits = F.linear(hidden, weight, bias[0] if bias else None) * p.transform.logit_scale
        if p.transform.softcap is not None:
            logits = p.transform.softcap * torch.tanh(logits / p.transform.softcap)
        logps = -F.cross_entropy(logits / p.transform.temperature, p.targets, reduction="none")
    return logps.detach(), list(torch.autograd.grad((c.to(dtype) * logps).sum(), leaves))


def rounded_gradients(p: Problem, c: Tensor, *, by_hidden: bool = False) -> list[Tensor]:
    """Gradients by 16-bit products of float32 sums, operands rounded once: the gradient of the
    logits with its coefficient; or, for dWeight `by_hidden`, without it, and the hidden states with
    it.
    """
    logits = p.hidden.float() @ p.weight.float().T + (0.0 if p.bias is None else p.bias.float())
    z = p.transform.transform_(logits)
    g = torch.zeros_like(z).scatter_(1, p.targets[:, None], 1.0) - z.softmax(1)
    direction = p.transform.scale_by_slope_(g.clone(), z).to(p.hidden.dtype).float()
    scaled = p.transform.scale_by_slope_(g * c[:, None].float(), z).to(p.hidden.dtype).float()
    hidden = (direction @ p.weight.float()) * c[:, None].float()
    weight = scaled.T @ p.hidden.float()
    if by_hidden:
        weight = direction.T @ (c[:, None].float() * p.hidden.float()).to(p.hidden.dtype).float()
    return [hidden, weight, *([] if p.bias is None else [scaled.sum(0)])]


def compare(engine: Engine, p: Problem) -> None:
    c = torch.randn(len(p.targets), dtype=torch.float64)
    exact, gradients = autograd(p, c, torch.float64, define=True)
    plain = torch.float64 if p.result_dtype == torch.float64 else torch.float32
    torchs, torch_gradients = autograd(p, c, plain)
    if p.compute_dtype in (torch.bfloat16, torch.float16) and engine.name != "eager":
        torch_gradients = rounded_gradients(p, c, by_hidden=isinstance(engine, TritonEngine))
    own_c = c.to(p.result_dtype)

    def coefficients(first: int, last: int, values: RowValues) -> Tensor:
        assert values.logps.isfinite().all()
        assert torch.equal(values.lse, result.lse[p.groups[first] : p.groups[last]])
        return own_c[p.groups[first] : p.groups[last]]

    result = engine.logps(p, ())
    assert result.logps.dtype == p.result_dtype
    assert_as_exact_as_torch(result.logps, exact, torchs)
    again = engine.logps_and_dlogp_dhidden(p, ())
    direction = again.dlogp_dhidden
    assert torch.equal(again.logps, result.logps), "every route gives the same bits"
    assert direction.dtype == p.hidden.dtype
    assert_as_exact_as_torch(
        direction * c[:, None].to(direction.dtype), gradients[0], torch_gradients[0]
    )

    wanted = NeedsGrad(True, True, p.bias is not None)
    one_pass = engine.logps_and_gradients(p, (), GroupLoss(coefficients), wanted)
    found = one_pass.gradients
    assert torch.equal(one_pass.logps, result.logps)
    two_pass = engine.gradients(p, result.lse, own_c, wanted)
    for name, one, two, want, torchs_own in zip(
        wanted._fields, found, two_pass, gradients, torch_gradients, strict=False
    ):
        assert one is not None, name
        assert two is not None, name
        assert one.dtype == p.result_dtype
        assert_as_exact_as_torch(one, want, torchs_own)
        assert_as_exact_as_torch(two, want, torchs_own)


@pytest.mark.parametrize("workspace", [3000, 1 << 20])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_log_probs_and_gradients(
    engine: Engine, dtype: torch.dtype, head: str, workspace: int
) -> None:
    skip_unless_supported(engine, dtype)
    compare(engine, problem(dtype, head=HEADS[head], workspace=workspace))


def test_the_smallest_workspace(engine: Engine) -> None:
    compare(engine, problem(groups=(0, 2, 5), workspace=TINY, head=HEADS["all"]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (33, 65), (8, 64)])
@pytest.mark.parametrize("groups", [(0, 1), (0, 0), (0, 0, 2, 2), (0, 17), (0, 5, 9, 16, 31)])
def test_ragged_shapes(engine: Engine, groups: tuple[int, ...], shape: tuple[int, int]) -> None:
    width, vocabulary = shape
    p = problem(groups=groups, width=width, vocabulary=vocabulary, bias=False, workspace=4000)
    if groups[-1]:
        compare(engine, p)
    else:
        result = engine.logps_and_gradients(
            p, (), GroupLoss(lambda *_: torch.zeros(0)), NeedsGrad(True, True, False)
        )
        found = result.gradients
        assert result.logps.shape == (0,)
        assert found.weight is not None
        assert torch.equal(found.weight, torch.zeros_like(p.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_stay_finite_and_exact(engine: Engine, dtype: torch.dtype) -> None:
    p = problem(dtype, scale=3e3)
    assert (p.hidden.double() @ p.weight.double().T).abs().max() > 1e4
    compare(engine, p)


def test_masked_vocabulary(engine: Engine) -> None:
    """A bias of -inf takes tokens out, even a whole tile of them."""
    p = problem(workspace=3000)
    assert p.bias is not None
    p.bias[20:] = -torch.inf
    p.targets.remainder_(20)
    kept = dataclasses.replace(p, weight=p.weight[:20], bias=p.bias[:20])
    result = engine.logps(p, ("entropy", "token_accuracy", "aligned_logps"))
    want = engine.logps(kept, ("entropy", "token_accuracy", "aligned_logps"))
    torch.testing.assert_close(result.logps, want.logps, rtol=0, atol=2e-6)
    torch.testing.assert_close(result.statistics, want.statistics, rtol=0, atol=4e-6)
    found = engine.gradients(p, result.lse, torch.ones(len(p.targets)), ALL)
    assert found.weight is not None
    assert torch.equal(found.weight[20:], torch.zeros(33, 24))


@pytest.mark.parametrize("statistics", [(), STATISTICS])
def test_its_own_number_of_rows_fits(engine: Engine, statistics: tuple[str, ...]) -> None:
    """Processes agree on the least of what their engines say of the same call."""
    p = problem(torch.bfloat16, groups=(*range(61),), workspace=30_000)
    rows = engine.chunk_rows(p, statistics, ALL)
    agreed, c = dataclasses.replace(p, chunk_rows=rows), torch.randn(60)
    loss = GroupLoss(lambda first, last, values: c[first:last])
    want = engine.logps_and_gradients(p, statistics, loss, ALL)
    found = engine.logps_and_gradients(agreed, statistics, loss, ALL)
    assert torch.equal(found.logps, want.logps)
    assert torch.equal(found.statistics, want.statistics)


@pytest.mark.parametrize("workspace", [TINY, 1 << 20])
def test_statistics(engine: Engine, workspace: int) -> None:
    p = problem(head=HEADS["all"], workspace=workspace)
    z = p.hidden.double() @ p.weight.double().T
    assert p.bias is not None
    z = p.transform.transform_(z + p.bias.double())
    logp = z.log_softmax(1)
    p.targets[::3] = z.argmax(1)[::3]
    want = {
        "entropy": -(logp.exp() * logp).sum(1),
        "mean_logits": z.mean(1),
        "token_accuracy": (z.argmax(1) == p.targets).double(),
        "aligned_logps": logp.gather(1, p.targets[:, None]).squeeze(1) - (2 * logp).logsumexp(1),
        "max_logit": z.amax(1),
    }
    assert set(want) == set(STATISTICS)
    found = engine.logps(p, STATISTICS).statistics
    for line, name in zip(found, STATISTICS, strict=True):
        torch.testing.assert_close(line.double(), want[name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_runs_are_bitwise_equal(engine: Engine, dtype: torch.dtype) -> None:
    p = problem(dtype, groups=(0, 40, 90), width=64, vocabulary=301, workspace=200_000)
    c = torch.randn(90)

    def run() -> list[Tensor]:
        result = engine.logps_and_gradients(
            p, STATISTICS, GroupLoss(lambda a, b, *_: c[p.groups[a] : p.groups[b]]), ALL
        )
        found = result.gradients
        return [result.logps, result.lse, result.statistics, *(g for g in found if g is not None)]

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_poisoned_memory_does_not_show(engine: Engine) -> None:
    """`torch.empty` filled with NaN: nothing unwritten is read."""
    p = problem()
    want = engine.logps_and_dlogp_dhidden(p, STATISTICS)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        got = engine.logps_and_dlogp_dhidden(p, STATISTICS)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("logps", "lse", "statistics", "dlogp_dhidden"):
        assert torch.equal(getattr(want, name), getattr(got, name))


def test_nan_hidden_gives_nan_for_its_row_only(engine: Engine) -> None:
    p = problem()
    want = engine.logps(p, ()).logps
    p.hidden[2, 5] = torch.nan
    got = engine.logps(p, ()).logps
    assert got.isnan().nonzero().tolist() == [[2]]
    assert torch.equal(got[3:], want[3:])


def test_sixteen_bit_inputs_never_meet_sixteen_bit_logits(engine: Engine) -> None:
    """Issue 2's criterion: sequence log-probs within 1e-4 of float64 where a path through bf16
    logits is not.
    """
    small = engine.name == "triton"  # in the interpreter
    p = problem(
        torch.bfloat16,
        groups=(0, 20 if small else 200),
        width=576,
        vocabulary=499 if small else 4999,
        bias=False,
        scale=4.0,
    )
    exact = naive.token_logps(p.hidden, p.weight, p.targets)
    ours = engine.logps(p, ()).logps
    rounded = (
        torch.log_softmax((p.hidden @ p.weight.T).float(), 1)
        .gather(1, p.targets[:, None])
        .squeeze(1)
    )
    worst = lambda logps: ((logps.double() - exact) / exact).abs().max()  # noqa: E731
    assert worst(ours) < 1e-5
    assert worst(rounded) > 1e-4, "the case is too easy to tell the two apart"
    assert ((ours.double().sum() - exact.sum()) / exact.sum()).abs() < 1e-6


def addmm_flop(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    """Operations of ``total += a @ b``, which the counter does not know in its in-place form."""
    return 2 * a[0] * a[1] * b[1]


def matrix_products(p: Problem, run: object) -> float:
    """Floating-point operations of the matrix products in `run`, in units of 2 * N * V * H."""
    in_place = {torch.ops.aten.addmm_: addmm_flop}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        assert callable(run)
        run()
    rows, width = p.hidden.shape
    return counter.get_total_flops() / (2 * rows * p.weight.shape[0] * width)


def test_cost_in_matrix_products(engine: Engine) -> None:
    """1 without gradients, 2 frozen, 3 trained by whole pairs, 4 for a pair beyond the workspace or
    a second pass.
    """
    if engine.name != "eager":
        pytest.skip("FlopCounterMode sees the products of plain torch only")
    fits = problem(groups=(0, 10, 20, 30))
    beyond = dataclasses.replace(fits, workspace_bytes=TINY)
    c = torch.ones(30)

    def of_chunk(first: int, last: int, values: RowValues) -> Tensor:
        return c[fits.groups[first] : fits.groups[last]]

    lse = engine.logps(fits, ()).lse
    trained, frozen = NeedsGrad(True, True, False), NeedsGrad(True, False, False)
    assert matrix_products(fits, lambda: engine.logps(fits, ())) == 1
    assert matrix_products(fits, lambda: engine.logps_and_dlogp_dhidden(fits, ())) == 2
    assert matrix_products(beyond, lambda: engine.logps_and_dlogp_dhidden(beyond, ())) == 2
    assert (
        matrix_products(
            fits, lambda: engine.logps_and_gradients(fits, (), GroupLoss(of_chunk), trained)
        )
        == 3
    )
    assert (
        matrix_products(
            beyond, lambda: engine.logps_and_gradients(beyond, (), GroupLoss(of_chunk), trained)
        )
        == 4
    )
    assert matrix_products(fits, lambda: engine.gradients(fits, lse, c, trained)) == 3
    assert matrix_products(fits, lambda: engine.gradients(fits, lse, c, frozen)) == 2


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(engine: Engine, default: torch.dtype) -> None:
    p, loss = problem(), GroupLoss(lambda first, last, values: torch.ones_like(values.logps))

    def run() -> list[Tensor]:
        found = engine.logps_and_gradients(p, STATISTICS, loss, ALL)
        derivative = engine.logps_and_dlogp_dhidden(p, ()).dlogp_dhidden
        assert derivative is not None
        again = engine.gradients(
            p, found.lse, torch.ones(len(p.targets), dtype=p.result_dtype), ALL
        )
        results = (found.logps, found.lse, found.statistics, derivative, *found.gradients, *again)
        return [one for one in results if one is not None]

    want, before = run(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = run()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
