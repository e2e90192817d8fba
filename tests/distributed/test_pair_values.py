"""Values of pairs and the monitor's numbers with several processes: those of one process on the joined batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastdpop.losses import PairLogps
from tests.batches import LOSSES
from tests.displacing import NAMES
from tests.distributed.pool import Pool
from tests.distributed.worlds import LENGTH, VOCABULARY, World, assert_close, mean_over_ranks

WEIGHTS = torch.tensor([0.5, 3.0, 0.0, 1.25], dtype=torch.float64)
LISTS = torch.tensor([7, 7, 2**53, 7])
BOUNDS = ((0, 1, 4), (0, 0, 4), (0, 2, 4))
ASKED = {"statistics": ("displacement",)}


def compared(pairs: PairLogps) -> Tensor:
    """A loss that couples the pairs of a list, whose values are called as a field is."""
    differences = pairs.chosen - pairs.rejected - pairs.values["chosen"]
    together = pairs.values["list"][:, None] == pairs.values["list"]
    means = (together * differences).sum(1) / together.sum(1)
    return F.softplus(-(differences - 0.5 * means))


def _values(names: bool, own: range) -> dict[str, Tensor]:
    at = list(own)
    given = {"weight": WEIGHTS[at]}
    # In another order on each rank: names decide, not places.
    return {"list": LISTS[at], "chosen": WEIGHTS[at] + 1, **given} if names else given


def _joined(rank: int, trained: bool) -> None:
    group = dist.group.WORLD
    for bounds in BOUNDS:
        world = World.of(4)
        own = range(bounds[rank], bounds[rank + 1])
        for loss in ("dpop", "aot", LOSSES["wpo"], "kto", compared):
            names = loss is compared
            whole, expected = world.run(
                loss, trained=trained, pair_values=_values(names, range(4)), **ASKED
            )
            values = _values(names, own)
            if rank:
                values = dict(reversed(values.items()))
            part, found = world.pairs(own).run(
                loss, trained=trained, group=group, pair_values=values, **ASKED
            )
            what = (loss, trained, bounds, rank)
            assert_close(part.loss, whole.loss, what)
            if len(own):
                assert_close(part.losses, whole.losses[list(own)], what)
            rows = torch.tensor([*own, *(4 + p for p in own)], dtype=torch.int64)
            assert_close(found[0], expected[0][rows] * 2, what)
            for ours, theirs in zip(found[1:], expected[1:], strict=True):
                assert_close(mean_over_ranks(ours), theirs, what)
            for name in NAMES:
                of_part, of_whole = getattr(part, name), getattr(whole, name)
                assert of_part.dtype == of_whole.dtype
                assert torch.equal(of_part, of_whole[list(own)]), (*what, name)
        assert whole.differs.any()


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_pairs_of_several_ranks(two: Pool, trained: bool) -> None:
    two.run(_joined, trained)


def _weighted_by_hand(rank: int) -> None:
    """What is equal above is right."""
    world = World.of(4)
    plain, out = (world.run("dpop", pair_values=v)[0] for v in (None, {"weight": WEIGHTS}))
    assert_close(out.loss, (plain.losses.double() * WEIGHTS).mean(), rank)


def test_of_one_rank(two: Pool) -> None:
    two.run(_weighted_by_hand)


def _vocabulary(rank: int) -> None:
    world, own = World.of(4, bias=True), slice(27 * rank, 27 + (VOCABULARY - 27) * rank)
    given: dict[str, Any] = {**ASKED, "pair_values": {"weight": WEIGHTS}, "softcap": 3.0}
    for loss in ("dpop", "aot"):
        for trained in (True, False):
            whole, expected = world.run(loss, trained=trained, **given)
            part, found = world.tokens(own).run(
                loss, trained=trained, tp_group=dist.group.WORLD, **given
            )
            what = (loss, trained, rank)
            for name in ("loss", "losses", *(name for name in NAMES if name != "differs")):
                assert_close(getattr(part, name), getattr(whole, name), (*what, name))
            assert torch.equal(part.differs, whole.differs)
            assert_close(found[0], expected[0], what, 2e-6)
            for ours, theirs in zip(found[1:], expected[1:], strict=True):
                assert_close(ours, theirs[own], what, 2e-6)
    part = world.tokens(own)
    half = LENGTH // 2
    part.hidden = world.hidden[:, half * rank : half * (rank + 1)]
    out, _ = part.run("aot", tp_group=dist.group.WORLD, sequence_parallel=True, **given)
    assert_close(out.ches, whole.ches, rank)


def test_a_vocabulary_that_is_split(two: Pool) -> None:
    two.run(_vocabulary)


def _sequences(rank: int) -> None:
    """Weights of whole pairs; where completions part, a rank with a part of them does not know."""
    world, own = World.of(4), slice(0, 5) if rank == 0 else slice(5, LENGTH)
    part = world.positions(own)
    given: dict[str, Any] = {"pair_values": {"weight": WEIGHTS}, "cp_group": dist.group.WORLD}
    whole, expected = world.run("dpop", pair_values={"weight": WEIGHTS})
    out, found = part.run("dpop", **given)
    assert_close(out.loss, whole.loss, rank)
    assert_close(found[0], expected[0][:, own] * 2, rank)
    with pytest.raises(ValueError, match="statistics contains 'displacement', expected others"):
        part.run("dpop", **given, **ASKED)


def test_sequences_that_are_split(two: Pool) -> None:
    two.run(_sequences)


def _told(rank: int) -> None:
    world, group = World.of(2), dist.group.WORLD
    ones = torch.ones(2)
    differing: list[tuple[dict[str, Any], str]] = [
        ({"pair_values": {"weight": ones}}, r"pair_values \['weight'\]"),
        (ASKED, "displacement True"),
    ]
    for given, said in differing:
        with pytest.raises(RuntimeError, match=f"given different things.*{said}"):
            world.run("dpop", group=group, **(given if rank else {}))
    bad = {"pair_values": {"weight": -ones}}
    kind, said = (ValueError, "is -1.0 for pair 0") if rank else (RuntimeError, "rank 1 of group")
    with pytest.raises(kind, match=said):
        world.run("dpop", group=group, **(bad if rank else {}))


def test_ranks_that_disagree(two: Pool) -> None:
    two.run(_told)


def _attached(rank: int) -> None:
    """A model whose other rank has no pairs left."""
    from fastdpop.hf import attach
    from tests.tiny_models import batch, tiny

    one = tiny("llama")
    model = attach(copy.deepcopy(one), group=dist.group.WORLD)
    attach(one)
    inputs, given = batch(), {"preference": "dpop", "ref_logps": torch.full((4,), -40.0)}
    options = {**ASKED, "pair_values": {"weight": WEIGHTS[:2]}}
    want = one(**inputs, **given, preference_options=options)
    want.loss.backward()
    if rank == 1:
        none = {"pairs": torch.empty(0, 2, dtype=torch.int64)}
        options = {**ASKED, "pair_values": {"weight": WEIGHTS[:0]}, **none}
    found = model(**inputs, **given, preference_options=options)
    found.loss.backward()
    assert_close(found.loss, want.loss, rank)
    for name, parameter in model.named_parameters():
        own = dict(one.named_parameters())[name].grad
        assert_close(mean_over_ranks(parameter.grad), own, name)
    for name in NAMES:
        assert torch.equal(found[name], want[name][: 0 if rank else 2]), name


def test_an_attached_model(two: Pool) -> None:
    pytest.importorskip("transformers")
    two.run(_attached)
