"""The collectives, and what autograd sees of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastdpop.distributed import Group, collectives
from tests.distributed.pool import Pool


def _all_of_them(rank: int) -> None:
    group = Group.of("group", dist.group.WORLD)
    assert group is not None
    assert (group.size, group.rank) == (dist.get_world_size(), rank)
    x = torch.full((3,), float(rank + 1), dtype=torch.float64, requires_grad=True)
    total = sum(range(1, group.size + 1))
    summed = collectives.sum_over(x, group, factor=2.0)
    assert summed.tolist() == [total] * 3
    (grad,) = torch.autograd.grad((summed * torch.arange(3.0)).sum(), x)
    assert grad.tolist() == [0.0, 2.0, 4.0]
    copied = collectives.copy_to(x, group)
    assert torch.equal(copied, x)
    (grad,) = torch.autograd.grad((copied * (rank + 1)).sum(), x)
    assert grad.tolist() == [total] * 3
    sizes = list(range(group.size))
    own = torch.full((rank, 2), float(rank), requires_grad=True)
    joined = collectives.joined(own, sizes, group)
    assert joined[:, 0].tolist() == [float(r) for r in sizes for _ in range(r)]
    (grad,) = torch.autograd.grad((joined * torch.arange(len(joined))[:, None]).sum(), own)
    start = sum(sizes[:rank])
    assert grad[:, 1].tolist() == [group.size * row for row in range(start, start + rank)]
    assert collectives.every([rank, 7], group, torch.device("cpu")) == [[r, 7] for r in sizes]


def test_collectives(two: Pool, four: Pool) -> None:
    for pool in (two, four):
        pool.run(_all_of_them)


def _groups(rank: int) -> None:
    alone = [dist.new_group([r]) for r in range(dist.get_world_size())]
    assert Group.of("group", alone[rank]) is None
    assert Group.of("group", None) is None
    with pytest.raises(TypeError, match="tp_group is 3, expected a process group"):
        Group.of("tp_group", 3)
    with pytest.raises(ValueError, match="without this process"):
        Group.of("group", alone[1 - rank])
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    assert Group.of("group", mesh["a"]) == Group.of("group", mesh.get_group("a"))
    with pytest.raises(ValueError, match="2 dimensions"):
        Group.of("group", mesh)


def test_groups(two: Pool) -> None:
    two.run(_groups)


def test_without_torch_distributed() -> None:
    with pytest.raises(TypeError, match="group is 'dp', expected a process group"):
        Group.of("group", "dp")
