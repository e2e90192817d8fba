"""One pass of the Triton engine over a problem: chunks of rows through the kernels, in order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpop.engines.base import (
    STATISTICS,
    Gradients,
    GroupLoss,
    NeedsGrad,
    PairLossPlan,
    Problem,
    RowValues,
)
from fastdpop.engines.chunks import Chunk, Pass, pieces_of, plan, rows_that_fit
from fastdpop.kernels import combine as combining
from fastdpop.kernels import config, gradients, losses, pair_loss, repair, target_logit, tiles
from fastdpop.kernels import forward as forwarding
from fastdpop.kernels.forward import Forward, Transform

LOG2E = math.log2(math.e)

NOISE = 2.0**-14
"""Bound on a 16-bit product's error, relative to the logit: its order of summation may be another,
and tensor cores cut what they add."""

ROOM = 13
"""In float16, the largest number that is kept of a row is about 2**13, of at most 65,504."""


def transform_of(problem: Problem) -> Transform:
    """The transform of the logits in the kernels' terms."""
    t = problem.transform
    slope = t.logit_scale / t.temperature
    if t.softcap is None:
        return Transform(scale=slope * LOG2E, cap=1.0, softcap=False, slope=slope)
    return Transform(
        scale=t.softcap / t.temperature * LOG2E,
        cap=t.logit_scale / t.softcap,
        softcap=True,
        slope=slope,
    )


def operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix as the kernels take it: itself, or a copy in another dtype, with rows that begin at
    multiples of 16 bytes, and columns of 0 up to a multiple of 8.
    """
    matrix = matrix.to(dtype)
    if len(matrix) == 0 or tiles.aligned(matrix):
        return matrix
    width = matrix.shape[1]
    copy = matrix.new_zeros((len(matrix), -(-width // 8) * 8))
    copy[:, :width] = matrix
    return copy


class TritonPass(Pass["Kept | None"]):
    """One pass over a problem: operands as the kernels take them, limits, and results.

    What is kept of a chunk is its softmax, up to a factor per row, where it goes through at once
    and in a dtype with the range for it.

    Args:
        products, product: the engine's choices.
    """

    def __init__(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        needs_grad: NeedsGrad,
        products: str,
        product: str,
    ) -> None:
        super().__init__(problem, statistics)
        self.needs_grad, self.products, self.product = needs_grad, products, product
        self.dtype = dtype = problem.compute_dtype
        self.config = config.of(config.target_of(problem.hidden.device), dtype)
        self.transform = transform_of(problem)
        self.weight = operand(problem.weight, dtype)
        self.bias = None
        if problem.bias is not None:
            self.bias = forwarding.padded_bias(problem.bias.to(dtype), self.config)
        (rows, width), vocabulary = problem.hidden.shape, len(problem.weight)
        self.everything = slice(0, rows)

        # A row of scratch memory: partial sums (twice, for the repair), and a few numbers; with
        # what is kept, also the row of hidden states converted and scaled, and a product.
        tile_count = -(-vocabulary // self.config.forward.v)
        partial = tile_count * 4 * (6 if statistics else 2) + 64
        self.forward_rows = self._limit(partial + width * dtype.itemsize)
        self.kept_width = forwarding.kept_width(vocabulary, self.config)
        kept = (self.kept_width + 2 * width) * dtype.itemsize + 4 * width + partial
        self.kept_rows = self._limit(kept)

        self.gradients = self._new_gradients()
        self.accumulate = False
        self._memory: Tensor | None = None

    def _limit(self, bytes_per_row: int) -> int:
        """Rows of so many bytes that fit, whole tiles where that is possible."""
        return rows_that_fit(
            self.problem.workspace_bytes, bytes_per_row, multiple=self.config.forward.n
        )

    def _new_gradients(self) -> Gradients:
        """dHidden starts from 0 (rows may be skipped); the first chunk overwrites the others. As
        wide as the operands.
        """
        p, needs_grad = self.problem, self.needs_grad
        new = p.hidden.new_empty
        vocabulary, width = self.weight.shape
        hidden = weight = bias = None
        if needs_grad.hidden:
            hidden = p.hidden.new_zeros((len(p.hidden), width), dtype=torch.float32)
        if needs_grad.weight:
            weight = new((vocabulary, width), dtype=torch.float32)
        if needs_grad.bias:
            bias = new(vocabulary, dtype=torch.float32)
        return Gradients(hidden, weight, bias)

    @property
    def row_limit(self) -> int:
        """Rows of whole groups that go through at once."""
        return self.forward_rows if self.twice else self.kept_rows

    @property
    def twice(self) -> bool:
        """Whether every group goes through the forward product twice."""
        return self.dtype == torch.float16

    def chunks(self) -> list[Chunk]:
        """As many rows as what is kept of them fits."""
        return plan(self.problem.groups, self.problem.chunk_rows or self.row_limit)

    def forward(self, chunk: Chunk) -> Kept | None:
        """Log-probs and statistics of a chunk, and what is kept of it."""
        if not chunk.pieces:
            return None
        if self.twice or not chunk.whole:
            self.forward_only(chunk.rows)
            return None
        own = self.part(chunk.rows)
        done, softmax = own.forward(keep=True)
        self.fill_in(chunk.rows, softmax)
        return Kept(own, done, softmax)

    def backward(self, chunk: Chunk, kept: Kept | None, dlogp: Tensor) -> None:
        """Add the gradients of a chunk's rows."""
        if kept is not None:
            kept.part.add_gradients(kept.done, kept.softmax, dlogp)
        elif chunk.pieces:
            self.recompute(chunk.rows, dlogp)

    def finished(self) -> Gradients:
        """The gradients in their own shape; 0 where no row has added."""
        hidden, weight, bias = self.gradients
        for total in (weight, bias):
            if total is not None and not self.accumulate:
                total.zero_()
        width = self.problem.hidden.shape[1]
        hidden, weight = (
            m if m is None or m.shape[1] == width else m[:, :width].contiguous()
            for m in (hidden, weight)
        )
        return Gradients(hidden, weight, bias)

    def memory(self, rows: int) -> Tensor:
        """Memory for what the forward product keeps of that many rows; one piece serves all."""
        if self._memory is None:
            most = min(self.kept_rows, len(self.logps))
            self._memory = self.problem.hidden.new_empty((most, self.kept_width), dtype=self.dtype)
        return self._memory[:rows]

    def launcher(self, hidden: Tensor, kept: Tensor | None) -> Any:
        """The launcher of the forward product: the one that was asked for, if it takes these
        operands.
        """
        if self.product == "gluon":
            # Gluon is experimental, and its names still change; the plain kernel does without it.
            from fastdpop.kernels import gluon_forward

            if gluon_forward.supported(hidden, self.weight, kept, self.config) is None:
                return gluon_forward.forward
        return forwarding.forward

    def part(self, rows: slice) -> TritonRows:
        """Consecutive rows."""
        p = self.problem
        return TritonRows(self, operand(p.hidden[rows], self.dtype), p.targets[rows], rows)

    def fill_in(self, rows: slice, softmax: combining.Softmax) -> None:
        """Log-probs and statistics of rows."""
        self.logps[rows] = softmax.logps
        self.lse[rows] = softmax.lse
        for line, name in zip(self.statistics, self.names, strict=True):
            assert softmax.statistics is not None
            line[rows] = softmax.statistics[STATISTICS.index(name)]

    def forward_only(self, rows: slice) -> None:
        """Log-probs and statistics of rows, keeping nothing."""
        for piece in pieces_of(rows, self.forward_rows):
            _, softmax = self.part(piece).forward(keep=False)
            self.fill_in(piece, softmax)

    def dlogp_dhidden(self, out: Tensor) -> None:
        """Log-probs and the derivative of each with respect to its hidden states, into `out`."""
        for piece in pieces_of(self.everything, self.kept_rows):
            own = self.part(piece)
            if self.twice:
                self.forward_only(piece)
                done, softmax = own.forward_again(self.lse[piece])
            else:
                done, softmax = own.forward(keep=True)
                self.fill_in(piece, softmax)
            own.add_hidden(done, softmax.row_scale * -self.transform.slope, out)

    def recompute(self, rows: slice, dlogp: Tensor) -> None:
        """Add the gradients of rows whose `dlogp` ``(n,)`` is known, and whose `lse` is; rows where
        it is 0 are skipped.
        """
        p = self.problem
        order = torch.argsort((dlogp == 0).to(torch.int8), stable=True)
        active = (dlogp != 0).sum()
        for piece in pieces_of(slice(0, len(dlogp)), self.kept_rows):
            own = order[piece]
            places = own + rows.start
            part = TritonRows(
                self,
                operand(p.hidden.index_select(0, places), self.dtype),
                p.targets.index_select(0, places),
                rows,
                places=places,
                num_active=(active - piece.start).clamp(0, len(own)).to(torch.int32),
            )
            done, softmax = part.forward_again(self.lse.index_select(0, places))
            part.add_gradients(done, softmax, dlogp.index_select(0, own))

    def pair_loss(self, plan: PairLossPlan | None) -> PairLossKernel | None:
        """The loss's kernel, if it has one and the caller offers what it needs."""
        if plan is None:
            return None
        found = losses.jitted(plan.loss, plan.options)
        return None if found is None else PairLossKernel(self, plan, *found)


class TritonRows:
    """Rows that go through together.

    `places` says where each row's gradient goes, where that is not `rows`; from row `num_active`
    on (``()`` int32, on the device), rows are not needed.
    """

    def __init__(
        self,
        run: TritonPass,
        hidden: Tensor,
        targets: Tensor,
        rows: slice,
        *,
        places: Tensor | None = None,
        num_active: Tensor | None = None,
    ) -> None:
        self.run, self.hidden, self.targets, self.rows = run, hidden, targets, rows
        self.places, self.num_active = places, num_active
        self.operands = (hidden, run.weight, run.bias, targets)

    def forward(self, *, keep: bool) -> tuple[Forward, combining.Softmax]:
        """The product and its combined sums, with the targets' logits for shifts."""
        run = self.run
        shift = target_logit.target_logit(*self.operands, run.transform)
        done = self._product(shift, keep, bool(run.names))
        vocabulary = len(run.weight)
        softmax = combining.combine(done, self.targets, run.transform, vocabulary)
        repair.repair(done, *self.operands, run.transform, run.config, softmax.rest)
        combining.combine(done, self.targets, run.transform, vocabulary, again=softmax)
        return done, softmax

    def forward_again(self, lse: Tensor) -> tuple[Forward, combining.Softmax]:
        """The same with shifts that are known from `lse` ``(n,)``: nothing overflows.

        In float16 the other tokens' part of the softmax is brought to the upper end of its range, as
        far as that part is known: `NOISE` is what the difference of two logits leaves open.
        """
        run = self.run
        shift = lse * LOG2E
        if run.dtype == torch.float16:
            target = target_logit.target_logit(*self.operands, run.transform, rounded=False)
            noise = NOISE * (1.0 + lse.abs())
            others = -torch.expm1((target - shift) / LOG2E)
            # At most 1, so that nothing exceeds the range even if the noise is all there is.
            others = (others.clamp_min(noise) + noise).clamp_max(1.0)
            shift = shift + others.log2() - ROOM
        done = self._product(shift.round_(), True, False)
        return done, combining.combine(done, self.targets, run.transform, len(run.weight))

    def _product(self, shift: Tensor, keep: bool, statistics: bool) -> Forward:
        run = self.run
        kept = run.memory(len(self.targets)) if keep else None
        return run.launcher(self.hidden, kept)(
            *self.operands,
            shift,
            run.transform,
            run.config,
            exp_logits=kept,
            statistics=statistics,
            num_active=self.num_active,
        )

    def _cublas(self) -> bool:
        run = self.run
        return run.products == "auto" and gradients.by_cublas(run.dtype, self.num_active)

    def add_hidden(self, done: Forward, factor: Tensor, out: Tensor) -> None:
        """``factor * (exp_logits @ weight)`` into these rows' places in `out` ``(N, H or more)``."""
        run, places = self.run, self.places
        assert done.exp_logits is not None
        target = out if places is not None else out[self.rows]
        width = run.weight.shape[1]
        if places is not None or out.shape[1] != width or not tiles.aligned(target):
            # Rows that are skipped are not written.
            target = factor.new_zeros((len(factor), width), dtype=out.dtype)
        gradients.hidden_gradient(
            done.exp_logits,
            run.weight,
            factor,
            target,
            run.config,
            num_active=self.num_active,
            cublas=self._cublas(),
        )
        if places is not None:
            out.index_copy_(0, places, target[:, : out.shape[1]])
        elif target.data_ptr() != out[self.rows].data_ptr():
            out[self.rows] = target[:, : out.shape[1]]

    def add_gradients(self, done: Forward, softmax: combining.Softmax, dlogp: Tensor) -> None:
        """Add what these rows contribute to each gradient."""
        run, kept, sums = self.run, done.exp_logits, self.run.gradients
        assert kept is not None
        factor = gradients.factors(dlogp, softmax.row_scale, run.transform.slope)
        if sums.hidden is not None:
            self.add_hidden(done, factor, sums.hidden)
        if sums.bias is not None:
            gradients.bias_gradient(kept, factor, sums.bias, accumulate=run.accumulate)
        if sums.weight is not None:
            gradients.weight_gradient(
                kept,
                self.hidden,
                factor,
                sums.weight,
                run.config,
                accumulate=run.accumulate,
                num_active=self.num_active,
                cublas=self._cublas(),
            )
        run.accumulate = True


@dataclass(frozen=True)
class Kept:
    """What is kept of a chunk between its log-probs and its gradients."""

    part: TritonRows
    done: Forward
    softmax: combining.Softmax


class PairLossKernel:
    """A loss that has a kernel, on its way through a problem.

    Attributes:
        losses: ``(P,)`` and sequence_logps: ``(2P,)``: filled in chunk by chunk.
    """

    def __init__(
        self,
        run: TritonPass,
        plan: PairLossPlan,
        function: Any,
        numbers: tuple[float, float, float],
    ) -> None:
        self.run = run
        self.pairs = pair_loss.Pairs(
            plan.offsets,
            plan.order,
            plan.ref_logps,
            plan.rounded,
            function,
            numbers,
            plan.share,
        )
        count = len(plan.order)
        self.losses = plan.ref_logps.new_empty(count, dtype=torch.float32)
        self.sequence_logps = plan.ref_logps.new_empty(2 * count)

    def group_loss(self) -> GroupLoss:
        """The loss as a pass takes it: group i is pair i."""
        return GroupLoss(self._dlogp)

    def _dlogp(self, first: int, last: int, values: RowValues) -> Tensor:
        """Of the rows of pairs ``first`` to ``last - 1``; without rows, pairs still have a loss."""
        return pair_loss.pair_loss(
            values.logps,
            self.pairs,
            self.run.problem.groups[first],
            first,
            last,
            self.losses,
            self.sequence_logps,
        )
