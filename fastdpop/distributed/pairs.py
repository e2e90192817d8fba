"""Pairs and sequences of which other processes hold a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fastdpop.distributed import collectives
from fastdpop.distributed.groups import Group
from fastdpop.losses.base import PairLogps
from fastdpop.rows import Rows


def joined_pairs(pairs: PairLogps, counts: Sequence[int], group: Group) -> tuple[PairLogps, slice]:
    """The pairs of all processes, in one exchange, and where this one's stand among them. The losses of those are this
    process's part of the whole.

    Args:
        pairs: this process's, ``(counts[rank],)``, with the totals of the whole batch.
    """
    own = {f.name: getattr(pairs, f.name) for f in fields(pairs) if f.name != "values"}
    by_pair = {n: value for n, value in own.items() if value is not None and value.dim() == 1}
    # Ranks have the same names, in the same order.
    by_pair |= {_value(name): value for name, value in pairs.values.items()}
    dtype = pairs.chosen.dtype
    table = torch.stack([value.to(dtype) for value in by_pair.values()], dim=1)
    columns = collectives.joined(table, counts, group).unbind(1)
    found: dict[str, Any] = {
        name: column.to(value.dtype)
        for (name, value), column in zip(by_pair.items(), columns, strict=True)
    }
    values = {name: found.pop(_value(name)) for name in pairs.values}
    start = sum(counts[: group.rank])
    return replace(pairs, **found, values=values), slice(start, start + counts[group.rank])


def _value(name: str) -> str:
    """The column of a value, which may be called as a field is."""
    return f"values[{name}]"


def whole_sequences(
    sums: Tensor, rows: Rows, sequences: int, group: Group, factor: float
) -> Tensor:
    """``(S,)`` sums over the tokens of each sequence of the layout, of which every process has some; backward, what
    comes from above times `factor`.

    Processes may number the `sequences` of a batch differently: which ones have rows in common decides that.
    """
    apart = sums.new_zeros(sequences).index_put((rows.inputs,), sums)
    return collectives.sum_over(apart, group, factor)[rows.inputs]
