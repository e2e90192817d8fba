"""Which processes compute a batch together, and how a caller says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from fastdpop.choices import GradReduction, words
from fastdpop.distributed.groups import Group

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def uncompiled_with_groups(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that ``torch.compile`` leaves alone where it is given groups: no graph holds what ranks tell each
    other on the way.
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for name in ("group", "cp_group", "tp_group"):
            if kwargs.get(name) is not None:
                from fastdpop.distributed.uncompiled import uncompiled

                return uncompiled(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Shard:
    """Consecutive tokens of a vocabulary, of which each process of a group holds some.

    Attributes:
        start: the first of this process's.
        vocabulary: how many tokens there are in all.
    """

    group: Group
    start: int
    vocabulary: int

    def numbers(self) -> tuple[str, int, int, int, int]:
        """As plain values; :meth:`of_numbers` is the inverse."""
        return (self.group.name, self.group.size, self.group.rank, self.start, self.vocabulary)

    @staticmethod
    def of_numbers(given: tuple[str, int, int, int, int]) -> Shard:
        return Shard(Group(*given[:3]), *given[3:])


@dataclass(frozen=True)
class Parallel:
    """The groups of a call; None where there is no other process.

    Attributes:
        data: each process has pairs of its own.
        context: each has a part of every sequence.
        tensor: each has a part of the lm_head's vocabulary.
        grad_reduction: how gradients of parameters are combined over `data` and `context` afterwards.
    """

    data: Group | None = None
    context: Group | None = None
    tensor: Group | None = None
    grad_reduction: str = "mean"

    @staticmethod
    def of(
        group: Any = None, cp_group: Any = None, tp_group: Any = None, grad_reduction: str = "mean"
    ) -> Parallel:
        """What a caller gave.

        Raises:
            TypeError, ValueError: it is no group of this process; or, by itself, `grad_reduction` is wrong.
        """
        found = Parallel(
            Group.of("group", group),
            Group.of("cp_group", cp_group),
            Group.of("tp_group", tp_group),
            grad_reduction,
        )
        names = [one.name for _, one in found.groups()]
        if len(set(names)) < len(names):
            raise ValueError(
                "group, cp_group and tp_group are not all different, expected one purpose for each group"
            )
        if found.alone:  # others would wait for this one: they have to hear of it first
            found.check()
        return found

    def check(self) -> None:
        """
        Raises:
            ValueError: `grad_reduction` is not as described.
        """
        allowed = words(GradReduction)
        if self.grad_reduction not in allowed:
            raise ValueError(
                f"grad_reduction is {self.grad_reduction!r}, expected one of {allowed}"
            )

    @property
    def alone(self) -> bool:
        """Whether this process computes by itself."""
        return self.data is None and self.context is None and self.tensor is None

    def groups(self) -> list[tuple[str, Group]]:
        """Those that there are, by the name of their argument."""
        named = (("tp_group", self.tensor), ("cp_group", self.context), ("group", self.data))
        return [(name, group) for name, group in named if group is not None]

    @property
    def equal_share(self) -> float:
        """Of a derivative of what all ranks of `context` compute alike, so that gradients combine to that of one."""
        summed = self.context is not None and self.grad_reduction == "sum"
        return 1.0 / self.context.size if self.context is not None and summed else 1.0

    def factor(self, group: Group | None) -> float:
        """Of a derivative, so that the mean over the group is what its sum would be without."""
        averaged = self.grad_reduction == "mean"
        return float(group.size) if group is not None and averaged else 1.0


ALONE = Parallel()
"""One process."""
