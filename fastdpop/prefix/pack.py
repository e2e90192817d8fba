"""Preference pairs as rows of tokens in which what they share stands once, for loops that collate."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from copy import copy
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdpop.prefix.tree import LEAST_SHARED, Ints, build_tree
from fastdpop.rows import IGNORE

TokenIds = Sequence[int] | NDArray[Any] | Tensor


class PackedPairs(dict[str, Any]):
    """Arguments for a model with fastdpop attached: P whole pairs as one tree of N tokens, int64 on the CPU.

    A dict, so that ``model(**batch, preference="dpop", ref_logps=...)`` takes all of it:

    - ``input_ids``, ``position_ids``: ``(1, N)``, the tokens of the tree and their depths;
    - ``labels``: ``(2P, T)``, as in a padded batch of the P chosen sequences and then the P rejected
      ones, padded on the right: the token at t of sequence s, -100 where it is not scored;
    - ``prefix_tree``: ``end (N,)``, one past the last token below each, and ``hidden_index (2P, T)``, the
      place in the tree of the token at t of sequence s, 0 where there is none.

    Attributes:
        pairs: which pairs these are: their places in the arguments of :func:`pack`. Copies,
            ``DataLoader``, pickle and accelerate keep it; what builds another dict from the items does not.
    """

    pairs: tuple[int, ...]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedPairs:
        """The same on a device, but for ``end``: it is what the structure is read from, on the CPU."""

        def moved(entries: dict[str, Any]) -> dict[str, Any]:
            return {
                name: moved(entry) if isinstance(entry, dict)
                else entry if name == "end"
                else entry.to(device, non_blocking=non_blocking)
                for name, entry in entries.items()
            }  # fmt: skip

        batch = copy(self)
        batch.update(moved(self))
        return batch


class _Pair(NamedTuple):
    place: int
    prompt: int
    """Tokens of it."""
    chosen: Ints
    rejected: Ints
    """With the prompt, both."""


def pack(
    prompts: Sequence[TokenIds],
    chosen: Sequence[TokenIds],
    rejected: Sequence[TokenIds],
    *,
    max_tokens: int | None = None,
    least_shared: int = LEAST_SHARED,
) -> list[PackedPairs]:
    """Preference pairs of token ids as batches of a bounded number of tokens, what they share counted once.

    Pairs of one prompt come together, where the first of them stands, and into one batch where that
    holds them all; else the order is kept. No pair is cut, dropped or torn apart.

    Args:
        prompts, chosen, rejected: token ids of each pair (lists, arrays or tensors of integers); chosen and
            rejected are the completions alone. A completion may be empty: its log-probability is 0. A prompt
            may not, since there is no hidden state from which to predict a completion's first token.
        max_tokens: most tokens in the tree of a batch; None for a single batch.
        least_shared: stretches of fewer tokens (by default 8) are not shared; 1 to share all.

    Returns:
        The batches; none if there are no pairs. ``[batch.pairs for batch in batches]`` says what went where.

    Raises:
        ValueError: an argument is not as described; the message names the pair. A pair that alone is a
            tree of more than `max_tokens` is one.
    """
    _positive("least_shared", least_shared)
    if max_tokens is not None:
        _positive("max_tokens", max_tokens)
    if not len(prompts) == len(chosen) == len(rejected):
        raise ValueError(
            f"prompts, chosen and rejected hold {len(prompts)}, {len(chosen)} and {len(rejected)} sequences, "
            "expected one of each for every pair"
        )
    groups: dict[bytes, list[_Pair]] = {}
    for i, sides in enumerate(zip(prompts, chosen, rejected, strict=True)):
        names = ("prompts", "chosen", "rejected")
        prompt, *completions = (
            token_ids(f"{name}[{i}]", ids) for name, ids in zip(names, sides, strict=True)
        )
        if not len(prompt):
            raise ValueError(
                f"prompts[{i}] is empty, so the first token of a completion would follow nothing and could "
                "not be scored: begin with a token that every text begins with, such as BOS"
            )
        pair = _Pair(i, len(prompt), *(np.concatenate([prompt, own]) for own in completions))
        groups.setdefault(prompt.tobytes(), []).append(pair)
    units = list(groups.values())
    batches, start = [], 0
    while start < len(units):
        count = _most(units, start, max_tokens, least_shared)
        if count:
            batches.append(_packed(list(chain(*units[start : start + count])), least_shared))
            start += count
            continue
        unit = units[start]
        if len(unit) == 1:
            raise ValueError(
                f"pair {unit[0].place} has {_tokens(unit, least_shared)} tokens, what chosen and rejected share "
                f"counted once, expected at most max_tokens = {max_tokens}"
            )
        units[start : start + 1] = [[pair] for pair in unit]
    return batches


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive whole number")


def token_ids(name: str, value: object) -> Ints:
    """A sequence of token ids as int64.

    Raises:
        ValueError: it is none; the message begins with `name`.
    """
    try:
        array = value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
        if array.size == 0 and array.ndim == 1:
            return np.empty(0, dtype=np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError("other numbers, or other dimensions")
    except (TypeError, ValueError):  # numpy's, of lists of several lengths and of bfloat16
        raise ValueError(f"{name} is {value!r:.100}, expected a sequence of token ids") from None
    ids = array.astype(np.int64)
    if ids.min() < 0:
        raise ValueError(
            f"{name} holds {array[ids.argmin()]}, expected token ids, which are 0 or more"
        )
    return ids


def _tokens(pairs: Sequence[_Pair], least: int) -> int:
    return len(
        build_tree([ids for pair in pairs for ids in (pair.chosen, pair.rejected)], least).end
    )


def _most(units: Sequence[Sequence[_Pair]], start: int, max_tokens: int | None, least: int) -> int:
    """How many units from `start` on make a tree of no more than `max_tokens`, found in few trees."""
    left = len(units) - start
    if max_tokens is None:
        return left

    def exceeds(count: int) -> bool:
        return _tokens(list(chain(*units[start : start + count])), least) > max_tokens

    fits, next_count = 0, 1
    while fits < left and not exceeds(next_count):
        fits, next_count = next_count, min(2 * next_count, left)
    return fits + bisect_left(range(fits + 1, next_count), True, key=exceeds)


def _packed(pairs: Sequence[_Pair], least: int) -> PackedPairs:
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    tree = build_tree(sequences, least)
    bounds = tree.offsets.tolist()
    shape = (len(sequences), max(map(len, sequences)))
    labels = torch.full(shape, IGNORE)
    hidden_index = torch.zeros(shape, dtype=torch.int64)
    for s, ids in enumerate(sequences):
        first = pairs[s % len(pairs)].prompt
        labels[s, first : len(ids)] = torch.from_numpy(ids[first:])
        hidden_index[s, : len(ids)] = tree.nodes[bounds[s] : bounds[s + 1]]
    batch = PackedPairs(
        input_ids=tree.input_ids[None],
        position_ids=tree.position_ids[None],
        labels=labels,
        prefix_tree={"end": tree.end, "hidden_index": hidden_index},
    )
    batch.pairs = tuple(pair.place for pair in pairs)
    return batch
