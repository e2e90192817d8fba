"""Every exchange between processes that fastdpop makes.

What autograd sees of one is fixed by one rule: every process has the same loss, so the derivative that comes from above
is the same everywhere, and each takes from it what belongs to its own tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpop.distributed.groups import Group


def sum_(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the group, in place."""
    dist.all_reduce(tensor, dist.ReduceOp.SUM, group=group.handle)
    return tensor


def every(numbers: Sequence[int], group: Group, near: torch.device) -> list[list[int]]:
    """As many numbers of each process, by rank; waits for all of them."""
    own = torch.tensor(numbers, dtype=torch.int64, device=group.device(near))
    found = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(found, own, group=group.handle)
    numbers_of: list[list[int]] = torch.stack(found).tolist()
    return numbers_of


def concatenated(tensor: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """``(sum of sizes, ...)``: the tensors of all processes, the r-th of which has ``sizes[r]`` rows."""
    most = max(sizes)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=group.handle)
    return torch.cat([one[:size] for one, size in zip(found, sizes, strict=True)])


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, factor: float) -> Tensor:
        ctx.factor = factor
        return sum_(tensor.detach().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None, None


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return sum_(grads[0].contiguous().clone(), ctx.group), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
        start = sum(sizes[: group.rank])
        ctx.own, ctx.group = slice(start, start + sizes[group.rank]), group
        return concatenated(tensor.detach(), sizes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return sum_(grads[0].contiguous().clone(), ctx.group)[ctx.own], None, None


def sum_over(tensor: Tensor, group: Group, factor: float = 1.0) -> Tensor:
    """The sum over the group; backward, what comes from above times `factor`, to each process."""
    result: Tensor = _SumOver.apply(tensor, group, factor)
    return result


def copy_to(tensor: Tensor, group: Group) -> Tensor:
    """The tensor, of which each process computes a part with its own weights; backward, the sum of the parts'
    derivatives (in the tensor's dtype).
    """
    result: Tensor = _CopyTo.apply(tensor, group)
    return result


def joined(tensor: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """:func:`concatenated`, of which each process computes another part of the loss; backward, this process's own rows
    of the sum of what comes from above.
    """
    result: Tensor = _Joined.apply(tensor, sizes, group)
    return result


class _ScaledBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None


def scaled_back(tensor: Tensor, factor: float) -> Tensor:
    """The tensor; backward, what comes from above times `factor`."""
    result: Tensor = tensor if factor == 1.0 else _ScaledBack.apply(tensor, factor)
    return result


class _WholeSequences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(group.size)]
        dist.all_gather(parts, tensor.detach().contiguous(), group=group.handle)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        group = ctx.group
        parts = [part.contiguous() for part in grads[0].chunk(group.size, dim=1)]
        if dist.get_backend(group.handle) == "gloo":  # which cannot scatter what it sums
            return sum_(grads[0].contiguous().clone(), group).chunk(group.size, 1)[group.rank], None
        own = torch.empty_like(parts[group.rank])
        dist.reduce_scatter(own, parts, group=group.handle)
        return own, None


def along_sequence(tensor: Tensor, group: Group) -> Tensor:
    """``(S, T, H)`` of ``(S, T / n, H)``, the parts in the order of the ranks, for computing with a part of the
    weights each; backward, this process's part of the sum of the derivatives.
    """
    result: Tensor = _WholeSequences.apply(tensor, group)
    return result
