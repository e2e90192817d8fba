"""The plan of chunks that all engines follow."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdpop.engines import Engine, GroupLoss, NeedsGrad, Problem, RowValues
from fastdpop.engines.chunks import pieces_of, plan, rows_that_fit
from fastdpop.engines.cpu import CPUEngine, instruction_sets
from fastdpop.engines.cpu_library import Library
from fastdpop.engines.eager import EagerEngine
from fastdpop.engines.triton import TritonEngine
from fastdpop.transform import LogitTransform

TRAINED = NeedsGrad(True, True, False)
ENGINES: list[Engine] = [EagerEngine(), *map(CPUEngine, instruction_sets()[:1])]
if TritonEngine().unavailable(torch.device("cpu"), torch.float32) is None:
    ENGINES.append(TritonEngine())


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12))
def test_whole_groups_in_order_and_as_many_as_fit(sizes: list[int], limit: int) -> None:
    groups = [0, *itertools.accumulate(sizes)]
    chunks = plan(groups, limit)
    assert [g for chunk in chunks for g in range(chunk.first, chunk.last)] == [*range(len(sizes))]
    for chunk in chunks:
        rows = range(groups[chunk.first], groups[chunk.last])
        assert (chunk.rows.start, chunk.rows.stop) == (rows.start, rows.stop)
        assert [row for p in chunk.pieces for row in range(p.start, p.stop)] == [*rows]
        assert all(0 < p.stop - p.start <= limit for p in chunk.pieces)
        assert len(rows) <= limit or chunk.last == chunk.first + 1, "a larger group by itself"
        assert chunk.whole == (0 < len(rows) <= limit)
    for one, two in itertools.pairwise(chunks):
        following = groups[two.first + 1] - groups[one.first]
        assert following > limit, "the next group would have fitted"


def test_groups_may_count_less_than_their_rows() -> None:
    (one,) = plan([0, 60, 100], 64, sizes=[40, 24])
    assert one.whole
    assert one.pieces == (slice(0, 100),)
    first, second = plan([0, 60, 100], 63, sizes=[40, 24])
    assert first.whole
    assert (second.first, second.last) == (1, 2)


def test_rows_that_fit() -> None:
    assert rows_that_fit(1000, 10) == 100
    assert rows_that_fit(1000, 10, multiple=64) == 64
    assert rows_that_fit(500, 10, multiple=64) == 50
    assert rows_that_fit(1, 10, multiple=64) == 1
    assert pieces_of(slice(3, 10), 3) == (slice(3, 6), slice(6, 9), slice(9, 10))
    assert pieces_of(slice(3, 3), 3) == ()


def problem(groups: list[int], dtype: torch.dtype = torch.float32, **changes: object) -> Problem:
    rows = groups[-1]
    made = Problem(
        hidden=torch.randn(rows, 24).to(dtype),
        weight=torch.randn(301, 24).to(dtype) * 0.3,
        bias=None,
        targets=torch.randint(0, 301, (rows,)),
        groups=groups,
        transform=LogitTransform(),
        compute_dtype=dtype,
        workspace_bytes=1 << 20,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def chunks_of(engine: Engine, p: Problem, c: Tensor) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """The groups of every chunk in which the engine asked for derivatives, and its gradients."""
    asked: list[tuple[int, int]] = []

    def dlogp(first: int, last: int, values: RowValues) -> Tensor:
        asked.append((first, last))
        return c[p.groups[first] : p.groups[last]]

    found = engine.logps_and_gradients(p, (), GroupLoss(dlogp), TRAINED)
    return asked, [found.logps, *(g for g in found.gradients if g is not None)]


@pytest.mark.parametrize("agreed", [1, 7, 20, 1_000])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_processes_can_agree_on_their_chunks(engine: Engine, agreed: int) -> None:
    """Whatever an engine would choose: so all of them go through as many."""
    p = problem([0, 5, 11, 11, 30, 41])
    c = torch.randn(41)
    assert engine.chunk_rows(p, (), TRAINED) > 0
    together = dataclasses.replace(p, chunk_rows=agreed)
    asked, found = chunks_of(engine, together, c)
    assert asked == [(chunk.first, chunk.last) for chunk in plan(p.groups, agreed)]
    assert torch.equal(found[0], engine.logps(together, ()).logps), "every route, bit for bit"
    _, own = chunks_of(engine, p, c)
    for a, b in zip(found, own, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-6 * float(b.abs().max()))


@pytest.mark.skipif(not instruction_sets(), reason="fastdpop was installed without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_groups_pass_the_weights_gradient_together(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where no softmax is kept, too: each pass reads and writes all of dWeight."""
    passes = []
    backward = Library.backward

    def counted(self: Library, problem: object) -> None:
        passes.append(problem)
        backward(self, problem)  # type: ignore[arg-type]

    monkeypatch.setattr(Library, "backward", counted)
    groups = [*range(0, 1_001, 5)]
    asked, found = chunks_of(CPUEngine(), problem(groups, dtype), torch.randn(1_000))
    assert len(asked) == len(passes) <= 2
    assert all(one.isfinite().all() for one in found)
