"""Before processes compute together, they make sure that they can: a process that fails, or that was given something
else, would leave the others waiting for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from fastdpop.distributed import collectives
from fastdpop.distributed.groups import Group
from fastdpop.distributed.parallel import Parallel


@dataclass
class Brought:
    """What a process brings to a meeting, and what it learns there.

    Attributes:
        settings: what must be the same everywhere.
        layout: what must be the same where processes share sequences; tokens: where they share all of their tokens.
        rows: tokens of the vocabulary that are here.
        totals: numbers that are summed over the processes that have pairs of their own: pairs, sides, tokens.
        rows_of: `rows` of each process of the tensor-parallel group.
        pairs_of: pairs of each process of the data-parallel group.
    """

    settings: str = ""
    layout: str = ""
    tokens: str = ""
    rows: int = 0
    totals: tuple[int, int, int] = (0, 0, 0)
    rows_of: list[int] = field(default_factory=list)
    pairs_of: list[int] = field(default_factory=list)


@contextmanager
def meeting(parallel: Parallel, near: torch.device) -> Iterator[Brought]:
    """Run what follows in every process of the groups; behind it, all have it done, or all raise.

    Args:
        near: the device that the tensors are on.

    Raises:
        RuntimeError: another process failed, or has other settings; the message names it.
    """
    brought = Brought()
    try:
        yield brought
    except Exception:
        _exchange(parallel, brought, near, failed=True)
        raise
    problem = _exchange(parallel, brought, near, failed=False)
    if problem:
        raise RuntimeError(problem)


def _exchange(parallel: Parallel, brought: Brought, near: torch.device, failed: bool) -> str:
    """Learn of the others; what is wrong, or nothing."""
    problem, bad = "", failed
    groups = parallel.groups()
    for name, group in groups:
        layout = "" if name == "group" else brought.layout
        layout += brought.tokens if name == "tp_group" else ""
        own = [int(bad), _digest(brought.settings), _digest(layout), brought.rows, *brought.totals]
        found = collectives.every(own, group, near)
        problem = problem or _failed(name, [numbers[0] for numbers in found])
        bad = bad or any(numbers[0] for numbers in found)
        if not bad:
            for at, what in ((1, brought.settings), (2, layout)):
                if len({numbers[at] for numbers in found}) > 1:
                    problem = _differs(name, group, what)
                    bad = True
        totals = [tuple(numbers[4:7]) for numbers in found]
        if name == "tp_group":
            brought.rows_of = [numbers[3] for numbers in found]
        elif name == "cp_group":
            pairs, sides, _ = brought.totals
            brought.totals = (pairs, sides, sum(of[2] for of in totals))
        else:
            brought.pairs_of = [of[0] for of in totals]
            sums = [sum(of) for of in zip(*totals, strict=True)]
            brought.totals = (sums[0], sums[1], sums[2])
    if len(groups) > 1:
        # A group that met early has not heard of what another one found.
        for name, group in groups:
            flags = [numbers[0] for numbers in collectives.every([int(bad)], group, near)]
            problem = problem or _failed(name, flags)
            bad = bad or any(flags)
    return problem


def _failed(name: str, flags: list[int]) -> str:
    ranks = [str(rank) for rank, flag in enumerate(flags) if flag]
    if not ranks:
        return ""
    return (
        f"rank {', '.join(ranks)} of {name} raised an error before the loss, see its output; "
        "this rank has nothing to compute with"
    )


def _differs(name: str, group: Group, what: str) -> str:
    """A message with what each process has; all of the group come here."""
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, what, group=group.handle)
    by_value: dict[str, list[str]] = {}
    for rank, value in enumerate(found):
        by_value.setdefault(value, []).append(str(rank))
    said = "; ".join(f"rank {', '.join(ranks)}: {value}" for value, ranks in by_value.items())
    return f"the ranks of {name} were given different things, expected the same everywhere: {said}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
