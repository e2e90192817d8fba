"""Process groups, named so that they can travel with what an operator is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """Processes that take part in a collective together.

    Attributes:
        name: torch's name of the process group.
        size: how many processes there are; at least 2.
        rank: the number of this one among them.
    """

    name: str
    size: int
    rank: int

    @property
    def handle(self) -> Any:
        """The process group itself."""
        from torch.distributed import distributed_c10d  # not in every build of torch

        resolve: Any = vars(distributed_c10d)["_resolve_process_group"]
        return resolve(self.name)

    @staticmethod
    def of(argument: str, value: Any) -> Group | None:
        """The group that a caller gave as `argument`: a process group or a device mesh of one dimension.

        None for None, and for a group of this process alone, with whom there is nothing to do.

        Raises:
            TypeError: it is something else.
            ValueError: a mesh of several dimensions, or a group without this process.
        """
        if value is None:
            return None
        if dist.is_available() and dist.is_initialized():
            if hasattr(value, "get_group") and hasattr(value, "ndim"):
                if value.ndim != 1:
                    raise ValueError(
                        f"{argument} is a device mesh of {value.ndim} dimensions, expected one of them: "
                        f"mesh[name]"
                    )
                value = value.get_group()
            if value == dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError(
                    f"{argument} is a group without this process, expected one of its own"
                )
            if isinstance(value, dist.ProcessGroup):
                rank = dist.get_rank(value)
                size = dist.get_world_size(value)
                return None if size == 1 else Group(value.group_name, size, rank)
        raise TypeError(
            f"{argument} is {value!r}, expected a process group of torch.distributed or a device mesh of one "
            "dimension"
        )

    def device(self, near: torch.device) -> torch.device:
        """Where small numbers are exchanged: `near`, or what the group's backend knows if that is another device."""
        backend = dist.get_backend(self.handle)
        if backend == "gloo":
            return torch.device("cpu")
        return torch.device("cuda") if backend == "nccl" and near.type != "cuda" else near
