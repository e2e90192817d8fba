"""A split vocabulary against one process with the whole: every route of every engine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.batches import HEADS
from tests.distributed.pool import Pool
from tests.distributed.shards import compare, problem

WORKSPACES = {
    "eager": (1 << 22, 70_000, 9_000),
    "cpu": (1 << 22, 9_000),
    "triton": (1 << 22, 9_000),
}
"""All rows of the problem, a few groups of them, less than a group."""
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Pool]:
    """Two processes in which Triton's kernels run in its interpreter."""
    pool, before = Pool(2), dict(os.environ)
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield pool
    pool.stop()


def _heads(
    rank: int, name: str, dtype: torch.dtype, heads: list[str], sizes: tuple[int, ...]
) -> None:
    """Each kind of lm_head: in one chunk, in several, and in pieces."""
    for head in heads:
        for workspace in WORKSPACES[name]:
            p = problem(
                sum(sizes), dtype, head=HEADS[head], bias=head != "plain", workspace=workspace
            )
            compare(p, sizes, name, BOUNDS[dtype])


@pytest.mark.parametrize("name", ["eager", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_two_processes(two: Pool, name: str, dtype: torch.dtype) -> None:
    if name == "cpu" and dtype == torch.float64:
        pytest.skip("it does not compute in float64")
    two.run(_heads, name, dtype, ["plain", "all"], (259, 258))


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_uneven_shards(two: Pool, four: Pool, name: str) -> None:
    for sizes in ((0, 517), (514, 3)):
        two.run(_heads, name, torch.float32, ["all"], sizes)
    for sizes in ((130, 129, 129, 129), (200, 0, 316, 1)):
        four.run(_heads, name, torch.float32, ["plain", "all"], sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton(interpreted: Pool, dtype: torch.dtype) -> None:
    interpreted.run(_heads, "triton", dtype, ["all"], (80, 21))
