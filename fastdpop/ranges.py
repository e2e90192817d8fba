"""Bounds and ranges of integers, for :mod:`fastdpop.rows`."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor


def checked_bounds(name: str, bounds: Tensor, count: int, what: str) -> list[int]:
    values: list[int] = bounds.tolist()
    ordered = all(a <= b for a, b in itertools.pairwise(values))
    if not values or values[0] != 0 or values[-1] != count or not ordered:
        raise ValueError(
            f"{name} is {reprlib.repr(values)}, expected non-decreasing bounds from 0 to the "
            f"number of {what}, {count}"
        )
    return values


def check_in_range(values: Tensor, bound: int, message: str) -> None:
    """
    Raises:
        ValueError: a value is not in ``[0, bound)``; `message` with that value and the bound.
    """
    if values.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(values)).tolist()
    if low < 0 or high >= bound:
        raise ValueError(message.format(low if low < 0 else high, bound))


def longs(values: Sequence[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)


def bounds_of(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64).cumsum(0)]
    ).to(device)


def ranges(starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """The concatenation of ``arange(start, start + count)``."""
    count = longs(counts, device)
    before = count.cumsum(0) - count
    return torch.arange(sum(counts), device=device) + (
        longs(starts, device) - before
    ).repeat_interleave(count)
