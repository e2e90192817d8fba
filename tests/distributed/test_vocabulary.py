"""A split vocabulary against one process with the whole: every route of every engine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.batches import HEADS
from tests.distributed.pool import Pool
from tests.distributed.shards import compare, problem

SMALL = 9_000
"""A workspace of a few rows: groups go through in pieces."""
SPLITS = {2: [(259, 258), (0, 517), (3, 514)], 4: [(130, 129, 129, 129), (200, 0, 316, 1)]}
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


def _heads(rank: int, name: str, dtype: torch.dtype, heads: list[str]) -> None:
    """Each kind of lm_head, over each split: whole chunks, several of them, and in pieces."""
    for sizes in SPLITS[torch.distributed.get_world_size()]:
        for head in heads:
            for workspace in (1 << 22, 40_000, SMALL):
                p = problem(
                    dtype=dtype, head=HEADS[head], bias=head != "plain", workspace=workspace
                )
                compare(p, sizes, name, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain_torch(two: Pool, four: Pool, dtype: torch.dtype) -> None:
    for pool in (two, four):
        pool.run(_heads, "eager", dtype, ["plain", "all"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_for_cpus(two: Pool, four: Pool, dtype: torch.dtype) -> None:
    for pool in (two, four):
        pool.run(_heads, "cpu", dtype, ["plain", "all"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_for_gpus(interpreted: Pool, dtype: torch.dtype) -> None:
    interpreted.run(_heads, "triton", dtype, ["all"])
