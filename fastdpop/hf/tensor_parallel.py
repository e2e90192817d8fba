"""Heads whose weight is a DTensor: the vocabulary is split over processes, by torch's ColwiseParallel or transformers'
``tp_plan``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.hf.sharded import shards_of_fsdp


def is_split(weight: object) -> bool:
    """Whether it is a DTensor."""
    return hasattr(weight, "to_local") and hasattr(weight, "device_mesh")


def own_part(
    head: nn.Module, hidden: Any, weight: Any, bias: Any, owner: str
) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """Hidden states, whole on every process; this one's rows of the weight and of the bias; and the processes that hold
    the others, None if there are none. All differentiable.

    Raises:
        RuntimeError: the weight is split otherwise.
    """
    if any(weight is shard for shard in shards_of_fsdp(head)):
        raise RuntimeError(
            f"the weight of {owner}'s head is read where FSDP has not gathered it: shard the head as a whole, "
            "fully_shard(lm_head)"
        )
    mesh, placements = weight.device_mesh, weight.placements
    split = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(split) > 1 or any(not placements[dim].is_shard(0) for dim in split):
        raise RuntimeError(
            f"the weight of {owner}'s head is a DTensor with placements {placements}, expected rows of the vocabulary "
            "over one dimension of its mesh: [Shard(0)] (ColwiseParallel)"
        )
    group = mesh.get_group(split[0]) if split else None
    # Each process computes a part of the derivative; the loss adds them up, so that all have the whole.
    if is_split(hidden):
        from torch.distributed.tensor import Replicate

        whole = [Replicate()] * hidden.device_mesh.ndim
        hidden = hidden.redistribute(placements=whole).to_local(grad_placements=whole)
    rows = weight.to_local()
    of_bias = bias.to_local() if is_split(bias) else bias
    return hidden, rows, of_bias, group


def replaced(head: nn.Module) -> Callable[..., Any] | None:
    """The forward that transformers has put in the place of a split head's own, if so: it would gather logits."""
    forward = vars(head).get("forward")
    where = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    of_plan = where.startswith("transformers.") and "TensorParallelLayer.install_forward" in where
    return forward if of_plan else None


def let_through(head: nn.Module, wanted: Callable[[], bool]) -> None:
    """Let the head's own forward run, with no gathering around it, where that is `wanted`."""
    gathering = replaced(head)
    if gathering is None or hasattr(gathering, "fastdpop_gathering"):
        return

    @functools.wraps(gathering)
    def forward(*args: Any, **kwargs: Any) -> Any:
        own = functools.partial(type(head).forward, head)
        return (own if wanted() else gathering)(*args, **kwargs)

    forward.fastdpop_gathering = gathering  # type: ignore[attr-defined]
    head.forward = forward


def undo(head: nn.Module) -> None:
    """Undo :func:`let_through`."""
    gathering = getattr(vars(head).get("forward"), "fastdpop_gathering", None)
    if gathering is not None:
        head.forward = gathering


def whole(tensor: Any) -> Any:
    """All of a DTensor, anything else as it is; for numbers that are only compared."""
    with torch.no_grad():
        return tensor.full_tensor() if is_split(tensor) else tensor
