"""``tp_group=``: an lm_head whose vocabulary is split, through the public functions."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastdpop import fused_logps
from tests.batches import LOSSES
from tests.distributed.pool import Pool
from tests.distributed.worlds import (
    LENGTH,
    VOCABULARY,
    World,
    assert_close,
    mean_over_ranks,
)

CUTS = {2: ((0, 27, VOCABULARY), (0, 0, VOCABULARY)), 4: ((0, 13, 13, 40, VOCABULARY),)}
"""Bounds of each rank's tokens, uneven; some have none."""


def _losses(rank: int, names: list[str], trained: bool) -> None:
    size, group = dist.get_world_size(), dist.group.WORLD
    world = World.of(3, bias=True)
    options = {"statistics": ("entropy", "mean_logits", "token_accuracy"), "softcap": 4.0}
    for bounds in CUTS[size]:
        own = slice(bounds[rank], bounds[rank + 1])
        for name in names:
            loss, what = LOSSES[name], (name, trained, bounds, rank)
            given = {**options, "reference": loss.traits.needs_reference, "trained": trained}
            whole, expected = world.run(loss, **given)
            part, found = world.tokens(own).run(loss, tp_group=group, **given)
            for field in (
                "loss",
                "losses",
                "chosen_logps",
                "rejected_logps",
                *options["statistics"],
            ):
                assert_close(getattr(part, field), getattr(whole, field), (*what, field))
            # Parts of a derivative are added up as they go back.
            assert_close(found[0], expected[0], what, 2e-6)
            for ours, theirs in zip(found[1:], expected[1:], strict=True):
                assert_close(ours, theirs[own], what, 2e-6)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_losses(two: Pool, trained: bool) -> None:
    two.run(_losses, ["dpop", "aot", "wpo", "sum", "ld dpop", "sft"], trained)


def test_four_processes(four: Pool) -> None:
    four.run(_losses, ["dpop", "aot"], True)


def _sequence_parallel(rank: int) -> None:
    """Hidden states come as parts of sequences, and so do their gradients."""
    size, group = dist.get_world_size(), dist.group.WORLD
    world = World.of(3)
    own, step = slice(27 * rank, 27 + 26 * rank), LENGTH // size
    here = slice(step * rank, step * (rank + 1))
    whole, expected = world.run("dpop")
    part = world.tokens(own)
    part.hidden = world.hidden[:, here]
    out, found = part.run("dpop", tp_group=group, sequence_parallel=True)
    assert_close(out.loss, whole.loss, rank)
    assert_close(found[0], expected[0][:, here], rank, 2e-6)
    assert_close(found[1], expected[1][own], rank, 2e-6)
    part.hidden = world.hidden[:, :5]
    with pytest.raises(ValueError, match=r"expected \(S, T / 2, H\) and \(S, T\)"):
        part.run("dpop", tp_group=group, sequence_parallel=True)


def test_sequence_parallel(two: Pool) -> None:
    two.run(_sequence_parallel)


def _padded(rank: int) -> None:
    """The last rows of the last shard, or all of it, stand for no token."""
    world = World.of(2, bias=True)
    for tokens in (50, 27, 20):
        world.labels[world.labels >= tokens] = 1
        own = slice(27 * rank, 27 + 26 * rank)
        whole, expected = world.tokens(slice(0, tokens)).run("dpop")
        out, found = world.tokens(own).run("dpop", tp_group=dist.group.WORLD, vocab_size=tokens)
        assert_close(out.loss, whole.loss, tokens)
        assert_close(found[0], expected[0], tokens, 2e-6)
        kept = expected[1][own]
        assert_close(found[1][: len(kept)], kept, tokens, 2e-6)
        assert not found[1][len(kept) :].any()
        assert not found[2][len(kept) :].any()


def test_a_padded_vocabulary(two: Pool) -> None:
    two.run(_padded)


def _logps(rank: int) -> None:
    world, group = World.of(2), dist.group.WORLD
    own = slice(27 * rank, 27 + 26 * rank)
    for reduction in ("sequence", "token"):
        for trained in (True, False):
            results = []
            for weight, options in ((world.weight, {}), (world.weight[own], {"tp_group": group})):
                hidden = world.hidden.clone().requires_grad_()
                leaf = weight.clone().requires_grad_(trained)
                logps = fused_logps(
                    hidden, leaf, world.labels, reduction=reduction, shift_labels=False, **options
                )
                (logps / 20.0).sin().sum().backward()
                results.append((logps, hidden.grad, leaf.grad))
            (one, *expected), (two, *found) = results
            assert_close(two, one, reduction)
            assert_close(found[0], expected[0], reduction, 2e-6)
            if trained:
                assert_close(found[1], expected[1][own], reduction, 2e-6)


def test_logps(two: Pool) -> None:
    two.run(_logps)


def _with_data(rank: int) -> None:
    """Pairs over two ranks, the vocabulary over two others."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    data, tensor = mesh.get_coordinate()
    world, pairs = World.of(4), [range(1), range(1, 4)][data]
    own = [slice(0, 30), slice(30, VOCABULARY)][tensor]
    for name in ("dpop", "aot", "sum"):
        whole, expected = world.run(LOSSES[name])
        part, found = (
            world.pairs(list(pairs))
            .tokens(own)
            .run(LOSSES[name], group=mesh["dp"], tp_group=mesh["tp"])
        )
        assert_close(part.loss, whole.loss, name)
        rows = torch.tensor([*pairs, *(4 + p for p in pairs)])
        assert_close(found[0], expected[0][rows] * 2, name, 2e-6)
        averaged = mean_over_ranks(found[1], mesh.get_group("dp"))
        assert_close(averaged, expected[1][own], name, 2e-6)


def test_with_pairs_of_its_own(four: Pool) -> None:
    four.run(_with_data)


def _with_context(rank: int) -> None:
    """Positions over two ranks, the vocabulary over two others."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    context, tensor = mesh.get_coordinate()
    world = World.of(3)
    here = [slice(0, 5), slice(5, LENGTH)][context]
    own = [slice(0, 30), slice(30, VOCABULARY)][tensor]
    for name in ("dpop", "aot"):
        whole, expected = world.run(LOSSES[name])
        part, found = (
            world.positions(here)
            .tokens(own)
            .run(LOSSES[name], cp_group=mesh["cp"], tp_group=mesh["tp"])
        )
        assert_close(part.loss, whole.loss, name)
        assert_close(found[0], expected[0][:, here] * 2, name, 2e-6)
        averaged = mean_over_ranks(found[1], mesh.get_group("cp"))
        assert_close(averaged, expected[1][own], name, 2e-6)


def test_with_parts_of_sequences(four: Pool) -> None:
    four.run(_with_context)


def _equal(rank: int) -> None:
    """A policy equal to its reference: every route gives the same bits."""
    world, group = World.of(3), dist.group.WORLD
    part = world.tokens(slice(27 * rank, 27 + 26 * rank))
    with torch.no_grad():
        part.ref_logps = fused_logps(
            part.hidden, part.weight, part.labels, shift_labels=False, tp_group=group,
            dtype=torch.float64,
        )  # fmt: skip
    for trained in (True, False):
        for loss in ("dpop", "aot"):
            out, _ = part.run(loss, tp_group=group, trained=trained)
            if loss == "dpop":
                assert not out.penalty.any()
            assert not out.margins.any()


def test_a_policy_equal_to_its_reference(two: Pool) -> None:
    two.run(_equal)
