"""The exact engine: plain torch, any device, float64, float32, bfloat16 and float16.

    for each chunk of whole groups, as many rows as the workspace holds logits for:
        z = transform(hidden @ weight.T + bias)      2 units, fp32, vocabulary tile by tile, kept
        logp = z[target] - logsumexp(z)
        c = coefficients(logp)                       the loss, on a few numbers
        g = (onehot - exp(z - lse)) * dz/du          tile by tile, never whole
        dHidden = c * (g @ weight)                   2 units
        dWeight += g.T @ (c * hidden)                2 units, fp32

A group whose logits exceed the workspace goes through in row tiles and computes its logits twice (8
units instead of 6). The chunks and tiles depend only on the groups, the shapes and the workspace,
so every route gives a row the same log-prob, bit for bit: a policy equal to its reference has a
log-ratio of exactly 0.

Products of 16-bit inputs are exact in fp32 and are accumulated there: on a GPU by the tensor cores,
elsewhere after widening one weight tile at a time. 16-bit logits never exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpop.engines.base import (
    Coefficients,
    Gradients,
    Logps,
    Problem,
    Wanted,
)


class EagerEngine:
    """Plain torch, chunked; the engine that runs everywhere and that the others are compared
    with.
    """

    name = "eager"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Never: plain torch runs on every device, in every dtype."""
        del device, dtype
        return None

    def describe(self) -> str:
        """What it computes with."""
        return "plain torch, chunked"

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> Logps:
        """Log-probs alone: 2 units."""
        run = _Run(problem, statistics)
        for chunk in run.chunks:
            for tile in chunk.tiles:
                run.forward(tile)
        return run.result()

    def logps_and_direction(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> tuple[Logps, Tensor]:
        """Log-probs and d logp / d hidden: 4 units, since the direction needs no loss."""
        run = _Run(problem, statistics)
        direction = torch.empty_like(problem.hidden)
        for chunk in run.chunks:
            for tile in chunk.tiles:
                logits = run.forward(tile)
                direction[tile] = run.backward(tile, logits, None, None, None, want_hidden=True)
        return run.result(), direction

    def gradients(
        self, problem: Problem, lse: Tensor, row_gradient: Tensor, wanted: Wanted
    ) -> Gradients:
        """Gradients for known coefficients, recomputing the logits."""
        run = _Run(problem, ())
        run.lse.copy_(lse)
        sums = run.new_gradients(wanted)
        for chunk in run.chunks:
            for tile in chunk.tiles:
                run.accumulate(tile, run.logits(tile), row_gradient[tile], sums)
        return sums

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        coefficients: Coefficients,
        wanted: Wanted,
    ) -> tuple[Logps, Gradients]:
        """Log-probs, and gradients of a loss that is known once a group's log-probs are."""
        run = _Run(problem, statistics)
        sums = run.new_gradients(wanted)
        for chunk in run.chunks:
            kept = None
            for tile in chunk.tiles:
                kept = run.forward(tile)
            rows = chunk.rows
            c = coefficients(chunk.first, chunk.last, run.logps[rows], run.statistics[:, rows])
            for tile in chunk.tiles:
                logits = kept if len(chunk.tiles) == 1 else run.logits(tile)
                assert logits is not None
                run.accumulate(
                    tile, logits, c[tile.start - rows.start : tile.stop - rows.start], sums
                )
        return run.result(), sums


@dataclass(frozen=True)
class _Chunk:
    """Consecutive groups ``first`` to ``last - 1`` that go through together, in one row tile or,
    when they are one large group, several.
    """

    first: int
    last: int
    rows: slice
    tiles: list[slice]


def _chunks(groups: list[int], limit: int) -> Iterator[_Chunk]:
    """Whole groups, up to `limit` rows at once."""
    first = 0
    while first < len(groups) - 1:
        start = groups[first]
        last = first + 1
        while last < len(groups) - 1 and groups[last + 1] - start <= limit:
            last += 1
        stop = groups[last]
        if stop > start:
            tiles = [slice(a, min(a + limit, stop)) for a in range(start, stop, limit)]
            yield _Chunk(first, last, slice(start, stop), tiles)
        first = last


class _Run:
    """One pass over a problem: its tiling, its buffers, and the arithmetic of one tile of rows."""

    def __init__(self, problem: Problem, statistics: tuple[str, ...]) -> None:
        self.problem = problem
        self.names = statistics
        self.dtype = problem.result_dtype
        rows = problem.hidden.shape[0]
        vocabulary, width = problem.weight.shape
        size = self.dtype.itemsize
        # Of the workspace, 6/8 hold logits, 1/8 the rows' hidden states, scaled states and
        # directions, and 1/8 a vocabulary tile's gradients and widened weights. None of it depends
        # on the number of rows: tiles decide the order of additions.
        eighth = problem.workspace_bytes // 8 // size
        self.row_limit = max(1, min(6 * eighth // vocabulary, eighth // (3 * width)))
        self.vocabulary_limit = min(vocabulary, max(1, eighth // (2 * self.row_limit + 2 * width)))
        self.chunks = list(_chunks(problem.groups, self.row_limit))
        self.kept: Tensor | None = None
        new = problem.hidden.new_empty
        self.logps = new(rows, dtype=self.dtype)
        self.lse = new(rows, dtype=self.dtype)
        self.statistics = new((len(statistics), rows), dtype=self.dtype)

    def result(self) -> Logps:
        return Logps(self.logps, self.lse, self.statistics)

    def new_gradients(self, wanted: Wanted) -> Gradients:
        p = self.problem
        return Gradients(
            p.hidden.new_zeros(p.hidden.shape, dtype=self.dtype) if wanted.hidden else None,
            p.weight.new_zeros(p.weight.shape, dtype=self.dtype) if wanted.weight else None,
            p.weight.new_zeros(p.weight.shape[0], dtype=self.dtype) if wanted.bias else None,
        )

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Vocabulary slices with their weights in the compute dtype."""
        weight = self.problem.weight
        for start in range(0, weight.shape[0], self.vocabulary_limit):
            tile = slice(start, min(start + self.vocabulary_limit, weight.shape[0]))
            yield tile, weight[tile].to(self.problem.compute_dtype)

    def logits(self, rows: slice) -> Tensor:
        """The transformed logits of a tile of rows, ``(n, V)`` in the result dtype; overwrites
        those of the tile before.
        """
        p = self.problem
        count = rows.stop - rows.start
        if self.kept is None:
            widest = max(tile.stop - tile.start for chunk in self.chunks for tile in chunk.tiles)
            self.kept = p.hidden.new_empty((widest, p.weight.shape[0]), dtype=self.dtype)
        logits = self.kept[:count]
        hidden = p.hidden[rows].to(p.compute_dtype)
        for tile, weight in self.tiles():
            part = logits[:, tile]
            self._product(hidden, weight.T, part)
            if p.bias is not None:
                part.add_(p.bias[tile].to(p.compute_dtype))
            p.head.transform_(part)
        return logits

    def forward(self, rows: slice) -> Tensor:
        """Log-probs and statistics of a tile of rows; returns its logits."""
        logits = self.logits(rows)
        lowest = torch.finfo(self.dtype).min
        # A row that is -inf throughout a tile (masked vocabulary) must not turn into inf - inf.
        top = logits.amax(dim=1).clamp_min_(lowest)
        norm, moments = self._moments(logits, top)
        lse = norm.log() + top
        target = logits.gather(1, self.problem.targets[rows, None]).squeeze(1)
        self.lse[rows] = lse
        self.logps[rows] = target - lse
        for line, name in zip(self.statistics, self.names, strict=True):
            if name == "entropy":
                line[rows] = norm.log() - moments["entropy"] / norm
            elif name == "mean_logits":
                line[rows] = moments["mean_logits"] / logits.shape[1]
            elif name == "aligned_logps":
                line[rows] = target - lse - (moments["aligned_logps"].log() - 2.0 * norm.log())
            else:
                line[rows] = (target >= top).to(self.dtype)
        return logits

    def _moments(self, logits: Tensor, top: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """``sum exp(z - top)`` and the sums that the statistics ask for, tile by tile."""
        norm = torch.zeros_like(top)
        moments = {name: torch.zeros_like(top) for name in self.names}
        for start in range(0, logits.shape[1], self.vocabulary_limit):
            part = logits[:, start : start + self.vocabulary_limit]
            weights = (part - top[:, None]).exp_()
            norm += weights.sum(dim=1)
            if "mean_logits" in moments:
                moments["mean_logits"] += part.sum(dim=1)
            if "entropy" in moments:
                # p log p is 0 at p = 0, where log p is -inf.
                shifted = (part - top[:, None]).clamp_min_(torch.finfo(self.dtype).min)
                moments["entropy"] += shifted.mul_(weights).sum(dim=1)
            if "aligned_logps" in moments:
                moments["aligned_logps"] += weights.square_().sum(dim=1)
        return norm, moments

    def accumulate(self, rows: slice, logits: Tensor, c: Tensor, sums: Gradients) -> None:
        """Add what a tile of rows with coefficients `c` contributes to each wanted gradient."""
        direction = self.backward(
            rows, logits, c, sums.weight, sums.bias, want_hidden=sums.hidden is not None
        )
        if sums.hidden is not None:
            torch.mul(direction, c[:, None], out=sums.hidden[rows])

    def backward(
        self,
        rows: slice,
        logits: Tensor,
        c: Tensor | None,
        weight_sum: Tensor | None,
        bias_sum: Tensor | None,
        *,
        want_hidden: bool,
    ) -> Tensor:
        """``d logp / d hidden`` of a tile of rows, ``(n, H)`` (empty unless wanted); adds
        ``c``-weighted dWeight and dBias to the sums.
        """
        p = self.problem
        # As the forward pass saw them: autocast rounds hidden states here too.
        hidden = p.hidden[rows].to(p.compute_dtype).to(self.dtype)
        scaled = hidden * c[:, None] if c is not None and weight_sum is not None else None
        direction = torch.zeros_like(hidden) if want_hidden else hidden.new_empty(0)
        targets, lse = p.targets[rows], self.lse[rows, None]
        line = torch.arange(len(targets), device=targets.device)
        for tile, weight in self.tiles():
            part = logits[:, tile]
            # onehot - softmax, then through the transform
            g = (part - lse).exp_().neg_()
            here = targets - tile.start
            inside = ((here >= 0) & (here < g.shape[1])).to(g.dtype)
            g.index_put_((line, here.clamp(0, g.shape[1] - 1)), inside, accumulate=True)
            p.head.scale_by_slope_(g, part)
            if want_hidden:
                self._add_product(g, weight, direction)
            if scaled is not None and weight_sum is not None:
                self._add_product(g.T, scaled, weight_sum[tile])
            if c is not None and bias_sum is not None:
                bias_sum[tile] += c @ g
        return direction

    def _product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out = a @ b``, accumulated in the result dtype."""
        if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
            out.copy_(torch.mm(a, b, out_dtype=self.dtype))
        else:
            torch.mm(a.to(self.dtype), b.to(self.dtype), out=out)

    def _add_product(self, a: Tensor, b: Tensor, total: Tensor) -> None:
        """``total += a @ b`` in the result dtype, through the tensor cores where the compute dtype
        is bfloat16.

        float16 is widened instead: its range does not hold small coefficients.
        """
        if a.is_cuda and self.problem.compute_dtype == torch.bfloat16:
            total.add_(torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=self.dtype))
        else:
            total.addmm_(a.to(self.dtype), b.to(self.dtype))
