"""Sequences with common prefixes as one row of tokens in which each prefix stands once.

The row is the trie of the sequences in depth-first order. One integer a token says the whole structure: ``end[j]``, one
past the last token of j's subtree. The token at i has the one at j before it in a sequence, and sees it, exactly if
``j <= i < end[j]``. A token's depth in the trie is its position in every sequence that it belongs to.

A *run* is a stretch of tokens with one `end`: nothing branches off inside it. All tokens in ``[last, end)`` see every
one of a run ``[first, last)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

LEAST_SHARED = 8
"""Shorter stretches are not shared: what they save is less than a run of their own costs."""


@dataclass(frozen=True)
class PrefixTree:
    """S sequences of L tokens in all as N <= L tokens; int64 on the CPU.

    Attributes:
        input_ids: ``(N,)`` the tokens of the trie, depth first.
        position_ids: ``(N,)`` depth of each.
        end: ``(N,)`` one past the last token of each one's subtree.
        nodes: ``(L,)`` place of each token of each sequence in the trie, sequence by sequence.
        offsets: ``(S + 1,)`` bounds of the sequences in `nodes`.
    """

    input_ids: Tensor
    position_ids: Tensor
    end: Tensor
    nodes: Tensor
    offsets: Tensor


class Run(NamedTuple):
    """Tokens ``[first, last)``, below which stand those of ``[last, end)``."""

    first: int
    last: int
    end: int


def runs(end: Tensor) -> list[Run]:
    """The runs of a tree, in order. `end` is ``(N,)``, on the CPU."""
    ends = end.numpy()
    first = np.flatnonzero(np.concatenate([ends[:1] == ends[:1], ends[1:] != ends[:-1]]))
    last = np.append(first[1:], len(ends))
    return list(map(Run, first.tolist(), last.tolist(), ends[first].tolist()))


def sees(end: Any, query: Any, key: Any) -> Any:
    """Whether the token at `query` sees the one at `key`: places, numpy's or torch's, that broadcast."""
    return (key <= query) & (query < end[key])


def side_by_side(sequences: Sequence[Sequence[int] | Ints]) -> PrefixTree:
    """The same sequences, of which nothing is shared, in their order."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    place = np.arange(offsets[-1])
    ids = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences] or [place])
    depth = place - offsets[:-1].repeat(lengths)
    end = offsets[1:].repeat(lengths)
    return PrefixTree(*map(torch.from_numpy, (ids, depth, end, place, offsets)))


def build_tree(sequences: Sequence[Sequence[int] | Ints], least: int = LEAST_SHARED) -> PrefixTree:
    """The tree of sequences of token ids, which may be empty, or equal.

    Args:
        least: stretches of fewer tokens are not shared; 1 for the whole trie.
    """
    arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    lists = [array.tolist() for array in arrays]
    order = sorted(range(len(lists)), key=lists.__getitem__)
    shared = _shared([arrays[s] for s in order], least)
    lengths = [len(arrays[s]) for s in order]
    fresh = [length - common for length, common in zip(lengths, shared, strict=True)]
    starts = np.concatenate([[0], np.cumsum(fresh, dtype=np.int64)])
    ids, end = np.empty(starts[-1], dtype=np.int64), np.empty(starts[-1], dtype=np.int64)
    depth = np.empty(starts[-1], dtype=np.int64)
    nodes: list[Ints] = [np.empty(0, dtype=np.int64)] * len(order)
    before: Ints = np.empty(0, dtype=np.int64)
    for i, s in enumerate(order):
        own = slice(starts[i], starts[i + 1])
        ids[own] = arrays[s][shared[i] :]
        depth[own] = np.arange(shared[i], lengths[i])
        end[own] = _ends(i, shared, lengths[i], starts)
        before = np.concatenate([before[: shared[i]], np.arange(own.start, own.stop)])
        nodes[s] = before
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays], dtype=np.int64)])
    flat = np.concatenate(nodes) if nodes else before
    return PrefixTree(*map(torch.from_numpy, (ids, depth, end, flat, offsets)))


def _shared(ordered: Sequence[Ints], least: int) -> list[int]:
    """How many tokens each of the sequences, in lexical order, takes from the one before it."""
    shared, forks, before = [], [0], np.empty(0, dtype=np.int64)
    for tokens in ordered:
        n = min(len(before), len(tokens))
        differing = np.flatnonzero(before[:n] != tokens[:n])
        common = int(differing[0]) if len(differing) else n
        while forks[-1] > common:
            forks.pop()
        if common - forks[-1] < least and common < len(tokens):
            common = forks[-1]
        elif common > forks[-1]:
            forks.append(common)
        shared.append(common)
        before = tokens
    return shared


def _ends(i: int, shared: Sequence[int], length: int, starts: Ints) -> Ints:
    """Where the subtrees end of the tokens that sequence i adds: where a sequence starts that leaves the path above."""
    ends = np.full(length - shared[i], starts[-1], dtype=np.int64)
    left, following = length, i + 1
    while left > shared[i] and following < len(shared):
        leaves = max(shared[following], shared[i])
        if leaves < left:
            ends[leaves - shared[i] : left - shared[i]] = starts[following]
            left = leaves
        following += 1
    return ends
