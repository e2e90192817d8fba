"""A split vocabulary where it is not ordinary: rows, tokens and calls at the edge of what is legal."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdpop.distributed import collectives
from fastdpop.engines import STATISTICS, GroupLoss, NeedsGrad, RowValues
from fastdpop.engines.chunks import plan
from tests.batches import HEADS
from tests.distributed.pool import Pool
from tests.distributed.shards import (
    TRAINED,
    Whole,
    coefficients,
    compare,
    loss,
    nearly_certain,
    problem,
    shard,
    tokens,
    wanted,
)
from tests.engines.test_conformance import addmm_flop

LOCAL = ("eager", "cpu")
HALVES = (259, 258)


def _near_certainty(rank: int, name: str, dtype: torch.dtype) -> None:
    for nats in (20.0, 40.0, 60.0):
        p = nearly_certain(problem(dtype=dtype, groups=(0, 5, 12)), nats)
        compare(p, HALVES, name, 1e-13 if dtype == torch.float64 else 1e-6, as_one=True)
    unsure = -Whole.exact(p, coefficients(p)).logps
    assert 0 < unsure.max() < 1e-6


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("eager", torch.float64), ("eager", torch.float32), ("cpu", torch.bfloat16)],
)
def test_near_certainty_keeps_its_bits(two: Pool, name: str, dtype: torch.dtype) -> None:
    two.run(_near_certainty, name, dtype)


def _one_owner(rank: int, name: str) -> None:
    """All targets in the shard of one process; the others have no target of their own."""
    for owner in range(2):
        p = problem(groups=(0, 5, 12), bias=True)
        start, size = owner * HALVES[0], HALVES[owner]
        p.targets.remainder_(size).add_(start)
        compare(p, HALVES, name, 1e-6)


@pytest.mark.parametrize("name", LOCAL)
def test_all_targets_in_one_shard(two: Pool, name: str) -> None:
    two.run(_one_owner, name)


def _masked(rank: int, name: str) -> None:
    """A bias of -inf takes out half of a shard, and all of one: as if those rows were not there."""
    for gone in (slice(300, 517), slice(100, 517), slice(0, 259)):
        p = problem(groups=(0, 5, 12), bias=True)
        assert p.bias is not None
        p.bias[gone] = -torch.inf
        stays = (p.bias != -torch.inf).nonzero()[:, 0]
        p.targets.copy_(stays[p.targets % len(stays)])
        kept = dataclasses.replace(
            p,
            weight=p.weight[stays],
            bias=p.bias[stays],
            targets=torch.searchsorted(stays, p.targets),
        )
        c = coefficients(p)
        exact, own = Whole.exact(kept, c), tokens(HALVES)
        here = stays[(stays >= own.start) & (stays < own.stop)] - own.start
        there = torch.isin(stays, torch.arange(own.start, own.stop))
        engine, part = shard(p, HALVES, name)
        found = engine.logps_and_gradients(part, STATISTICS, loss(p, c), TRAINED)
        torch.testing.assert_close(found.logps.double(), exact.logps, rtol=1e-6, atol=1e-6)
        for line, want, statistic in zip(
            found.statistics, exact.statistics, STATISTICS, strict=True
        ):
            if statistic == "mean_logits":
                assert (line == -torch.inf).all()
            else:
                torch.testing.assert_close(line.double(), want, rtol=2e-6, atol=2e-6)
        later = engine.gradients(
            part,
            found.lse,
            loss(p, c).dlogp(0, len(p.groups) - 1, RowValues(*[found.logps] * 3)).float(),
            TRAINED,
        )
        for hidden, weight, bias in (found.gradients, later):
            assert hidden is not None
            assert weight is not None
            assert bias is not None
            whole = collectives.sum_(hidden.clone(), engine.group)
            for got, want in (
                (whole, exact.hidden),
                (weight[here], exact.weight[there]),
                (bias[here], exact.bias[there] if exact.bias is not None else None),
            ):
                assert want is not None
                off = (got.double() - want).abs()
                assert float(off.max()) <= 1e-6 * float(exact.weight.abs().max()) if len(off) else 1
            ruled_out = torch.ones(len(weight), dtype=torch.bool).index_fill_(0, here, False)
            assert not weight[ruled_out].any()
            assert not bias[ruled_out].any()


@pytest.mark.parametrize("name", LOCAL)
def test_tokens_that_are_ruled_out(two: Pool, name: str) -> None:
    two.run(_masked, name)


def _no_rows(rank: int, name: str) -> None:
    for groups in ((0, 0), (0,), (0, 0, 0)):
        p = problem(groups=groups)
        engine, part = shard(p, (517, 0), name)
        assert engine.logps(part, STATISTICS).statistics.shape == (len(STATISTICS), 0)
        asked = []

        def dlogp(first: int, last: int, values: RowValues, asked: list[Any] = asked) -> Tensor:
            asked.append((first, last))
            return values.logps.double()

        found = engine.logps_and_gradients(part, (), GroupLoss(dlogp), wanted(p))
        assert asked == [(chunk.first, chunk.last) for chunk in plan(p.groups, 1)]
        weight = found.gradients.weight
        assert weight is not None
        assert torch.equal(weight, torch.zeros_like(part.weight))


@pytest.mark.parametrize("name", LOCAL)
def test_no_rows(two: Pool, name: str) -> None:
    two.run(_no_rows, name)


def _needed(rank: int, name: str) -> None:
    """Every combination of gradients: those asked for, as with all of them."""
    p = problem(groups=(0, 5, 12), head=HEADS["all"], bias=True)
    engine, part = shard(p, HALVES, name)
    lse = engine.logps(part, ()).lse
    c = coefficients(p)
    found = engine.logps_and_gradients(part, (), loss(p, c), TRAINED).gradients
    later = engine.gradients(part, lse, c.float(), TRAINED)
    for needs in map(NeedsGrad._make, itertools.product((False, True), repeat=3)):
        for every, some in (
            (found, engine.logps_and_gradients(part, (), loss(p, c), needs).gradients),
            (later, engine.gradients(part, lse, c.float(), needs)),
        ):
            for needed, whole, own in zip(needs, every, some, strict=True):
                assert (own is not None) == needed
                if own is not None and whole is not None:
                    torch.testing.assert_close(own, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LOCAL)
def test_any_gradients(two: Pool, name: str) -> None:
    two.run(_needed, name)


def _poisoned(rank: int, name: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        for sizes in (HALVES, (0, 517)):
            p = problem(groups=(0, 5, 12), head=HEADS["all"], bias=True, workspace=20_000)
            compare(p, sizes, name, 1e-6)
    finally:
        torch.use_deterministic_algorithms(False)
    p = problem(groups=(0, 5, 12))
    engine, part = shard(p, HALVES, name)
    want = engine.logps(part, STATISTICS)
    p.hidden[2, 5] = torch.nan
    got = engine.logps(part, STATISTICS)
    assert got.logps.isnan().nonzero().tolist() == [[2]]
    assert torch.equal(got.logps[3:], want.logps[3:])
    assert torch.equal(got.statistics[:, 3:], want.statistics[:, 3:])


@pytest.mark.parametrize("name", LOCAL)
def test_nan_stays_where_it_is(two: Pool, name: str) -> None:
    """Memory that nobody wrote is not read, and a NaN spoils its own row alone."""
    two.run(_poisoned, name)


def _ties(rank: int, name: str) -> None:
    """The same row of weights in both shards: the likeliest token is either."""
    p = problem(groups=(0, 12))
    p.hidden.mul_(4).round_()  # whole numbers, so that no order of additions tells them apart
    p.weight.mul_(16).round_().mul_(1 / 64)
    best = (p.hidden @ p.weight.T).argmax(1)
    p.weight[300:312] = p.weight[best]
    p.targets.copy_(torch.where(torch.arange(12) % 2 == 0, best, torch.arange(300, 312)))
    p.targets[3] = 7
    compare(p, HALVES, name, 1e-6)
    engine, part = shard(p, HALVES, name)
    accuracy = engine.logps(part, ("token_accuracy",)).statistics[0]
    assert accuracy.tolist() == [float(row != 3) for row in range(12)]
    p.weight[300:312] = 0.0
    z = p.hidden @ p.weight.T
    for own in (slice(0, 259), slice(259, 517)):  # the likeliest of its own shard is not enough
        p.targets.copy_(z[:, own].argmax(1) + own.start)
        accuracy = engine.logps(part, ("token_accuracy",)).statistics[0]
        assert torch.equal(accuracy, (z[:, own].amax(1) >= z.amax(1)).float())
        assert 0 < accuracy.mean() < 1


@pytest.mark.parametrize("name", LOCAL)
def test_ties_across_shards_are_accurate(two: Pool, name: str) -> None:
    two.run(_ties, name)


def _costs(rank: int) -> None:
    """3 products for a trained lm_head, as in one process; nothing is exchanged that has a
    vocabulary's size, and once per chunk.
    """
    p = problem(groups=(0, 9, 21, 30, 43), workspace=70_000)
    engine, part = shard(p, HALVES, "eager")
    chunks = plan(p.groups, engine.chunk_rows(part, (), TRAINED))
    assert 1 < len(chunks) < 4
    sent: list[int] = []
    gather = dist.all_gather

    def recorded(found: list[Tensor], own: Tensor, **options: Any) -> Any:
        sent.append(own.numel())
        return gather(found, own, **options)

    c, trained = coefficients(p), NeedsGrad(True, True, False)
    unit = 2 * len(p.targets) * part.weight.numel()

    def products(call: Any) -> float:
        sent.clear()
        in_place = {torch.ops.aten.addmm_: addmm_flop}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            call()
        return counter.get_total_flops() / unit

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an exchange that nobody counts")

    before = dist.all_reduce
    dist.all_gather, dist.all_reduce = recorded, never
    try:
        assert products(lambda: engine.logps_and_gradients(part, (), loss(p, c), trained)) == 3
        rows = [chunk.rows.stop - chunk.rows.start for chunk in chunks]
        assert sent[1:] == [2 * n for n in rows]
        assert sent[0] < 10
        lse = engine.logps(part, ()).lse
        assert products(lambda: engine.logps(part, ("entropy",))) == 1
        assert sent[1:] == [3 * 43]
        assert products(lambda: engine.logps_and_dlogp_dhidden(part, ())) == 2
        assert sent[1:] == [2 * 43]
        assert products(lambda: engine.gradients(part, lse, c.float(), trained)) == 3
        assert sent == [43]
        everything = dataclasses.replace(part, workspace_bytes=9_000)
        assert (
            products(lambda: engine.logps_and_gradients(everything, (), loss(p, c), trained)) == 4
        )
    finally:
        dist.all_gather, dist.all_reduce = gather, before


def test_what_it_costs(two: Pool) -> None:
    two.run(_costs)


def _agreed(rank: int) -> None:
    """A caller's own limit counts, and the least of all processes'."""
    p = problem(groups=(*range(44),), workspace=40_000)
    engine, part = shard(p, (500, 17), "eager")
    alone = [engine.inner.chunk_rows(part, (), TRAINED)]
    everyone = [n for (n,) in collectives.every(alone, engine.group, torch.device("cpu"))]
    assert everyone[0] < everyone[1]
    assert engine.chunk_rows(part, (), TRAINED) == everyone[0]
    limited = dataclasses.replace(part, chunk_rows=rank + 3)
    assert engine.chunk_rows(limited, (), TRAINED) == 3


def test_all_processes_go_through_the_same_chunks(two: Pool) -> None:
    two.run(_agreed)


def _disagreed(rank: int) -> None:
    p = problem(groups=(0, 4, 9))
    engine, part = shard(p, HALVES, "eager")
    fewer = dataclasses.replace(part, hidden=p.hidden[:8], targets=p.targets[:8], groups=[0, 4, 8])
    with pytest.raises(ValueError, match="hidden has 9, 8 scored tokens on the ranks of tp_group"):
        engine.logps(fewer if rank else part, ())
    grouped = dataclasses.replace(part, groups=[0, 5, 9])
    for other, statistics in ((grouped, ()), (part, ("entropy",))):
        with pytest.raises(ValueError, match="tp_group make different calls"):
            engine.logps(other if rank else part, statistics if rank else ())
    with pytest.raises(ValueError, match="tp_group make different calls"):
        (engine.logps if rank else engine.logps_and_dlogp_dhidden)(part, ())
    part = dataclasses.replace(part, weight=part.weight[1 - rank :])
    with pytest.raises(ValueError, match=r"weight has 258, 258 rows .* tokens 0, 259 on, of 517"):
        engine.logps(part, ())


def test_what_processes_must_agree_on(two: Pool) -> None:
    """Every process gets the error, and none waits for another."""
    two.run(_disagreed)


def _spread(rank: int) -> None:
    """Shards whose log-sum-exps are far apart: neither overflows, nor is the far one lost."""
    p = problem(groups=(0, 12), scale=40.0)
    p.weight[259:] *= 0.1
    compare(p, HALVES, "eager", 1e-6, as_one=True)
    engine, part = shard(p, HALVES, "eager")
    lse = collectives.every([int(engine.logps(part, ()).lse.max())], engine.group, p.hidden.device)
    assert math.fabs(lse[0][0] - lse[1][0]) > 50


def test_shards_far_apart(two: Pool) -> None:
    two.run(_spread)


def _speaks(rank: int) -> None:
    engine, _ = shard(problem(), HALVES, "cpu")
    cpu = torch.device("cpu")
    assert engine.name == "cpu"
    assert engine.automatic(cpu)
    assert engine.unavailable(cpu, torch.float32) is None
    assert "not in torch.float64" in (engine.unavailable(cpu, torch.float64) or "")
    assert engine.describe().endswith(", the vocabulary split over 2 processes")


def test_it_speaks_for_the_engine_within(two: Pool) -> None:
    two.run(_speaks)
