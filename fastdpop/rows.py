"""Which hidden states reach the head, and which sequences each of them counts for.

A *row* is a pair of a position and a target: one hidden state, and one token that it predicts. Only
scored tokens become rows: prompts and padding never reach the head. A *membership* says that a row
counts for a sequence. A row can count for several sequences (one chosen completion that serves
several pairs, a prefix that two completions share), and a position can stand in several rows (where
completions part, it predicts several tokens). So the map from rows to sequences is a sparse matrix A
with one non-zero for each membership, and this module is the only place that knows it. Everything
else follows from it:

    sequence log-probs    s = A @ logps           (`Rows.sum_per_sequence`)
    rows' derivatives     dlogp = A.T @ dL/ds     (`Rows.sum_per_row`)

Rows are laid out group by group, a group being pairs that have sequences or rows in common (one
pair, as a rule), so that an engine that works through whole groups always holds every log-prob that
a pair's loss needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastdpop.ranges import bounds_of, check_in_range, checked_bounds, longs, ranges

IGNORE = -100
"""The label of a token that is not scored, as in Hugging Face."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sequence log-probs: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Rows:
    """The rows of one batch; all tensors are int64 on one device, `weights` and `groups` apart.

    Attributes:
        index: ``(N,)`` position of each row in the hidden states flattened to ``(positions, H)``.
        targets: ``(N,)`` token that each row predicts; no two rows agree in both.
        members: ``(M,)`` row of each membership, sequence by sequence, in reading order. Rows are
            numbered in the order in which they first appear here, so M == N means 0, 1, 2 ...
        offsets: ``(S + 1,)`` bounds of each sequence in `members`.
        label_index: ``(M,)`` place of each membership's token in the flattened labels.
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
    members: Tensor
    offsets: Tensor
    label_index: Tensor
    weights: Tensor | None
    groups: Tensor
    pairs: Tensor
    order: Tensor
    inputs: Tensor

    def tensors(self) -> list[Tensor]:
        """The fields in order, with an empty tensor for None: the form in which operators take
        them.
        """
        given = [getattr(self, f.name) for f in fields(self)]
        return [self.index.new_empty(0) if t is None else t for t in given]

    @staticmethod
    def of_tensors(tensors: Sequence[Tensor], weighted: bool | None = None) -> Rows:
        """The inverse of :meth:`tensors`. Whether the memberships are `weighted` shows in the
        tensors, except to a compiler, which does not know their sizes.
        """
        rows = Rows(*tensors)
        if weighted is None:
            weighted = rows.weights is not None and rows.weights.numel() > 0
        return rows if weighted else rows.unweighted()

    @property
    def lengths(self) -> Tensor:
        """``(S,)`` number of tokens of each sequence."""
        return self.offsets.diff()

    def input_pairs(self) -> Tensor:
        """``(P, 2)`` the input sequences of each pair; -1 where a side is absent."""
        return self.inputs[self.pairs.clamp_min(0)].where(self.pairs >= 0, -1)

    @property
    def bounds(self) -> list[int]:
        """G + 1 bounds of the groups, counted in rows."""
        bounds: list[int] = self.groups[0].tolist()
        return bounds

    def sum_per_sequence(self, row_values: Tensor) -> Tensor:
        """Weighted sum of row values over each sequence, ``(N,) -> (S,)``, in a fixed order;
        differentiable.

        The sums stay in float64: at -6,000 nats the next float32 is 5e-4 away, which DPOP
        multiplies by 15.
        """
        # Widened first: backward then adds up what a row gets from several sequences in float64, in
        # one order, where PyTorch adds float32 atomically.
        values = row_values.to(wide_dtype(row_values.device))[self.members]
        if self.weights is not None:
            values = values * self.weights.to(values.dtype)
        return torch.segment_reduce(values, "sum", offsets=self.offsets, initial=0.0)

    def sum_per_row(self, sequence_values: Tensor) -> Tensor:
        """The transpose of :meth:`sum_per_sequence`, ``(S,) -> (N,)``, in the values' dtype."""
        values = sequence_values.repeat_interleave(self.lengths)
        if self.weights is not None:
            values = values * self.weights.to(values.dtype)
        if len(self.members) == len(self.index):
            return values
        # Sorting instead of scattering keeps the order of additions fixed on every device.
        by_row = torch.argsort(self.members, stable=True)
        counts = torch.bincount(self.members, minlength=len(self.index))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return torch.segment_reduce(values[by_row], "sum", offsets=offsets, initial=0.0)

    def unweighted(self) -> Rows:
        """The same rows with weight 1 for each membership."""
        return replace(self, weights=None)

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
            members=self.members[m0:m1] - r0,
            offsets=offsets - m0,
            label_index=self.label_index[m0:m1],
            weights=None if self.weights is None else self.weights[m0:m1],
            groups=self.groups[:, first : last + 1] - self.groups[:, first : first + 1],
            pairs=torch.where(pairs < 0, pairs, pairs - s0),
            order=torch.arange(p1 - p0, device=self.order.device),
            inputs=self.inputs[s0:s1],
        )

    def one_pair_per_group(self) -> bool:
        """Whether every group is one pair with both sides, no row of which counts twice, so that
        group i is the rows of a chosen sequence followed by those of its rejected one.
        """
        _, sequences, pairs = self.groups.diff(dim=1)
        return (
            len(self.members) == len(self.index)
            and bool((sequences == 2).all())
            and bool((pairs == 1).all())
        )


def default_pairs(sequences: int, device: torch.device) -> Tensor:
    """``(S // 2, 2)``: the first half of the sequences, chosen, against the second; none where
    their number is odd.
    """
    half = sequences // 2 if sequences % 2 == 0 else 0
    chosen = torch.arange(half, device=device)
    return torch.stack([chosen, chosen + half], dim=1)


def rows_from_labels(
    labels: Tensor,
    vocab_size: int,
    pairs: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    keep_unpaired: bool = False,
    token_weights: Tensor | None = None,
    ld_alpha: float | None = None,
    hidden_index: Tensor | None = None,
    positions: int = 0,
) -> Rows:
    """The rows of labels that are aligned with the hidden states, position by position.

    Args:
        labels: ``(S, T)``, or packed ``(positions,)`` with `cu_seqlens`; -100 where a token is not
            scored.
        vocab_size: V; every other label must lie in ``[0, V)``.
        cu_seqlens: ``(S + 1,)`` bounds of the packed sequences.
        shift: the hidden state at a position predicts the label at the next one of the same
            sequence.
        token_weights: weight of each scored token, shaped as `labels`.
        hidden_index: shaped as `labels`: which of the `positions` hidden states stands at each place,
            where they do not stand there in order.

    `pairs`, `keep_unpaired` and `ld_alpha` are as in :func:`rows_from_members`.

    Raises:
        ValueError: a label outside the vocabulary, a hidden state that does not exist, or bounds
            that do not describe the labels.
    """
    flat = labels.reshape(-1)
    if cu_seqlens is None:
        bounds = torch.arange(len(labels) + 1, device=labels.device) * labels.shape[1]
    else:
        bounds = cu_seqlens.to(device=labels.device, dtype=torch.int64)
        checked_bounds("cu_seqlens", bounds, labels.numel(), "positions")
    scored = flat != IGNORE
    if shift:
        # The first token of a sequence has no hidden state before it.
        scored[bounds[:-1][bounds[1:] > bounds[:-1]]] = False
    (position,) = scored.nonzero(as_tuple=True)
    index = position - int(shift)
    if hidden_index is not None:
        index = hidden_index.reshape(-1)[index]
        check_in_range(
            index,
            positions,
            "hidden_index contains {}, expected places of hidden states in [0, {})",
        )
    return rows_from_members(
        index,
        flat[position],
        torch.searchsorted(position, bounds),
        pairs,
        vocab_size,
        label_index=position,
        weights=None if token_weights is None else token_weights.detach().reshape(-1)[position],
        keep_unpaired=keep_unpaired,
        ld_alpha=ld_alpha,
        apart=hidden_index is None,
    )


def rows_from_members(
    index: Tensor,
    targets: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    vocab_size: int,
    *,
    label_index: Tensor | None = None,
    weights: Tensor | None = None,
    keep_unpaired: bool = False,
    ld_alpha: float | None = None,
    apart: bool = False,
) -> Rows:
    """The rows of sequences that are given token by token, in any positions: what sequences have in
    common, the same position and the same target, becomes one row.

    Args:
        index: ``(M,)`` position of the hidden state that predicts each token; targets: ``(M,)`` the
            token. Sequence by sequence, in reading order.
        offsets: ``(S + 1,)`` bounds of the sequences.
        pairs: ``(P, 2)`` chosen and rejected sequence, -1 for an absent side.
        vocab_size: V; targets must lie in ``[0, V)``.
        label_index: ``(M,)`` place of each token among the caller's labels; its own number by
            default.
        weights: ``(M,)`` weight of each token in its sequence's sum.
        keep_unpaired: sequences that no pair uses are scored too, each in a group of its own.
        ld_alpha: LD-DPO's weight of tokens past the shorter completion's length; each side of a
            pair is then a sequence of its own.
        apart: no position comes twice, so nothing is in common and need not be looked for.

    Raises:
        ValueError: a target outside the vocabulary, bounds that do not fit the tokens, or a pair of
            no such sequences.
    """
    device, host = index.device, torch.device("cpu")
    index, targets = index.long(), targets.long()
    check_in_range(
        targets,
        vocab_size,
        f"labels contain {{}}, expected token ids in [0, {{}}) or {IGNORE} for tokens that are not scored",
    )
    starts = checked_bounds("offsets", offsets, len(index), "tokens")
    lengths = [b - a for a, b in itertools.pairwise(starts)]
    sides = _checked_sides(pairs, len(lengths))
    # Which tokens are the same row.
    count, links = len(index), []
    row_of = torch.arange(count, device=device)
    if not apart:
        distinct, row_of = torch.unique(index * vocab_size + targets, return_inverse=True)
        if len(distinct) < count:
            count, links = len(distinct), _shared_by(row_of, offsets)
    groups = _groups(sides, links, len(lengths), keep_unpaired)
    order = [p for _, of in groups for p in of]

    # A sequence of the layout is an input sequence; with LD-DPO it is one side of one pair, since
    # its weights depend on the partner.
    if ld_alpha is None:
        layout = [s for sequences, _ in groups for s in sequences]
        number = {s: i for i, s in enumerate(layout)}
        numbered = [[number.get(s, -1) for s in of] for of in sides]
        per_group = [len(sequences) for sequences, _ in groups]
    else:
        layout, numbered = _sides_apart(sides, order)
        per_group = [sum(s >= 0 for p in of for s in sides[p]) for _, of in groups]

    # The tokens in the order of the layout, and their rows by first appearance.
    counts = [lengths[s] for s in layout]
    tokens = ranges([starts[s] for s in layout], counts, device)
    # Only where a sequence comes twice do its tokens.
    once = apart and ld_alpha is None
    members = torch.arange(len(tokens), device=device)
    first = members
    if not once:
        members, first = _by_first_appearance(row_of[tokens], count)
    of_weights = None if weights is None else weights.double()[tokens]
    if ld_alpha is not None:
        tail = _ld_weights(ld_alpha, sides, order, lengths, counts, device)
        of_weights = tail if of_weights is None else tail * of_weights
    of_sequences = bounds_of(per_group, host)
    of_rows = bounds_of(counts, host)[of_sequences]
    if not once:
        seen = torch.cat([members.new_zeros(1), members + 1]).cummax(0).values.to(host)
        of_rows = seen[of_rows]
    of_pairs = bounds_of([len(of) for _, of in groups], host)
    return Rows(
        index=index[tokens if once else tokens[first]],
        targets=targets[tokens if once else tokens[first]],
        members=members,
        offsets=bounds_of(counts, device),
        label_index=tokens if label_index is None else label_index[tokens],
        weights=of_weights,
        groups=torch.stack([of_rows, of_sequences, of_pairs]),
        pairs=longs(numbered, device).reshape(-1, 2),
        order=longs(order, device),
        inputs=longs(layout, device),
    )


def _checked_sides(pairs: Tensor, sequences: int) -> list[list[int]]:
    sides: list[list[int]] = pairs.tolist()
    for pair in sides:
        if max(pair) < 0 or min(pair) < -1 or max(pair) >= sequences:
            raise ValueError(
                f"pairs contains {pair}, expected sequence indices in [0, {sequences}), at most "
                "one of them -1"
            )
    return sides


def _shared_by(row_of: Tensor, offsets: Tensor) -> list[list[int]]:
    """Pairs of sequences that have a row in common, enough to connect all that do."""
    by_row = torch.argsort(row_of, stable=True)
    rows, sequences = row_of[by_row], torch.searchsorted(offsets, by_row, right=True) - 1
    same = rows[1:] == rows[:-1]
    links = torch.stack([sequences[:-1][same], sequences[1:][same]], dim=1)
    found: list[list[int]] = torch.unique(links, dim=0).tolist()
    return found


def _groups(
    sides: Sequence[Sequence[int]],
    links: Sequence[Sequence[int]],
    sequences: int,
    keep_unpaired: bool,
) -> list[tuple[list[int], list[int]]]:
    """Pairs that share a sequence or a row, together: (sequences, pairs) of each group, in order of
    first appearance.
    """
    parent = list(range(sequences))

    def root(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for one, other in (*sides, *links):
        if one >= 0 and other >= 0:
            parent[root(other)] = root(one)
    groups: dict[int, tuple[dict[int, None], list[int]]] = {}
    for p, pair in enumerate(sides):
        present = [s for s in pair if s >= 0]
        of_group, members = groups.setdefault(root(present[0]), ({}, []))
        of_group.update(dict.fromkeys(present))
        members.append(p)
    if keep_unpaired:
        for s in range(sequences):
            groups.setdefault(root(s), ({}, []))[0].setdefault(s)
    return [(list(of_group), members) for of_group, members in groups.values()]


def _sides_apart(
    sides: Sequence[Sequence[int]], order: Sequence[int]
) -> tuple[list[int], list[list[int]]]:
    """Each side of each pair as a sequence of its own: the input sequence that it is, and the
    numbers of each pair's two.
    """
    layout: list[int] = []
    numbered = [[-1, -1] for _ in sides]
    for p in order:
        for side, s in enumerate(sides[p]):
            if s >= 0:
                numbered[p][side] = len(layout)
                layout.append(s)
    return layout, numbered


def _by_first_appearance(row_of: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Rows numbered in the order in which tokens first name them: the number of each token's row
    ``(M,)``, and the first token of each row ``(N,)``. Some of the `rows` may not be named.
    """
    place = torch.arange(len(row_of), device=row_of.device)
    first = place.new_full((rows,), len(row_of))
    first.scatter_reduce_(0, row_of, place, "amin")
    starts = torch.zeros(len(row_of) + 1, dtype=torch.bool, device=row_of.device)
    starts[first] = True  # one place past the end for rows that no token names
    starts[-1] = False
    number = starts.cumsum(0) - 1
    return number[first[row_of]], starts.nonzero()[:, 0]


def _ld_weights(
    alpha: float,
    sides: Sequence[Sequence[int]],
    order: Sequence[int],
    lengths: Sequence[int],
    counts: Sequence[int],
    device: torch.device,
) -> Tensor:
    """LD-DPO's weight of each token: `alpha` past the shorter length of its pair (its own, where
    the other side is absent), else 1.
    """
    near = []
    for p in order:
        present = [s for s in sides[p] if s >= 0]
        near += [min(lengths[s] for s in present)] * len(present)
    rank = ranges([0] * len(counts), counts, device)
    limit = longs(near, device).repeat_interleave(longs(counts, device))
    return torch.ones(len(rank), dtype=torch.float64, device=device).masked_fill_(
        rank >= limit, alpha
    )
