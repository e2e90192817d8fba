"""The engine of a process that holds no token of a split vocabulary, or none that is possible."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastdpop.engines.base import (
    Engine,
    EngineOutput,
    Gradients,
    GroupLoss,
    NeedsGrad,
    Problem,
    RowValues,
)
from fastdpop.engines.chunks import plan, zeros_where

ANY_NUMBER = 2**62
"""Of rows: a limit that is none."""


class NoToken(Engine):
    """Has none of the probability, and takes part in every chunk of the loss all the same."""

    name = "none"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Never."""
        del device, dtype
        return None

    def describe(self) -> str:
        """What it computes with."""
        return "nothing"

    def chunk_rows(
        self, problem: Problem, statistics: tuple[str, ...], needs_grad: NeedsGrad
    ) -> int:
        """Any number."""
        del problem, statistics, needs_grad
        return ANY_NUMBER

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> EngineOutput:
        """Logits of -inf."""
        rows, dtype = len(problem.targets), problem.result_dtype
        never = problem.hidden.new_full((rows,), -torch.inf, dtype=dtype)
        lines = never.new_zeros((len(statistics), rows))
        for line, name in zip(lines, statistics, strict=True):
            if name in ("mean_logits", "max_logit"):
                line.fill_(-torch.inf)
        return EngineOutput(never, never.clone(), lines)

    def logps_and_dlogp_dhidden(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> EngineOutput:
        """No derivative."""
        found = self.logps(problem, statistics)
        return dataclasses.replace(found, dlogp_dhidden=torch.zeros_like(problem.hidden))

    def gradients(
        self, problem: Problem, lse: Tensor, dlogp: Tensor, needs_grad: NeedsGrad
    ) -> Gradients:
        """Zeros."""
        del lse, dlogp
        dtype = problem.result_dtype
        return Gradients(
            zeros_where(needs_grad.hidden, problem.hidden, dtype),
            zeros_where(needs_grad.weight, problem.weight, dtype),
            zeros_where(needs_grad.bias, problem.weight[:, 0], dtype),
        )

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        loss: GroupLoss,
        needs_grad: NeedsGrad,
    ) -> EngineOutput:
        """The loss of every chunk, and zeros."""
        found = self.logps(problem, statistics)
        for chunk in plan(problem.groups, problem.chunk_rows or ANY_NUMBER):
            rows = chunk.rows
            values = RowValues(found.logps[rows], found.lse[rows], found.statistics[:, rows])
            loss.dlogp(chunk.first, chunk.last, values)
        gradients = self.gradients(problem, found.lse, found.logps, needs_grad)
        return dataclasses.replace(found, gradients=gradients)
