"""Whether the chosen log-prob will fall, and where it does: numbers for a monitor, of what a step has computed anyway.

Two completions that begin alike differ first in one token. DPO raises the chosen one's log-prob of it and may lower
those of all that follow (Smaug, arXiv:2402.13228, section 3), so the two are told apart. The CHES score of a pair
(arXiv:2410.08847), with h(x, y_<k) the hidden state that predicts token k of a completion y of x,

    CHES(x, w, l) = < sum_k h(x, w_<k), sum_k h(x, l_<k) > - || sum_k h(x, w_<k) ||^2,

is the higher, the more a step towards w and away from l will lower w's own log-prob. Its length-normalised form has
means for sums. The definition is that of the authors' code, princeton-nlp/unintentional-unalignment: from the state of
the last prompt token to that before the last token; here, states of tokens that are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from fastdpop.rows import Rows, wide_dtype


class Displacement(NamedTuple):
    """Of P pairs, ``(P,)`` each, float64; see :class:`fastdpop.PreferenceOutput`."""

    first_logps: Tensor
    rejected_first_logps: Tensor
    after_logps: Tensor
    differs: Tensor
    ches: Tensor
    ches_normalised: Tensor


@custom_op("fastdpop::displacement", mutates_args=())
def displacement(
    hidden: Tensor, logps: Tensor, rows: Sequence[Tensor], workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A :class:`Displacement`, without gradient.

    Args:
        hidden: ``(positions, H)``, of which the rows' are read; logps: ``(N,)`` of the rows.
        rows: what ``fastdpop::rows_from_labels`` gave.
        workspace_bytes: bound on copies of hidden states; one column is the least that is taken.
    """
    layout = Rows.of_tensors(rows)
    by_token = logps.to(wide_dtype(logps.device))[layout.members]
    return (*_around(layout, by_token), *_ches(layout, hidden, workspace_bytes))


@displacement.register_fake
def _(
    hidden: Tensor, logps: Tensor, rows: Sequence[Tensor], workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def new() -> Tensor:
        return hidden.new_empty((Rows(*rows).pairs.shape[0],), dtype=wide_dtype(hidden.device))

    return new(), new(), new(), new().bool(), new(), new()


def first_difference(rows: Rows) -> Tensor:
    """``(P,)`` place, among a completion's scored tokens, of the first that differs from the other completion's: the
    length of the shorter where that is the beginning of the longer, 0 where a side is absent.
    """
    present = (rows.pairs >= 0).all(dim=1)
    sides = rows.pairs.clamp_min(0)
    starts = rows.offsets[sides]
    common = torch.where(present, rows.lengths[sides].amin(dim=1), 0)
    pair, place = _spread(common)
    tokens = rows.targets[rows.members]
    chosen, rejected = (tokens[starts[pair, side] + place] for side in (0, 1))
    never = torch.iinfo(place.dtype).max
    return common.scatter_reduce(0, pair, place.masked_fill(chosen == rejected, never), "amin")


def _spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum of counts,)``: which count an element belongs to, and its number in that one."""
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    ends = counts.cumsum(0)
    return owner, torch.arange(len(owner), device=counts.device) - (ends - counts)[owner]


def _around(rows: Rows, logps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first four of a :class:`Displacement`, from the log-probs ``(M,)`` of the memberships."""
    sides = rows.pairs.clamp_min(0)
    (chosen, rejected), (own, other) = rows.offsets[sides].T, rows.lengths[sides].T
    first = first_difference(rows)
    differs = (rows.pairs >= 0).all(dim=1) & (first < own)
    padded = torch.cat([logps, logps.new_zeros(1)])  # 0 where there is no such token

    def at(place: Tensor, there: Tensor) -> Tensor:
        return padded[torch.where(there, place, len(logps))]

    later = torch.where(differs, own - first - 1, 0)
    pair, place = _spread(later)
    of_later = logps[(chosen + first + 1)[pair] + place]
    bounds = torch.cat([later.new_zeros(1), later.cumsum(0)])
    after = torch.segment_reduce(of_later, "sum", offsets=bounds, initial=0.0)
    return (
        at(chosen + first, differs),
        at(rejected + first, differs & (first < other)),
        after / later.clamp_min(1),
        differs,
    )


def _ches(rows: Rows, hidden: Tensor, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    """CHES and its length-normalised form, 0 where a side is absent."""
    wide = wide_dtype(hidden.device)
    sides, both = rows.pairs.clamp_min(0), (rows.pairs >= 0).all(dim=1)
    shares = rows.lengths.clamp_min(1).to(wide).reciprocal()
    found = [hidden.new_zeros(len(sides), dtype=wide) for _ in range(2)]
    for sums in _sums(rows, hidden, workspace_bytes):
        of_columns = sums.to(wide)
        for total, states in zip(found, (of_columns, of_columns * shares[:, None]), strict=True):
            chosen, rejected = states[sides[:, 0]], states[sides[:, 1]]
            # One product: equal sums have a score of exactly 0.
            total += (chosen * (rejected - chosen)).sum(dim=1)
    return torch.where(both, found[0], 0.0), torch.where(both, found[1], 0.0)


def _sums(rows: Rows, hidden: Tensor, workspace_bytes: int) -> Iterator[Tensor]:
    """``(S, columns)`` sums of the hidden states of each sequence, some columns at a time."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    places = rows.index[rows.members]
    column = max(len(places), 1) * (hidden.element_size() + dtype.itemsize)
    for columns in hidden.split(max(workspace_bytes // column, 1), dim=1):
        states = columns.index_select(0, places).to(dtype)
        yield torch.segment_reduce(states, "sum", offsets=rows.offsets, initial=0.0)
