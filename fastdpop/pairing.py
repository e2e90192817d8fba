"""From sequence log-probs to the pairs that a loss sees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpop.losses.base import PairLogps
from fastdpop.rows import Rows


class Totals(NamedTuple):
    """Whole-batch numbers that a loss may be normalised by; 0-d float tensors."""

    pairs: Tensor
    sides: Tensor
    chosen_tokens: Tensor

    @staticmethod
    def of(rows: Rows, dtype: torch.dtype) -> Totals:
        """The totals of a batch."""
        chosen, present = _side(rows, rows.lengths, 0)
        return Totals(
            pairs=present.new_full((), len(rows.pairs), dtype=dtype),
            sides=(rows.pairs >= 0).sum().to(dtype),
            chosen_tokens=chosen.sum().to(dtype),
        )


def pair_logps(
    rows: Rows,
    sequence_logps: Tensor,
    totals: Totals,
    *,
    reference: Tensor | None = None,
    aligned: Tensor | None = None,
    kl: Tensor | None = None,
) -> PairLogps:
    """Gather the two sides of every pair.

    Args:
        rows: the layout, with P pairs of S sequences.
        sequence_logps: ``(S,)`` policy log-probs, differentiable.
        totals: those of the whole batch, of which `rows` may be a part.
        reference: ``(2, P)`` reference log-probs of chosen and rejected; anything, NaN included,
            where a side is absent.
        aligned: ``(S,)`` token sums of the `aligned_logps` statistic.
        kl: 0-d, KTO's reference point.
    """
    chosen, chosen_present = _side(rows, sequence_logps, 0)
    rejected, rejected_present = _side(rows, sequence_logps, 1)
    dtype = sequence_logps.dtype
    ref_chosen, ref_rejected = (None, None) if reference is None else reference.to(dtype)
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_lengths=_side(rows, rows.lengths, 0)[0].to(dtype),
        rejected_lengths=_side(rows, rows.lengths, 1)[0].to(dtype),
        ref_chosen=None if ref_chosen is None else _masked(ref_chosen, chosen_present),
        ref_rejected=None if ref_rejected is None else _masked(ref_rejected, rejected_present),
        chosen_aligned_logps=None if aligned is None else _side(rows, aligned, 0)[0],
        rejected_aligned_logps=None if aligned is None else _side(rows, aligned, 1)[0],
        chosen_present=chosen_present,
        rejected_present=rejected_present,
        kl=kl,
        batch_pairs=totals.pairs,
        batch_sides=totals.sides,
        batch_chosen_tokens=totals.chosen_tokens,
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
