"""How much preference pairs share: tokens padded and in trees, edit distances, and what it should save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdpop.prefix.sampler import PromptSampler
from fastdpop.prefix.tree import Ints, build_tree


@dataclass(frozen=True)
class Work:
    """What a model multiplies, for the floating-point operations of its forward pass.

    Attributes:
        linear: the weights of its linear layers, without the head, that a token goes through.
        head: those of the head.
        attention: for each layer, the numbers in a token's queries (heads times their width), and the
            layer's sliding window; None for one that sees all.
    """

    linear: int
    head: int
    attention: tuple[tuple[int, int | None], ...]

    def flop(self, tokens: int, rows: int, depths: Ints) -> int:
        """Of linear layers by tokens, the head by its rows, attention by the tokens that each one sees.

        `depths` are those of the queries: the token at depth d sees d + 1, itself among them. A product
        of matrices takes 2 operations for each number and weight; attention has two.
        """
        seen = {
            window: int(np.minimum(depths + 1, window or np.iinfo(np.int64).max).sum())
            for window in {window for _, window in self.attention}
        }
        attention = sum(2 * width * seen[window] for width, window in self.attention)
        return 2 * (tokens * self.linear + rows * self.head + attention)


@dataclass(frozen=True)
class BatchTokens:
    """The tokens of a batch, and its step.

    Attributes:
        pairs: how many it holds.
        padded: tokens of the padded batch.
        real: those that are no padding.
        tree: those that are left if what sequences share stands once.
        flop: of a forward pass, padded and as a tree; None without a model's :class:`Work`. The other
            passes of a step (backward, the reference's forward) take multiples of it, the same for both.
    """

    pairs: int
    padded: int
    real: int
    tree: int
    flop: tuple[int, int] | None

    @property
    def gain(self) -> float:
        """Tokens padded for each one in the tree."""
        return self.padded / self.tree

    @property
    def speedup(self) -> float | None:
        """Of a step, by the floating-point operations alone."""
        return None if self.flop is None else self.flop[0] / self.flop[1]


@dataclass(frozen=True)
class PairStatistics:
    """What preference pairs share.

    Attributes:
        prompts: how many distinct ones there are.
        shared: share of the completions' tokens that stand in a beginning that chosen and rejected have
            in common.
        positional: ``(P,)`` edit distance of each pair by position (Hamming; what the longer one has
            more counts as different), over the length of the longer completion: from 0 to 1.
        levenshtein: ``(P,)`` the fewest tokens to insert, delete or replace, over the same length.
        batches: in the order of :class:`~fastdpop.PromptSampler`.
    """

    prompts: int
    shared: float
    positional: Sequence[float]
    levenshtein: Sequence[float]
    batches: Sequence[BatchTokens]

    def total(self, name: str) -> int:
        """Of all batches, the sum of one of their numbers."""
        return sum(getattr(batch, name) for batch in self.batches)

    @property
    def speedup(self) -> float | None:
        """Of an epoch, by the floating-point operations alone."""
        flop = [batch.flop for batch in self.batches if batch.flop is not None]
        return sum(padded for padded, _ in flop) / sum(tree for _, tree in flop) if flop else None


def pair_statistics(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    batch_pairs: int,
    work: Work | None = None,
) -> PairStatistics:
    """Statistics of P >= 1 pairs of token ids, completions without their prompt, in batches of so many pairs.

    No prompt is empty.
    """
    shared, completions = 0, 0
    positional, levenshtein = [], []
    for good, bad in zip(chosen, rejected, strict=True):
        different = [i for i, (g, b) in enumerate(zip(good, bad, strict=False)) if g != b]
        shorter, longer = sorted((len(good), len(bad)))
        shared += 2 * (different[0] if different else shorter)
        completions += shorter + longer
        positional.append((len(different) + longer - shorter) / max(longer, 1))
        levenshtein.append(edit_distance(good, bad) / max(longer, 1))
    order = list(PromptSampler(prompts))
    batches = [order[first : first + batch_pairs] for first in range(0, len(order), batch_pairs)]
    return PairStatistics(
        prompts=len(set(map(tuple, prompts))),
        shared=shared / max(completions, 1),
        positional=positional,
        levenshtein=levenshtein,
        batches=[
            _tokens([(prompts[i], side[i]) for side in (chosen, rejected) for i in batch], work)
            for batch in batches
        ],
    )


def _tokens(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], work: Work | None
) -> BatchTokens:
    """Of sequences that are a prompt and a completion each."""
    tree = build_tree([[*prompt, *completion] for prompt, completion in sequences])
    bounds, nodes = tree.offsets.numpy(), tree.nodes.numpy()
    padded = np.arange(np.diff(bounds).max()).repeat(len(sequences))
    flop = None
    if work is not None:
        # The place of the hidden state, and the token that it predicts.
        rows = {
            row
            for last, (_, completion) in zip(bounds[1:], sequences, strict=True)
            for row in zip(
                nodes[last - len(completion) - 1 : last - 1].tolist(), completion, strict=True
            )
        }
        scored = sum(len(completion) for _, completion in sequences)
        depths = tree.position_ids.numpy()
        flop = work.flop(len(padded), scored, padded), work.flop(len(depths), len(rows), depths)
    return BatchTokens(len(sequences) // 2, len(padded), int(bounds[-1]), len(tree.end), flop)


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """The fewest tokens to insert, delete or replace that make one sequence the other (Levenshtein).

    A column of the table of distances is held as the bits of two integers, in which they rise and fall by one
    (Hyyrö, "A bit-vector algorithm for computing Levenshtein and Damerau edit distances", 2003).
    """
    if not one:
        return len(other)
    places: dict[int, int] = {}
    for i, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << i
    whole, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    rises, falls, distance = whole, 0, len(one)
    for token in other:
        equal = places.get(token, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        across_rises = falls | (whole & ~(diagonal | rises))
        across_falls = rises & diagonal
        distance += bool(across_rises & last) - bool(across_falls & last)
        across_rises = across_rises << 1 | 1
        rises = (across_falls << 1 | ~(diagonal | across_rises)) & whole
        falls = across_rises & diagonal & whole
    return distance
