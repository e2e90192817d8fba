"""One pass of the Triton engine over a problem: chunks of rows through the kernels, in order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpop.engines.base import (
    STATISTICS,
    Coefficients,
    Gradients,
    Logps,
    PairLossPlan,
    Problem,
    Wanted,
)
from fastdpop.kernels import combine as combining
from fastdpop.kernels import config, gradients, losses, pair_loss, repair, target_logit, tiles
from fastdpop.kernels import forward as forwarding
from fastdpop.kernels.forward import Forward, Transform

LOG2E = math.log2(math.e)

NOISE = 2.0**-14
"""Bound on a 16-bit product's error, relative to the logit: its order of summation may be another,
and tensor cores cut what they add."""

_ROOM = 13
"""In float16, the largest number that is kept of a row is about 2**13, of at most 65,504."""


def transform_of(problem: Problem) -> Transform:
    """The head's transform in the kernels' terms."""
    head = problem.head
    slope = head.logit_scale / head.temperature
    if head.softcap is None:
        return Transform(scale=slope * LOG2E, cap=1.0, softcap=False, slope=slope)
    return Transform(
        scale=head.softcap / head.temperature * LOG2E,
        cap=head.logit_scale / head.softcap,
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


def pieces(rows: slice, limit: int) -> Iterator[slice]:
    """Slices of at most so many rows."""
    for start in range(rows.start, rows.stop, limit):
        yield slice(start, min(start + limit, rows.stop))


class Pass:
    """Operands as the kernels take them, limits, and results.

    Args:
        products, forward: the engine's choices.
    """

    def __init__(
        self, problem: Problem, statistics: tuple[str, ...], products: str, forward: str
    ) -> None:
        self.problem, self.names = problem, statistics
        self.products, self.forward = products, forward
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

        new = problem.hidden.new_empty
        self.logps = new(rows, dtype=torch.float32)
        self.lse = new(rows, dtype=torch.float32)
        self.statistics = new((len(statistics), rows), dtype=torch.float32)
        self.accumulate = False
        self._memory: Tensor | None = None

    def _limit(self, row: int) -> int:
        """Rows of so many bytes that fit, whole tiles where that is possible."""
        rows = max(1, self.problem.workspace_bytes // row)
        whole = self.config.forward.n
        return rows if rows < whole else rows - rows % whole

    def chunks(self, limit: int) -> Iterator[tuple[int, int, slice]]:
        """Whole groups (first, last, rows) of at most so many rows, or none; a larger group by
        itself.
        """
        groups, first = self.problem.groups, 0
        while first < len(groups) - 1:
            last = first + 1
            while last < len(groups) - 1 and groups[last + 1] - groups[first] <= limit:
                last += 1
            yield first, last, slice(groups[first], groups[last])
            first = last

    def result(self) -> Logps:
        """What the forward pass gave."""
        return Logps(self.logps, self.lse, self.statistics)

    def new_gradients(self, wanted: Wanted) -> Gradients:
        """dHidden starts from 0 (rows may be skipped); the first chunk overwrites the others. As
        wide as the operands.
        """
        p = self.problem
        new = p.hidden.new_empty
        vocabulary, width = self.weight.shape
        return Gradients(
            p.hidden.new_zeros((len(p.hidden), width), dtype=torch.float32)
            if wanted.hidden
            else None,
            new((vocabulary, width), dtype=torch.float32) if wanted.weight else None,
            new(vocabulary, dtype=torch.float32) if wanted.bias else None,
        )

    def finish(self, sums: Gradients) -> Gradients:
        """The gradients in their own shape; 0 where no row has added."""
        for total in (sums.weight, sums.bias):
            if total is not None and not self.accumulate:
                total.zero_()
        width = self.problem.hidden.shape[1]
        hidden, weight = (
            m if m is None or m.shape[1] == width else m[:, :width].contiguous()
            for m in (sums.hidden, sums.weight)
        )
        return Gradients(hidden, weight, sums.bias)

    def kept(self, rows: int) -> Tensor:
        """Memory for what the forward product keeps of that many rows; one piece serves all."""
        if self._memory is None:
            most = min(self.kept_rows, len(self.logps))
            self._memory = self.problem.hidden.new_empty((most, self.kept_width), dtype=self.dtype)
        return self._memory[:rows]

    def product(self, hidden: Tensor, kept: Tensor | None) -> Any:
        """The launcher of the forward product: the one that was asked for, if it takes these
        operands.
        """
        if self.forward == "gluon":
            # Gluon is experimental, and its names still change; the plain kernel does without it.
            from fastdpop.kernels import gluon_forward

            if gluon_forward.supported(hidden, self.weight, kept, self.config) is None:
                return gluon_forward.forward
        return forwarding.forward

    def chunk(self, rows: slice) -> _Chunk:
        """Consecutive rows."""
        p = self.problem
        return _Chunk(self, operand(p.hidden[rows], self.dtype), p.targets[rows], rows)

    def fill_in(self, rows: slice, softmax: combining.Softmax) -> None:
        """Log-probs and statistics of rows."""
        self.logps[rows] = softmax.logps
        self.lse[rows] = softmax.lse
        for line, name in zip(self.statistics, self.names, strict=True):
            assert softmax.statistics is not None
            line[rows] = softmax.statistics[STATISTICS.index(name)]

    def forward_only(self, rows: slice) -> None:
        """Log-probs and statistics of rows, keeping nothing."""
        for piece in pieces(rows, self.forward_rows):
            _, softmax = self.chunk(piece).forward(keep=False)
            self.fill_in(piece, softmax)

    def dlogp_dhidden(self, out: Tensor) -> None:
        """Log-probs and the derivative of each with respect to its hidden states, into `out`."""
        for rows in pieces(self.everything, self.kept_rows):
            chunk = self.chunk(rows)
            if self.dtype == torch.float16:
                self.forward_only(rows)
                done, softmax = chunk.forward_again(self.lse[rows])
            else:
                done, softmax = chunk.forward(keep=True)
                self.fill_in(rows, softmax)
            chunk.add_hidden(done, softmax.row_scale * -self.transform.slope, out)

    def one_pass(self, coefficients: Coefficients, sums: Gradients) -> None:
        """Log-probs, and gradients of a loss that is known once a group's log-probs are."""
        pairs = self._pairs(getattr(coefficients, "plan", None))
        twice = self.dtype == torch.float16
        limit = self.forward_rows if twice else self.kept_rows

        def dlogp_of(first: int, last: int, rows: slice) -> Tensor:
            if pairs is not None:
                return pairs.dlogp(first, last, rows)
            return coefficients(first, last, self.logps[rows], self.statistics[:, rows]).float()

        for first, last, rows in self.chunks(limit):
            if rows.start == rows.stop:
                # Nothing to differentiate, but pairs without scored tokens have a loss.
                if pairs is not None:
                    pairs.dlogp(first, last, rows)
            elif twice or rows.stop - rows.start > self.kept_rows:
                self.forward_only(rows)
                self.recompute(rows, dlogp_of(first, last, rows), sums)
            else:
                chunk = self.chunk(rows)
                done, softmax = chunk.forward(keep=True)
                self.fill_in(rows, softmax)
                chunk.add_gradients(done, softmax, dlogp_of(first, last, rows), sums)
        if pairs is not None:
            pairs.hand_over()

    def recompute(self, rows: slice, dlogp: Tensor, sums: Gradients) -> None:
        """Gradients of rows whose `dlogp` ``(n,)`` is known, and whose `lse` is; rows where it is 0
        are skipped.
        """
        p = self.problem
        order = torch.argsort((dlogp == 0).to(torch.int8), stable=True)
        active = (dlogp != 0).sum()
        for piece in pieces(slice(0, len(dlogp)), self.kept_rows):
            own = order[piece]
            places = own + rows.start
            chunk = _Chunk(
                self,
                operand(p.hidden.index_select(0, places), self.dtype),
                p.targets.index_select(0, places),
                rows,
                places=places,
                num_active=(active - piece.start).clamp(0, len(own)).to(torch.int32),
            )
            done, softmax = chunk.forward_again(self.lse.index_select(0, places))
            chunk.add_gradients(done, softmax, dlogp.index_select(0, own), sums)

    def _pairs(self, plan: PairLossPlan | None) -> _PairLoss | None:
        """The loss's kernel, if it has one and the caller offers what it needs."""
        if plan is None:
            return None
        found = losses.jitted(plan.loss, plan.options)
        return None if found is None else _PairLoss(self, plan, *found)


class _Chunk:
    """Rows that go through together.

    `places` says where each row's gradient goes, where that is not `rows`; from row `num_active`
    on (``()`` int32, on the device), rows are not wanted.
    """

    def __init__(
        self,
        run: Pass,
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
        """The product and its combined sums, with the targets' logits for references."""
        run = self.run
        reference = target_logit.target_logit(*self.operands, run.transform)
        done = self._product(reference, keep, bool(run.names))
        vocabulary = len(run.weight)
        softmax = combining.combine(done, self.targets, run.transform, vocabulary)
        repair.repair(done, *self.operands, run.transform, run.config, softmax.rest)
        combining.combine(done, self.targets, run.transform, vocabulary, again=softmax)
        return done, softmax

    def forward_again(self, lse: Tensor) -> tuple[Forward, combining.Softmax]:
        """The same with references that are known from `lse` ``(n,)``: nothing overflows.

        In float16 the other tokens' part of the softmax is brought to the upper end of its range, as
        far as that part is known: `NOISE` is what the difference of two logits leaves open.
        """
        run = self.run
        reference = lse * LOG2E
        if run.dtype == torch.float16:
            target = target_logit.target_logit(*self.operands, run.transform, rounded=False)
            noise = NOISE * (1.0 + lse.abs())
            others = -torch.expm1((target - reference) / LOG2E)
            # At most 1, so that nothing exceeds the range even if the noise is all there is.
            others = (others.clamp_min(noise) + noise).clamp_max(1.0)
            reference = reference + others.log2() - _ROOM
        done = self._product(reference.round_(), True, False)
        return done, combining.combine(done, self.targets, run.transform, len(run.weight))

    def _product(self, reference: Tensor, keep: bool, statistics: bool) -> Forward:
        run = self.run
        kept = run.kept(len(self.targets)) if keep else None
        return run.product(self.hidden, kept)(
            *self.operands,
            reference,
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

    def add_gradients(
        self, done: Forward, softmax: combining.Softmax, dlogp: Tensor, sums: Gradients
    ) -> None:
        """Add what these rows contribute to each wanted gradient."""
        run, kept = self.run, done.exp_logits
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


@dataclass
class _PairLoss:
    """A loss that has a kernel, on its way through a problem."""

    run: Pass
    plan: PairLossPlan
    function: Any
    numbers: tuple[float, float, float]

    def __post_init__(self) -> None:
        plan = self.plan
        self.pairs = pair_loss.Pairs(
            plan.offsets, plan.order, plan.reference, self.function, self.numbers, plan.share
        )
        count = len(plan.order)
        self.losses = plan.reference.new_empty(count)
        self.sequence_logps = plan.reference.new_empty(2 * count)

    def dlogp(self, first: int, last: int, rows: slice) -> Tensor:
        """Of the rows of pairs ``first`` to ``last - 1``, whose log-probs are known."""
        return pair_loss.pair_loss(
            self.run.logps[rows],
            self.pairs,
            rows.start,
            first,
            last,
            self.losses,
            self.sequence_logps,
        )

    def hand_over(self) -> None:
        """Give the caller the losses and the sequences' log-probs."""
        self.plan.losses, self.plan.sums = self.losses, self.sequence_logps
