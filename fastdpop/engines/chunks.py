"""How a pass over a problem is cut up, the same for all engines.

A *pass* is one call of an engine over a problem. It goes through *chunks*: whole groups, as many
rows as the workspace holds. A group beyond that is a chunk by itself and goes through in *pieces*,
for which an engine computes the logits twice.

The plan is a function of the groups and of one number of rows, and of nothing else: what decides
the order of additions does not depend on the data, and processes that agree on that number (see
:attr:`~fastdpop.engines.base.Problem.chunk_rows`) go through the same chunks, so that each of them
can take part in a collective inside a chunk.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fastdpop.engines.base import EngineOutput, Gradients, GroupLoss, Problem, RowValues

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Chunk:
    """Consecutive groups ``first`` to ``last - 1`` that go through together.

    Attributes:
        rows: all of them.
        pieces: what goes through at once: `rows`, or the parts of one large group; none where there
            are no rows.
    """

    first: int
    last: int
    rows: slice
    pieces: tuple[slice, ...]

    @property
    def whole(self) -> bool:
        """Whether all rows go through at once, so that what is known of them can be kept."""
        return len(self.pieces) == 1


def rows_that_fit(workspace_bytes: int, bytes_per_row: int, multiple: int = 1) -> int:
    """How many rows of so many bytes a workspace holds, in whole multiples where that is possible;
    at least one.
    """
    rows = max(1, workspace_bytes // bytes_per_row)
    return rows if rows < multiple else rows - rows % multiple


def pieces_of(rows: slice, limit: int) -> tuple[slice, ...]:
    """Slices of at most `limit` rows."""
    starts = range(rows.start, rows.stop, limit)
    return tuple(slice(start, min(start + limit, rows.stop)) for start in starts)


def plan(groups: Sequence[int], limit: int, sizes: Sequence[int] | None = None) -> list[Chunk]:
    """Whole groups, as many as have at most `limit` rows together; a larger group by itself.

    Args:
        groups: G + 1 bounds of the groups, in rows.
        sizes: how much each group counts, if not its rows.
    """
    if sizes is None:
        sizes = [b - a for a, b in itertools.pairwise(groups)]
    chunks, first = [], 0
    while first < len(sizes):
        last, size = first + 1, sizes[first]
        while last < len(sizes) and size + sizes[last] <= limit:
            size += sizes[last]
            last += 1
        rows = slice(groups[first], groups[last])
        # By `sizes`, more rows than the limit may go through at once.
        pieces = pieces_of(rows, limit if size > limit else max(rows.stop - rows.start, 1))
        chunks.append(Chunk(first, last, rows, pieces))
        first = last
    return chunks


class Pass(ABC, Generic[Kept]):
    """One pass over a problem: its chunks and its results.

    Attributes:
        logps, lse: ``(N,)``, statistics: ``(K, N)``: filled in chunk by chunk.
        gradients: sums that chunks add to.
    """

    def __init__(self, problem: Problem, statistics: tuple[str, ...]) -> None:
        self.problem, self.names = problem, statistics
        rows, new, dtype = len(problem.targets), problem.hidden.new_empty, problem.result_dtype
        self.logps = new(rows, dtype=dtype)
        self.lse = new(rows, dtype=dtype)
        self.statistics = new((len(statistics), rows), dtype=dtype)
        self.gradients = Gradients()

    @abstractmethod
    def chunks(self) -> list[Chunk]:
        """Of :meth:`one_pass`, in order."""

    @abstractmethod
    def forward(self, chunk: Chunk) -> Kept:
        """Log-probs and statistics of a chunk; returns what its gradients need of it."""

    @abstractmethod
    def backward(self, chunk: Chunk, kept: Kept, dlogp: Tensor) -> None:
        """Add the gradients of a chunk's rows, whose derivatives `dlogp` ``(n,)`` are known."""

    def dlogp(self, loss: GroupLoss, chunk: Chunk) -> Tensor:
        """The derivatives ``(n,)`` of the loss with respect to the log-probs of a chunk."""
        rows = chunk.rows
        values = RowValues(self.logps[rows], self.lse[rows], self.statistics[:, rows])
        return loss.dlogp(chunk.first, chunk.last, values).to(self.logps.dtype)

    def one_pass(self, loss: GroupLoss) -> None:
        """Log-probs, and gradients of a loss that is known once a group's log-probs are."""
        for chunk in self.chunks():
            kept = self.forward(chunk)
            self.backward(chunk, kept, self.dlogp(loss, chunk))

    def finished(self) -> Gradients:
        """The gradients, once all rows have been added."""
        return self.gradients

    def output(
        self,
        *,
        dlogp_dhidden: Tensor | None = None,
        losses: Tensor | None = None,
        sequence_logps: Tensor | None = None,
    ) -> EngineOutput:
        """The results, with those that not every pass has."""
        return EngineOutput(
            self.logps,
            self.lse,
            self.statistics,
            dlogp_dhidden,
            self.finished(),
            losses,
            sequence_logps,
        )


def zeros_where(needed: bool, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A gradient that chunks add to, where it is asked for."""
    return like.new_zeros(like.shape, dtype=dtype) if needed else None
