"""Preference pairs that begin alike, of three kinds: random ids in the lengths of real ones.

GSM8K solutions with one result made wrong, to the bare question and behind four worked examples, and questions of
ARC-Challenge with three pairs each. The lengths are those of the median batch (in tokens padded to tokens in the tree)
of 200 random ones of four training problems, and of 100 of two, in SmolLM2's chat template, and those of four
questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple, Protocol


class Lengths(NamedTuple):
    """Of a pair, in tokens: its prompt, the beginning that both completions have, and the rest of each."""

    prompt: int
    common: int
    chosen: int
    rejected: int


ZERO_SHOT = [
    *(Lengths(68, 11, 40, 40), Lengths(67, 34, 31, 30)),
    *(Lengths(135, 26, 82, 82), Lengths(124, 13, 116, 116)),
]
FOUR_SHOT = [Lengths(722, 26, 57, 58), Lengths(733, 49, 30, 30)]
CHOICES = [(55, 15, (14, 16, 18)), (21, 9, (9, 9, 9)), (39, 9, (7, 10, 12)), (35, 5, (3, 3, 3))]
"""Of a question: its prompt, the right answer, and the wrong ones."""


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def scored(self) -> int:
        return len(self.chosen) + len(self.rejected)


class Workload(Protocol):
    """Pairs with ids below `vocabulary`; `copies` times as many of the same lengths."""

    def __call__(self, vocabulary: int, copies: int = 1) -> list[Pair]: ...


def solutions(lengths: list[Lengths], header: int) -> Workload:
    """Pairs of such lengths whose prompts begin alike, all of them, with `header` tokens."""

    def made(vocabulary: int, copies: int = 1) -> list[Pair]:
        ids = _random_ids(vocabulary)
        begin = ids(header)
        pairs = []
        for each in lengths * copies:
            common = ids(each.common)
            completions = (common + ids(each.chosen), common + ids(each.rejected))
            pairs.append(Pair(begin + ids(each.prompt - header), *completions))
        return pairs

    return made


def choices(vocabulary: int, copies: int = 1) -> list[Pair]:
    """Pairs of a question, the right answer and a wrong one."""
    ids = _random_ids(vocabulary)
    pairs = []
    for prompt, right, wrong in CHOICES * copies:
        question, answer = ids(prompt), ids(right)
        pairs += [Pair(question, answer, ids(length)) for length in wrong]
    return pairs


def _random_ids(vocabulary: int) -> Callable[[int], list[int]]:
    source = random.Random(0)
    return lambda count: [source.randrange(3, vocabulary) for _ in range(count)]


WORKLOADS: dict[str, Workload] = {
    "GSM8K, zero-shot": solutions(ZERO_SHOT, 24),
    "GSM8K, four-shot": solutions(FOUR_SHOT, 669),
    "ARC-Challenge": choices,
}


def sequences(pairs: list[Pair]) -> list[list[int]]:
    """Of pairs, chosen ones first."""
    return [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs]


def tokens(pairs: list[Pair]) -> dict[str, int]:
    """How many a batch has: padded, as separate sequences, and as a prefix tree."""
    from fastdpop.prefix.tree import build_tree

    every = sequences(pairs)
    return {
        "padded": len(every) * max(map(len, every)),
        "real": sum(map(len, every)),
        "tree": len(build_tree(every).input_ids),
    }
