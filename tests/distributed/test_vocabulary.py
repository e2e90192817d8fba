"""A split vocabulary against one process with the whole: every route of every engine."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch

from fastdpop.engines import GroupLoss, NeedsGrad, PairLossPlan
from tests.batches import HEADS
from tests.distributed.pool import Pool
from tests.distributed.shards import (
    Whole,
    coefficients,
    compare,
    loss,
    nearly_certain,
    problem,
    shard,
)

WORKSPACES = {"eager": (1 << 22, 70_000, 9_000), "cpu": (1 << 22, 9_000)}
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
    for head, workspace in itertools.product(heads, WORKSPACES[name]):
        p = problem(sum(sizes), dtype, head=HEADS[head], bias=head != "plain", workspace=workspace)
        compare(p, sizes, name, BOUNDS[dtype])


def _interpreted(rank: int, dtype: torch.dtype, workspace: int) -> None:
    p = problem(
        81, dtype, groups=(0, 3, 3, 8, 14), head=HEADS["all"], bias=True, workspace=workspace
    )
    compare(p, (60, 21), "triton", BOUNDS[dtype])


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


@pytest.mark.parametrize(
    ("dtype", "workspace"),
    [
        (torch.float32, 1 << 22),
        (torch.float32, 2_500),
        (torch.bfloat16, 2_500),
        (torch.float16, 1 << 22),
    ],
)
def test_triton(interpreted: Pool, dtype: torch.dtype, workspace: int) -> None:
    interpreted.run(_interpreted, dtype, workspace)


def _near_certainty(rank: int) -> None:
    """1 - p down to 1e-10: gradients that come from nothing else, to float32's precision."""
    p = nearly_certain(problem(81, groups=(0, 3, 3, 8, 14)), 60.0)
    unsure = -Whole.exact(p, coefficients(p)).logps
    assert unsure.min() < 1e-10
    assert unsure.median() < 1e-7
    compare(p, (60, 21), "triton", 1e-6, as_one=True)


def test_triton_near_certainty(interpreted: Pool) -> None:
    interpreted.run(_near_certainty)


def _with_a_kernel(rank: int) -> None:
    """A loss that has a kernel is called all the same: the kernel would see local log-probs."""
    p = problem(81, groups=(0, 3, 8))
    engine, part = shard(p, (60, 21), "triton")
    plain = loss(p, coefficients(p))
    pairs = PairLossPlan(
        offsets=torch.tensor([0, 1, 3, 5, 8]),
        order=torch.arange(2),
        ref_logps=torch.zeros(2, 2, dtype=torch.float64),
        rounded=False,
        loss="DPOP",
        options={"form": "inside", "beta": 0.3, "lam": 50.0, "label_smoothing": 0.0},
        share=0.5,
    )
    needs = NeedsGrad(True, True, False)
    want = engine.logps_and_gradients(part, (), plain, needs)
    found = engine.logps_and_gradients(part, (), GroupLoss(plain.dlogp, pairs), needs)
    assert found.losses is None
    for a, b in zip(found.gradients[:2], want.gradients[:2], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_triton_leaves_its_loss_kernels_alone(interpreted: Pool) -> None:
    interpreted.run(_with_a_kernel)
