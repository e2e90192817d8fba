"""The mathematics of whole pairs: from log-probs of rows to a loss, and back to one derivative per
row.

    logps (N,)  ->  sequence log-probs (S,)  ->  PairLogps (P,)  ->  losses (P,)  ->  their mean
    dlogp (N,)  <-  dL/ds (S,)               <-  autograd, through a few numbers

Everything between the rows' log-probs and the loss is float64, whatever the lm_head computes in. The
loss itself is :mod:`fastdpop.losses`'; which row counts for which sequence is :mod:`fastdpop.rows`'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpop import losses
from fastdpop.engines.base import PairLossPlan, RowValues
from fastdpop.losses.base import WEIGHT, PairLogps, PreferenceLoss, by_pair
from fastdpop.rows import Rows, wide_dtype


class Totals(NamedTuple):
    """Whole-batch numbers that a loss may be normalised by; 0-d float tensors."""

    pairs: Tensor
    sides: Tensor
    chosen_tokens: Tensor

    @staticmethod
    def of(rows: Rows) -> Totals:
        """The totals of a batch."""
        dtype = wide_dtype(rows.index.device)
        chosen, present = _side(rows, rows.lengths, 0)
        return Totals(
            pairs=present.new_full((), len(rows.pairs), dtype=dtype),
            sides=(rows.pairs >= 0).sum().to(dtype),
            chosen_tokens=chosen.sum().to(dtype),
        )

    def numbers(self) -> tuple[int, int, int]:
        """On the host, in the order of the fields; waits for the device."""
        return int(self.pairs), int(self.sides), int(self.chosen_tokens)

    @staticmethod
    def given(numbers: Sequence[float], device: torch.device) -> Totals:
        """Of numbers that are known on the host, in the order of the fields."""
        return Totals(*torch.tensor(numbers, dtype=wide_dtype(device), device=device).unbind())


@dataclass(frozen=True)
class PairLoss:
    """The loss of a batch of pairs, as a function of log-probs.

    Attributes:
        rows: the layout of the whole batch, P pairs of S sequences of N rows.
        function: the loss.
        totals: those of the batch.
        ref_logps: ``(2, P)`` reference log-probs of chosen and rejected, float64 or float32, None
            without a reference; anything, NaN included, where a side is absent.
        kl: 0-d, KTO's reference point.
        statistics: the names of the rows' statistics.
        mean: average over pairs instead of summing.
        count: pairs that a mean is over, where there are others beside these.
        summed: adds up what is known of each sequence ``(S,)`` over the processes that hold parts of it, where
            there are several; :meth:`dlogp` is then of no use.
        values: ``(P,)`` numbers that the data give for each pair, by name.
    """

    rows: Rows
    function: PreferenceLoss
    totals: Totals
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    statistics: tuple[str, ...] = ()
    mean: bool = True
    count: int | None = None
    summed: Callable[[Tensor], Tensor] | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Factor of a pair's loss in the total."""
        count = len(self.rows.pairs) if self.count is None else self.count
        return 1.0 / count if self.mean else 1.0

    def pairs(self, sequence_logps: Tensor, statistics: Tensor) -> PairLogps:
        """What the loss reads, of all pairs, from ``(S,)`` log-probs and ``(K, N)`` row
        statistics; differentiable.
        """
        return self._pairs(
            self.rows,
            sequence_logps,
            statistics,
            self.ref_logps,
            self.values,
            self.lengths,
            self.summed,
        )

    @property
    def lengths(self) -> Tensor:
        """``(S,)`` number of scored tokens of each sequence."""
        return self.rows.lengths if self.summed is None else self.summed(self.rows.lengths)

    def losses(self, sequence_logps: Tensor, statistics: Tensor) -> Tensor:
        """The loss of every pair, ``(P,)``; differentiable.

        Raises:
            ValueError: the loss is not one differentiable number per pair.
        """
        return self.of_pairs(self.pairs(sequence_logps, statistics))

    def total(self, sequence_logps: Tensor, statistics: Tensor) -> Tensor:
        """The loss of the batch, 0-d."""
        return self.losses(sequence_logps, statistics).sum() * self.share

    def dlogp(self, first: int, last: int, values: RowValues) -> Tensor:
        """The derivatives of the loss with respect to the log-probs of the n rows of groups
        ``first`` to ``last - 1``; ``(n,)`` float64. See
        :class:`~fastdpop.engines.base.GroupLoss`.
        """
        part = self.rows.part(first, last)
        own = self.rows.order[self.rows.groups[2, first] : self.rows.groups[2, last]]
        ref_logps = None if self.ref_logps is None else self.ref_logps[:, own]
        sums = part.sum_per_sequence(values.logps).requires_grad_()
        of_pairs = {name: value[own] for name, value in self.values.items()}
        pairs = self._pairs(part, sums, values.statistics, ref_logps, of_pairs)
        total = self.of_pairs(pairs).sum() * self.share
        return part.sum_per_row(torch.autograd.grad(total, sums)[0].detach())

    def plan(self) -> PairLossPlan | None:
        """The loss in plain numbers, if every group is one pair with two sides, unweighted tokens
        and no values.
        """
        if self.ref_logps is None or self.rows.weights is not None or self.values:
            return None
        kind = type(self.function)
        # The package's own: a user's class may have the name of one.
        if getattr(losses, kind.__name__, None) is not kind or not self.rows.one_pair_per_group():
            return None
        options = dataclasses.fields(self.function)  # type: ignore[arg-type]
        wide = wide_dtype(self.ref_logps.device)
        return PairLossPlan(
            offsets=self.rows.offsets,
            order=self.rows.order,
            ref_logps=self.ref_logps.to(wide).contiguous(),
            rounded=self.ref_logps.dtype != wide,
            loss=kind.__name__,
            options={f.name: getattr(self.function, f.name) for f in options},
            share=self.share,
        )

    def of_pairs(self, pairs: PairLogps) -> Tensor:
        """The loss of each of these pairs, ``(P,)``, times its weight if it has one; differentiable."""
        if len(pairs.chosen) == 0:
            return pairs.chosen  # a user's function need not know what to do without pairs
        values = by_pair(self.function, pairs)
        weight = pairs.values.get(WEIGHT)
        return values if weight is None else values * weight

    def _pairs(
        self,
        part: Rows,
        sequence_logps: Tensor,
        statistics: Tensor,
        ref_logps: Tensor | None,
        values: Mapping[str, Tensor],
        lengths: Tensor | None = None,
        summed: Callable[[Tensor], Tensor] | None = None,
    ) -> PairLogps:
        """The same for a part of the batch, whose reference log-probs are `ref_logps`, and its values these."""
        aligned = None
        if "aligned_logps" in self.statistics:
            line = statistics[self.statistics.index("aligned_logps")]
            aligned = part.unweighted().sum_per_sequence(line)
            aligned = aligned if summed is None else summed(aligned)
        return pair_logps(
            part,
            sequence_logps,
            self.totals,
            ref_logps=ref_logps,
            aligned=aligned,
            kl=self.kl,
            lengths=lengths,
            values=values,
        )


def pair_logps(
    rows: Rows,
    sequence_logps: Tensor,
    totals: Totals,
    *,
    ref_logps: Tensor | None = None,
    aligned: Tensor | None = None,
    kl: Tensor | None = None,
    lengths: Tensor | None = None,
    values: Mapping[str, Tensor],
) -> PairLogps:
    """Gather the two sides of every pair.

    Args:
        rows: the layout, with P pairs of S sequences.
        sequence_logps: ``(S,)`` policy log-probs, differentiable.
        totals: those of the whole batch, of which `rows` may be a part.
        ref_logps: ``(2, P)`` reference log-probs of chosen and rejected.
        aligned: ``(S,)`` token sums of the `aligned_logps` statistic.
        kl: 0-d, KTO's reference point.
        lengths: ``(S,)`` tokens of each sequence; by default those that are rows.
        values: ``(P,)`` numbers of each pair, by name.
    """
    if lengths is None:
        lengths = rows.lengths
    chosen, chosen_present = _side(rows, sequence_logps, 0)
    rejected, rejected_present = _side(rows, sequence_logps, 1)
    dtype = sequence_logps.dtype
    ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_lengths=_side(rows, lengths, 0)[0].to(dtype),
        rejected_lengths=_side(rows, lengths, 1)[0].to(dtype),
        ref_chosen=None if ref_chosen is None else _masked(ref_chosen, chosen_present),
        ref_rejected=None if ref_rejected is None else _masked(ref_rejected, rejected_present),
        chosen_aligned_logps=None if aligned is None else _side(rows, aligned, 0)[0],
        rejected_aligned_logps=None if aligned is None else _side(rows, aligned, 1)[0],
        chosen_present=chosen_present,
        rejected_present=rejected_present,
        kl=None if kl is None else kl.to(dtype),
        batch_pairs=totals.pairs,
        batch_sides=totals.sides,
        batch_chosen_tokens=totals.chosen_tokens,
        values=values,
    )


def _side(rows: Rows, sequence_values: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """One side of every pair, 0 where it is absent, and a mask of where it is present."""
    sequence = rows.pairs[:, side]
    present = sequence >= 0
    values = sequence_values[sequence.clamp_min(0)]
    return _masked(values, present), present


def _masked(values: Tensor, present: Tensor) -> Tensor:
    """The values, 0 where a side is absent (a product would leave NaN and infinity there)."""
    return torch.where(present, values, torch.zeros_like(values))
