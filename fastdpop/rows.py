"""Which hidden states reach the head, and which sequences each of them counts for.

Only scored tokens become rows: prompts and padding never reach the head. A row can count for
several sequences (one chosen completion that serves several pairs, a prefix that two completions
share), so the map from rows to sequences is a sparse matrix A with one non-zero for each
membership. Everything else follows from it:

    sequence log-probs   s = A @ row_logps        (`Rows.sums`)
    row coefficients     c = A.T @ dL/ds          (`Rows.spread`)

Rows are laid out group by group, a group being pairs that have sequences in common (one pair, as a
rule), so that an engine that works through whole groups always holds every log-prob that a pair's
loss needs.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

IGNORE = -100
"""The label of a token that is not scored, as in Hugging Face."""


@dataclass(frozen=True)
class Rows:
    """The rows of one batch; all tensors are int64 on one device, `weights` and `groups` apart.

    Attributes:
        index: ``(N,)`` position of each row in the hidden states flattened to ``(positions, H)``.
        targets: ``(N,)`` token that each row predicts.
        offsets: ``(S + 1,)`` bounds of each sequence in `members`.
        members: ``(M,)`` rows of each sequence, in reading order; None when every row has one
            sequence and stands in order.
        weights: ``(M,)`` float64 weight of each membership, or None for ones.
        groups: ``(3, G + 1)`` bounds of each group, counted in rows, in sequences and in pairs; on
            the CPU, where chunks of groups are chosen.
        pairs: ``(P, 2)`` chosen and rejected sequence of each pair, in the caller's order; -1 where
            a side is absent.
        order: ``(P,)`` the pairs group by group.
        inputs: ``(S,)`` the input sequence that each sequence is.
    """

    index: Tensor
    targets: Tensor
    offsets: Tensor
    members: Tensor | None
    weights: Tensor | None
    groups: Tensor
    pairs: Tensor
    order: Tensor
    inputs: Tensor

    def tensors(self) -> list[Tensor | None]:
        """The fields in order, the form in which operators take them; ``Rows(*tensors)`` is the
        inverse.
        """
        return [getattr(self, f.name) for f in fields(self)]

    @property
    def lengths(self) -> Tensor:
        """``(S,)`` number of rows of each sequence."""
        return self.offsets.diff()

    def sums(self, row_values: Tensor) -> Tensor:
        """Weighted sum of row values over each sequence, ``(N,) -> (S,)``, in a fixed order;
        differentiable.
        """
        values = row_values if self.members is None else row_values[self.members]
        # Summing in float64 is free at this size and makes the sum exact to the last bit of
        # float32.
        wide = values if values.device.type == "mps" else values.double()
        if self.weights is not None:
            wide = wide * self.weights.to(wide.dtype)
        total = torch.segment_reduce(wide, "sum", offsets=self.offsets, initial=0.0)
        return total.to(row_values.dtype)

    def unweighted(self) -> Rows:
        """The same rows with weight 1 each."""
        return replace(self, weights=None)

    def spread(self, sequence_values: Tensor) -> Tensor:
        """The transpose of :meth:`sums`, ``(S,) -> (N,)``."""
        values = sequence_values.repeat_interleave(self.lengths)
        if self.weights is not None:
            values = values * self.weights.to(values.dtype)
        if self.members is None:
            return values
        # Sorting instead of scattering keeps the order of additions fixed on every device.
        by_row = torch.argsort(self.members, stable=True)
        counts = torch.bincount(self.members, minlength=len(self.index))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return torch.segment_reduce(values[by_row], "sum", offsets=offsets, initial=0.0)

    def part(self, first: int, last: int) -> Rows:
        """The rows, sequences and pairs of groups ``first`` to ``last - 1``, numbered from 0; pairs
        in the order of `order`.
        """
        (r0, s0, p0), (r1, s1, p1) = self.groups[:, first].tolist(), self.groups[:, last].tolist()
        offsets = self.offsets[s0 : s1 + 1]
        m0, m1 = int(offsets[0]), int(offsets[-1])
        pairs = self.pairs[self.order[p0:p1]]
        return Rows(
            index=self.index[r0:r1],
            targets=self.targets[r0:r1],
            offsets=offsets - m0,
            members=None if self.members is None else self.members[m0:m1] - r0,
            weights=None if self.weights is None else self.weights[m0:m1],
            groups=self.groups[:, first : last + 1] - self.groups[:, first : first + 1],
            pairs=torch.where(pairs < 0, pairs, pairs - s0),
            order=torch.arange(p1 - p0, device=self.order.device),
            inputs=self.inputs[s0:s1],
        )


def lay_out(
    labels: Tensor,
    vocab_size: int,
    *,
    cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
    shift: bool = True,
    token_weights: Tensor | None = None,
    ld_alpha: float | None = None,
) -> Rows:
    """Lay out the rows of a batch.

    Args:
        labels: ``(S, T)``, or packed ``(positions,)`` with `cu_seqlens`; -100 where a token is not
            scored.
        vocab_size: V; every other label must lie in ``[0, V)``.
        cu_seqlens: ``(S + 1,)`` bounds of the packed sequences.
        pairs: ``(P, 2)`` chosen and rejected sequence, -1 for an absent side; None groups the first
            half with the second where S is even (so that log-probs computed without pairs are
            bitwise those computed with the default ones).
        shift: the hidden state at a position predicts the label at the next one of the same
            sequence.
        token_weights: weight of each scored token, shaped as `labels`.
        ld_alpha: LD-DPO's weight of tokens past the shorter completion's length; each side of a
            pair is then a sequence of its own.

    Raises:
        ValueError: a label outside the vocabulary, or bounds that do not describe the labels.
    """
    if cu_seqlens is None:
        sequences, length = labels.shape
        bounds = torch.arange(sequences + 1, device=labels.device) * length
    else:
        bounds = cu_seqlens.to(device=labels.device, dtype=torch.int64)
        _check_bounds(bounds, labels.numel())
    position, sequence = _scored(labels.reshape(-1), bounds, shift)
    targets = labels.reshape(-1)[position].long()
    _check_targets(targets, vocab_size)
    weights = (
        None if token_weights is None else token_weights.detach().reshape(-1)[position].double()
    )
    count = len(bounds) - 1
    lengths = torch.bincount(sequence, minlength=count).tolist()

    sides = _default_pairs(count) if pairs is None else pairs.tolist()
    components = _components(sides, count, keep_unpaired=pairs is None)
    by_group = [s for component, _ in components for s in component]
    start, total = {}, 0
    for s in by_group:
        start[s], total = total, total + lengths[s]

    # A sequence of the layout is an input sequence; with LD-DPO it is one side of one pair, since
    # its weights depend on the partner.
    order = [p for _, members in components for p in members]
    if ld_alpha is None:
        layout = list(by_group)
        number = {s: i for i, s in enumerate(layout)}
        numbered = [[number.get(s, -1) for s in sides_of] for sides_of in sides]
        per_group = [len(component) for component, _ in components]
    else:
        layout, numbered = [], [[-1, -1] for _ in sides]
        for p in order:
            for side, s in enumerate(sides[p]):
                if s >= 0:
                    numbered[p][side] = len(layout)
                    layout.append(s)
        per_group = [sum(s >= 0 for p in of for s in sides[p]) for _, of in components]

    device, host = labels.device, torch.device("cpu")
    first = [0, *itertools.accumulate(lengths)]
    rows_of = _ranges([first[s] for s in by_group], [lengths[s] for s in by_group], device)
    member = None
    if ld_alpha is not None:
        member = _ranges([start[s] for s in layout], [lengths[s] for s in layout], device)
        near = _shared_lengths(sides, order, lengths)
        rank = _ranges([0] * len(layout), [lengths[s] for s in layout], device)
        limit = _longs(near, device).repeat_interleave(_longs([lengths[s] for s in layout], device))
        tail = torch.ones(len(rank), dtype=torch.float64, device=device).masked_fill_(
            rank >= limit, ld_alpha
        )
        weights = tail if weights is None else tail * weights[rows_of][member]
    elif weights is not None:
        weights = weights[rows_of]
    return Rows(
        index=(position - int(shift))[rows_of],
        targets=targets[rows_of],
        offsets=_bounds([lengths[s] for s in layout], device),
        members=member,
        weights=weights,
        groups=torch.stack(
            [
                _bounds([sum(lengths[s] for s in component) for component, _ in components], host),
                _bounds(per_group, host),
                _bounds([len(of) for _, of in components], host),
            ]
        ),
        pairs=_longs(numbered, device).reshape(-1, 2),
        order=_longs(order, device),
        inputs=_longs(layout, device),
    )


def _scored(labels: Tensor, bounds: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Positions of the scored labels and the sequence of each."""
    scored = labels != IGNORE
    if shift:
        # The first token of a sequence has no hidden state before it.
        first = bounds[:-1][bounds[1:] > bounds[:-1]]
        scored[first] = False
    (position,) = scored.nonzero(as_tuple=True)
    return position, torch.searchsorted(bounds[1:].contiguous(), position, right=True)


def _check_bounds(bounds: Tensor, positions: int) -> None:
    values = bounds.tolist()
    ordered = all(a <= b for a, b in itertools.pairwise(values))
    if len(values) < 2 or values[0] != 0 or values[-1] != positions or not ordered:
        raise ValueError(
            f"cu_seqlens is {reprlib.repr(values)}, expected non-decreasing bounds from 0 to the "
            f"number of positions, {positions}"
        )


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(targets)).tolist()
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"labels contain {wrong}, expected token ids in [0, {vocab_size}) "
            f"or {IGNORE} for tokens that are not scored"
        )


def _default_pairs(sequences: int) -> list[list[int]]:
    half = sequences // 2
    return [[i, i + half] for i in range(half)] if sequences % 2 == 0 else []


def _components(
    sides: Sequence[Sequence[int]], sequences: int, *, keep_unpaired: bool
) -> list[tuple[list[int], list[int]]]:
    """Pairs that share a sequence, together: (sequences, pairs) of each group, in order of first
    appearance.
    """
    parent = list(range(sequences))

    def root(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for chosen, rejected in sides:
        if chosen >= 0 and rejected >= 0:
            parent[root(rejected)] = root(chosen)
    groups: dict[int, tuple[dict[int, None], list[int]]] = {}
    for p, pair in enumerate(sides):
        present = [s for s in pair if s >= 0]
        of_group, members = groups.setdefault(root(present[0]), ({}, []))
        of_group.update(dict.fromkeys(present))
        members.append(p)
    result = [(list(of_group), members) for of_group, members in groups.values()]
    if keep_unpaired:
        paired = {s for of_group, _ in result for s in of_group}
        result += [([s], []) for s in range(sequences) if s not in paired]
    return result


def _shared_lengths(
    sides: Sequence[Sequence[int]], order: Sequence[int], lengths: Sequence[int]
) -> list[int]:
    """For each side in layout order, the shorter length of its pair (its own, where the other side
    is absent).
    """
    result = []
    for p in order:
        present = [s for s in sides[p] if s >= 0]
        result += [min(lengths[s] for s in present)] * len(present)
    return result


def _longs(values: Sequence[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)


def _bounds(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64).cumsum(0)]
    ).to(device)


def _ranges(starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """The concatenation of ``arange(start, start + count)``."""
    count = _longs(counts, device)
    before = count.cumsum(0) - count
    return torch.arange(sum(counts), device=device) + (
        _longs(starts, device) - before
    ).repeat_interleave(count)
