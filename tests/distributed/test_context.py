"""``cp_group=``: sequences whose tokens lie on several ranks, cut at every place."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastdpop import fused_logps
from tests.batches import LOSSES
from tests.distributed.pool import Pool
from tests.distributed.worlds import LENGTH, World, assert_close, mean_over_ranks


def _cut(rank: int, name: str, cuts: list[int], trained: bool) -> None:
    loss, size = LOSSES[name], dist.get_world_size()
    world = World.of(3, bias=True)
    reference = loss.traits.needs_reference
    statistics = ("entropy", "token_accuracy")
    whole, expected = world.run(loss, trained=trained, reference=reference, statistics=statistics)
    for cut in cuts:
        bounds = (0, cut, LENGTH) if size == 2 else (0, cut // 2, cut, (cut + LENGTH) // 2, LENGTH)
        own = slice(bounds[rank], bounds[rank + 1])
        part, found = world.positions(own).run(
            loss,
            trained=trained,
            reference=reference,
            cp_group=dist.group.WORLD,
            statistics=statistics,
        )
        what = (name, trained, cut, rank)
        for field in ("loss", "losses", "chosen_logps", "rejected_logps", "entropy"):
            assert_close(getattr(part, field), getattr(whole, field), (*what, field))
        assert_close(part.token_accuracy, whole.token_accuracy, what)
        assert torch.equal(part.lengths, whole.lengths)
        assert_close(found[0], expected[0][:, own] * size, what)
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            assert_close(mean_over_ranks(ours), theirs, what)


def test_every_boundary(two: Pool) -> None:
    """Also one at the beginning and one at the end: a rank has nothing."""
    for trained in (True, False):
        two.run(_cut, "dpop", list(range(LENGTH + 1)), trained)


@pytest.mark.parametrize("name", [n for n in sorted(LOSSES) if not n.startswith("ld")])
def test_every_loss(two: Pool, name: str) -> None:
    two.run(_cut, name, [5], True)


def test_four_processes(four: Pool) -> None:
    four.run(_cut, "sum", [3, 8], True)


def _logps(rank: int) -> None:
    world = World.of(3)
    own = slice(0, 7) if rank == 0 else slice(7, LENGTH)
    part = world.positions(own)
    for weighted in (False, True):
        draw = torch.rand(world.labels.shape, generator=torch.Generator().manual_seed(3))
        options = {"token_weights": draw} if weighted else {}
        mine = {"token_weights": draw[:, own]} if weighted else {}
        hidden = world.hidden.clone().requires_grad_()
        expected = fused_logps(hidden, world.weight, world.labels, shift_labels=False, **options)
        (expected.sin() * torch.arange(6)).sum().backward()
        ours = part.hidden.clone().requires_grad_()
        found = fused_logps(
            ours, world.weight, part.labels, shift_labels=False, cp_group=dist.group.WORLD, **mine
        )
        (found.sin() * torch.arange(6)).sum().backward()
        assert_close(found, expected, weighted)
        assert hidden.grad is not None
        assert ours.grad is not None
        assert_close(ours.grad, hidden.grad[:, own] * 2, weighted)
    by_token = fused_logps(
        part.hidden, world.weight, part.labels, shift_labels=False, reduction="token",
        cp_group=dist.group.WORLD,
    )  # fmt: skip
    alone = fused_logps(
        world.hidden, world.weight, world.labels, shift_labels=False, reduction="token"
    )
    assert_close(by_token, alone[:, own], "by token")


def test_logps(two: Pool) -> None:
    two.run(_logps)


def _in_two_dimensions(rank: int) -> None:
    """Pairs over two ranks, the positions of each over two others."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    data, context = mesh.get_coordinate()
    world = World.of(4)
    own = [range(1), range(1, 4)][data]
    cut = [slice(0, 5), slice(5, LENGTH)][context]
    for name in ("dpop", "aot", "sum", "sft", "wpo"):
        whole, expected = world.run(LOSSES[name])
        part, found = (
            world.pairs(list(own))
            .positions(cut)
            .run(LOSSES[name], group=mesh["dp"], cp_group=mesh["cp"])
        )
        assert_close(part.loss, whole.loss, name)
        rows = torch.tensor([*own, *(4 + p for p in own)])
        assert_close(found[0], expected[0][rows][:, cut] * 4, name)
        assert_close(mean_over_ranks(found[1]), expected[1], name)


def test_with_pairs_of_its_own(four: Pool) -> None:
    four.run(_in_two_dimensions)


def _refused(rank: int) -> None:
    world = World.of(2)
    with pytest.raises(ValueError, match="shift_labels is True, expected False with cp_group"):
        fused_logps(world.hidden, world.weight, world.labels, cp_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"ld_alpha is 0\.3, expected None with cp_group"):
        world.run(LOSSES["ld"], cp_group=dist.group.WORLD)


def test_refused(two: Pool) -> None:
    two.run(_refused)
