"""Which queries of a tree meet which keys in one call of a kernel.

A *chunk* is a stretch ``[first, last)`` of queries and all keys that any of them sees: the tokens above `first`, which
lie in a few stretches, and the chunk itself. Every query stands in one chunk, so its softmax is computed whole and
nothing has to be merged. What a chunk wastes are the pairs in it that do not see each other: the triangle of a run, and
branches beside one another. What it saves is a call. The cheapest division is found by dynamic programming over the
starts of runs and places inside them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdpop.prefix.tree import Ints, Run, runs, sees

STEP = 64
"""Long runs may be divided at multiples of this many tokens."""

CALL = 3_000_000
"""Cost of a call, forward and backward, in products of numbers, of which a query and a key need `width`. Measured, as
the next, on two threads of an EPYC with AVX-512, where 20 of them take a nanosecond; the optimum is flat in both.
"""

KEY = 25
"""Cost of a key in a chunk, in queries: it is copied, and its gradients are added."""

_FURTHEST = 128
"""A chunk ends at most this many places after its start, which bounds the search."""

_MOST = 2**21
"""A chunk that has more pairs of queries and keys is no longer than `STEP`, which bounds the memory of masks and, in
plain arithmetic, of scores.
"""

_KEPT = 2**22
"""Numbers in all masks of a tree up to which they are kept; else they are made for every call."""


class Chunk(NamedTuple):
    """Queries ``[first, last)`` and the stretches of keys that they see, in order.

    With `causal` the keys are the queries themselves, and each sees those before it; with neither
    this nor `masked` every query sees every key.
    """

    first: int
    last: int
    keys: tuple[tuple[int, int], ...]
    causal: bool
    masked: bool

    @property
    def key_count(self) -> int:
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True)
class Plan:
    """The chunks of a tree. `end`, `position`: ``(N,)``; `window`: in tokens, or None."""

    end: Ints
    position: Ints
    window: int | None
    chunks: tuple[Chunk, ...]
    on_device: dict[torch.device, Any] = field(default_factory=dict)
    _masks: dict[tuple[int, torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, index: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of a chunk, ``(queries, keys)``: 0, or minus infinity."""
        chunk = self.chunks[index]
        if not chunk.masked:
            return None
        key = (index, device, dtype)
        found = self._masks.get(key)
        if found is None:
            visible = torch.from_numpy(_visible(self, chunk)).to(device)
            found = torch.zeros(visible.shape, dtype=dtype, device=device)
            found.masked_fill_(~visible, -torch.inf)
            if self._keeps_masks:
                self._masks[key] = found
        return found

    @functools.cached_property
    def _keeps_masks(self) -> bool:
        return sum((c.last - c.first) * c.key_count for c in self.chunks) <= _KEPT


def _visible(plan: Plan, chunk: Chunk) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    queries = np.arange(chunk.first, chunk.last)[:, None]
    keys = np.concatenate([np.arange(*stretch) for stretch in chunk.keys])
    visible = sees(plan.end, queries, keys)
    if plan.window is not None:
        visible &= plan.position[queries] - plan.position[keys] < plan.window
    return visible


class Node(NamedTuple):
    """A run of the tree and the runs above it, from the root on."""

    run: Run
    above: tuple[Run, ...]

    @property
    def depth(self) -> int:
        return sum(run.last - run.first for run in self.above)


def nodes(end: Ints) -> Iterator[Node]:
    """The runs of a tree with those above each.

    Raises:
        ValueError: `end` is not that of a tree in depth-first order.
    """
    path: list[Run] = []
    for run in runs(torch.from_numpy(end)):
        while path and path[-1].end <= run.first:
            path.pop()
        if not run.last <= run.end <= (path[-1].end if path else len(end)):
            raise ValueError(
                f"tree: end = {run.end} of the tokens from {run.first} to {run.last - 1} is not that of a tree in "
                "depth-first order: expected one past the last token of each one's subtree, "
                "inside the subtree of every token above it"
            )
        yield Node(run, tuple(path))
        path.append(run)


@functools.lru_cache(maxsize=8)
def plan(tree: bytes, rows: int, how: str, width: int) -> Plan:
    """How to compute attention over a tree.

    Args:
        tree: the bytes of the ``(rows, N)`` int64 tensor. Its content, not its identity, names a
            tree: copies (of checkpointing, or of FSDP) are found, and nothing can be stale.
        how: "segments", a chunk for every run; "masked", one chunk; else the cheapest chunks.
        width: products of a query and a key: heads times the sizes of key and value.
    """
    table = np.frombuffer(tree, dtype=np.int64).reshape(rows, -1).copy()
    position, size = table[1], table.shape[1]
    window = window_of(table)
    found = list(nodes(table[0]))
    if how == "masked":
        bounds = [0, size] if size else [0]
    elif how == "segments":
        bounds = [*(node.run.first for node in found), size]
    else:
        bounds = _cheapest(found, size, window, width)
    firsts = np.array([node.run.first for node in found], dtype=np.int64)
    of = np.searchsorted(firsts, bounds[:-1], side="right") - 1
    chunks = tuple(
        _chunk(found[i], *bound, table[0], position, window)
        for i, bound in zip(of.tolist(), itertools.pairwise(bounds), strict=True)
    )
    return Plan(table[0], position, window, chunks)


def window_of(table: Ints) -> int | None:
    """The window of a ``(rows, N)`` tree, or None where no path of it is longer.

    Raises:
        ValueError: its row 2 is not one length.
    """
    if len(table) < 3 or table.shape[1] == 0:
        return None
    window = int(table[2, 0])
    if window < 1 or (table[2] != window).any():
        raise ValueError(
            f"tree: its row 2 goes from {table[2].min()} to {table[2].max()}: expected the window's "
            "length for every token, 1 or more"
        )
    return window if window <= int(np.ptp(table[1])) else None


def _cheapest(found: list[Node], size: int, window: int | None, width: int) -> list[int]:
    """Bounds of the cheapest chunks."""
    starts, above = [], []
    for node in found:
        inside = range(0, node.run.last - node.run.first, STEP)
        starts += [node.run.first + place for place in inside]
        depth = node.depth
        above += [depth + place for place in inside]
    places, depths = np.array([*starts, size]), np.array(above)
    if window is not None:
        depths = np.minimum(depths, window - 1)
    best = np.zeros(len(places))
    before = np.zeros(len(places), dtype=np.int64)
    for i in range(1, len(places)):
        low = max(0, i - _FURTHEST)
        queries = places[i] - places[low:i]
        keys = depths[low:i] + queries
        costs = best[low:i] + CALL + keys * (queries + KEY) * width
        costs[:-1][(queries * keys)[:-1] > _MOST] = np.inf
        choice = int(costs.argmin())
        best[i], before[i] = costs[choice], low + choice
    bounds, i = [size], len(places) - 1
    while i > 0:
        i = int(before[i])
        bounds.append(int(places[i]))
    return bounds[::-1]


def _chunk(
    node: Node, first: int, last: int, end: Ints, position: Ints, window: int | None
) -> Chunk:
    stretches = [(run.first, run.last) for run in node.above] + [(node.run.first, last)]
    keys = np.concatenate([np.arange(*stretch) for stretch in stretches])
    if window is not None:
        keys = keys[(position[keys] > position[first:last].min() - window) | (keys >= first)]
    gaps = np.flatnonzero(np.diff(keys) > 1)
    starts = keys[np.concatenate([[0], gaps + 1])]
    stops = keys[np.concatenate([gaps, [len(keys) - 1]])] + 1
    found = tuple(zip(starts.tolist(), stops.tolist(), strict=True))
    chain = bool((end[first:last] >= last).all())
    causal = chain and window is None and len(keys) == last - first > 1
    return Chunk(first, last, found, causal, masked=not causal and last - first > 1)
