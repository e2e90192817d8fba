"""``group=``: loss and every gradient are those of one process on the joined batch."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from fastdpop import fused_preference_loss, losses
from tests.batches import LOSSES
from tests.distributed.pool import Pool
from tests.distributed.worlds import World, assert_close, mean_over_ranks

SPLITS = {2: ((0, 1, 4), (0, 0, 4), (0, 2, 4)), 4: ((0, 1, 3, 3, 4),)}
"""Bounds of each rank's pairs; some have none."""


def _own(bounds: tuple[int, ...], rank: int) -> range:
    return range(bounds[rank], bounds[rank + 1])


def _every_loss(rank: int, names: list[str], trained: bool) -> None:
    size = dist.get_world_size()
    for bounds in SPLITS[size]:
        world = World.of(bounds[-1])
        own = _own(bounds, rank)
        for name in names:
            loss = LOSSES[name]
            reference = loss.traits.needs_reference
            whole, expected = world.run(loss, trained=trained, reference=reference)
            for reduction in ("mean", "sum"):
                part, found = world.pairs(own).run(
                    loss,
                    trained=trained,
                    reference=reference,
                    group=dist.group.WORLD,
                    reduction=reduction,
                )
                times = 1 if reduction == "mean" else bounds[-1]
                what = (name, trained, bounds, reduction, rank)
                assert_close(part.loss, whole.loss * times, what)
                rows = torch.tensor([*own, *(bounds[-1] + p for p in own)], dtype=torch.int64)
                assert_close(found[0], expected[0][rows] * size * times, what)
                for ours, theirs in zip(found[1:], expected[1:], strict=True):
                    assert_close(mean_over_ranks(ours), theirs * times, what)
                if part.losses.numel():
                    assert_close(part.losses, whole.losses[list(own)], what)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_every_loss(two: Pool, trained: bool) -> None:
    two.run(_every_loss, sorted(LOSSES), trained)


def test_four_processes(four: Pool) -> None:
    four.run(_every_loss, ["dpop", "aot", "kto", "bco shifted", "sum", "sft"], True)


def _summed(rank: int) -> None:
    """Frameworks that add gradients up instead of averaging them."""
    world = World.of(4, bias=True)
    for loss in (losses.get("dpop") + 0.3 * losses.get("sft"), losses.get("aot")):
        _, expected = world.run(loss)
        _, found = world.pairs(_own((0, 1, 4), rank)).run(
            loss, group=dist.group.WORLD, grad_reduction="sum"
        )
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            assert_close(mean_over_ranks(ours) * 2, theirs, loss)


def test_gradients_that_are_summed(two: Pool) -> None:
    two.run(_summed)


def _not_on_request(rank: int) -> None:
    """Without a group, each process computes by itself, and so do groups of one."""
    world = World.of(2).pairs([rank])
    alone = [dist.new_group([r]) for r in range(2)]
    by_itself, gradients = world.run("dpop")
    in_a_group_of_one, others = world.run("dpop", group=alone[rank])
    assert torch.equal(by_itself.loss, in_a_group_of_one.loss)
    assert all(map(torch.equal, gradients, others))
    together = torch.stack([torch.empty(()) for _ in range(2)])
    dist.all_gather(list(together.unbind()), by_itself.loss.detach())
    assert together[0] != together[1]


def test_not_without_a_request(two: Pool) -> None:
    two.run(_not_on_request)


def _masked(rank: int) -> None:
    """A rank whose tokens are all masked still has pairs, whose losses count."""
    world = World.of(3)
    world.labels[[2, 5]] = -100
    for name in ("dpop", "aot", "sft"):
        whole, expected = world.run(name)
        part, found = world.pairs(_own((0, 2, 3), rank)).run(name, group=dist.group.WORLD)
        assert_close(part.loss, whole.loss, name)
        assert_close(mean_over_ranks(found[1]), expected[1], name)


def test_a_rank_without_tokens(two: Pool) -> None:
    two.run(_masked)


@losses.pairwise
def needs_pairs(pairs: losses.PairLogps) -> torch.Tensor:
    """A user's loss that knows nothing of ranks without pairs."""
    assert pairs.chosen.detach().max() < torch.inf  # of none there is no largest
    return (pairs.rejected - pairs.chosen) / pairs.chosen_lengths.clamp(min=1)


def _without_pairs(rank: int) -> None:
    world, own = World.of(2), _own((0, 0, 2), rank)
    part, _ = world.pairs(own).run(needs_pairs, group=dist.group.WORLD)
    assert_close(part.loss, world.run(needs_pairs)[0].loss, rank)


def test_a_loss_that_needs_pairs(two: Pool) -> None:
    two.run(_without_pairs)


def _cancelling(rank: int) -> None:
    """Totals of ranks that nearly cancel are added up in float64."""
    world = World.of(2, dtype=torch.float64)
    logps = world.run("sft")[0].chosen_logps.detach()
    world.ref_logps = torch.cat([logps, logps])

    @losses.pairwise
    def loss(pairs: losses.PairLogps) -> torch.Tensor:
        sign = torch.where(pairs.ref_chosen == logps[0], 1.0, -1.0)
        return sign * (1e6 + pairs.chosen - pairs.chosen.detach())

    part, _ = world.pairs([rank]).run(loss, group=dist.group.WORLD)
    assert part.loss.item() == world.run(loss)[0].loss.item()


def test_totals_that_cancel(two: Pool) -> None:
    two.run(_cancelling)


def _equal(rank: int) -> None:
    """A policy equal to its reference: log-ratios of exactly 0, DPOP's hinge off."""
    world = World.of(4).pairs(_own((0, 1, 4), rank))
    out, _ = world.run("dpo", group=dist.group.WORLD)
    world.ref_logps = torch.cat([out.chosen_logps, out.rejected_logps]).detach()
    out, _ = world.run("dpop", group=dist.group.WORLD)
    assert float(out.loss.detach()) == pytest.approx(0.693147, abs=1e-6)
    assert not out.penalty.any()
    assert not out.margins.any()


def test_a_policy_equal_to_its_reference(two: Pool) -> None:
    two.run(_equal)


def learned(beta: torch.Tensor, pairs: losses.PairLogps) -> torch.Tensor:
    """A loss with a number of its own to learn; it compares pairs with each other."""
    margins = pairs.chosen_logratios - pairs.rejected_logratios
    return -torch.nn.functional.logsigmoid(beta * (margins - margins.mean()))


def _with_a_number_to_learn(rank: int) -> None:
    """Its gradient, too, is that of one process, however frameworks combine gradients."""
    size, world = dist.get_world_size(), World.of(4)
    whole = torch.tensor(0.3, requires_grad=True, dtype=torch.float64)
    _, expected = world.run(functools.partial(learned, whole))
    part = world.pairs(_own((0, 1, 4), rank))
    context = world.positions([slice(0, 5), slice(5, None)][rank])
    for reduction, factor in (("mean", 1.0), ("sum", float(size))):
        for argument, own in (("group", part), ("cp_group", context)):
            beta = torch.tensor(0.3, requires_grad=True, dtype=torch.float64)
            loss = functools.partial(learned, beta)
            _, found = own.run(loss, grad_reduction=reduction, **{argument: dist.group.WORLD})
            what = (reduction, argument)
            assert_close(mean_over_ranks(beta.grad) * factor, whole.grad, what)
            assert_close(mean_over_ranks(found[1]) * factor, expected[1], what)


def test_a_loss_with_a_number_to_learn(two: Pool) -> None:
    two.run(_with_a_number_to_learn)


def _compiled(rank: int) -> None:
    """A compiler may run it as it is; in one graph it is an error that says so."""
    world = World.of(4).pairs(_own((0, 1, 4), rank))
    expected, gradients = world.run("dpop", group=dist.group.WORLD)
    given = (world.hidden, world.weight, world.labels)
    options = {"ref_logps": world.ref_logps, "shift_labels": False, "group": dist.group.WORLD}

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return fused_preference_loss(*tensors, **options).loss * 2.0

    torch._dynamo.reset()
    assert_close(torch.compile(call, backend="eager")(*given), expected.loss * 2.0, rank)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        torch.compile(call, backend="eager", fullgraph=True)(*given)
    assert len(gradients) == 2


def test_in_compiled_functions(two: Pool) -> None:
    two.run(_compiled)
