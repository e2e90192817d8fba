"""What pairs share, in numbers that can be counted by hand, and edit distances against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpop.prefix.stats import Work, edit_distance, pair_statistics

tokens = st.lists(st.integers(0, 3), max_size=12)


@given(tokens, tokens)
def test_edit_distance_is_that_of_the_definition(one: list[int], other: list[int]) -> None:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    assert edit_distance(one, other) == row[-1]


def test_edit_distance_of_long_sequences() -> None:
    one = list(range(300))
    assert edit_distance(one, one[100:] + [0] * 7) == 107
    assert edit_distance(one, [token + 1000 for token in one]) == 300


# Two pairs of one prompt with one chosen completion, and one of another prompt.
PROMPTS = [[1] * 10, [2] * 6, [1] * 10]
CHOSEN = [[3, 4, 5], [6, 7], [3, 4, 5]]
REJECTED = [[3, 4, 6], [6, 7], [4, 5]]


def test_pairs_counted_by_hand() -> None:
    found = pair_statistics(PROMPTS, CHOSEN, REJECTED, 3)
    assert found.prompts == 2
    # 3 4, 6 7 and nothing, twice each, of 15 tokens.
    assert found.shared == pytest.approx(8 / 15)
    assert found.positional == pytest.approx([1 / 3, 0, 1])
    assert found.levenshtein == pytest.approx([1 / 3, 0, 1 / 3])
    (batch,) = found.batches
    assert (batch.pairs, batch.padded, batch.real) == (3, 6 * 13, 13 + 13 + 8 + 8 + 13 + 12)
    # Ten times 1, below it 3 4 5, 6 after 3 4, and 4 5; six times 2, below it 6 7.
    assert batch.tree == 10 + 3 + 1 + 2 + 6 + 2
    assert batch.gain == 78 / 24
    assert batch.flop is None
    assert batch.speedup is None
    assert found.speedup is None
    assert found.total("real") == 67


def test_pairs_of_a_prompt_come_into_one_batch() -> None:
    found = pair_statistics(PROMPTS * 4, CHOSEN * 4, REJECTED * 4, 4)
    assert [batch.pairs for batch in found.batches] == [4, 4, 4]
    assert sorted(batch.tree for batch in found.batches)[0] == 8  # the other prompt's four pairs
    found = pair_statistics(PROMPTS, CHOSEN, REJECTED, 2)
    assert sorted(batch.pairs for batch in found.batches) == [1, 2]


def test_operations_counted_by_hand() -> None:
    work = Work(linear=7, head=5, attention=((4, None), (4, 3)))
    # Tokens at depths 0 to 4 see 1 2 3 4 5, with the window 1 2 3 3 3.
    assert work.flop(5, 2, np.arange(5)) == 2 * (5 * 7 + 2 * 5 + 2 * 4 * 15 + 2 * 4 * 12)


def test_speedup_by_hand() -> None:
    prompts, chosen, rejected = [[1] * 9], [[2, 3]], [[2]]
    padded, tree = 2 * 11, 9 + 2
    work = Work(linear=1, head=0, attention=())
    assert pair_statistics(prompts, chosen, rejected, 8, work).speedup == padded / tree
    # Rows: 2, 3 and 2 again.
    work = Work(linear=0, head=1, attention=())
    assert pair_statistics(prompts, chosen, rejected, 8, work).speedup == 3 / 2
    work = Work(linear=0, head=0, attention=((1, None),))
    assert pair_statistics(prompts, chosen, rejected, 8, work).speedup == 2
    # Stretches that are too short to share have rows of their own.
    work = Work(linear=0, head=1, attention=())
    found = pair_statistics([[1] * 9], [[2, 3, 4]], [[2, 3, 5]], 8, work)
    assert found.batches[0].tree == 9 + 4
    assert found.speedup == 6 / 4


def test_speedup_is_that_of_all_batches_together() -> None:
    work = Work(linear=1, head=0, attention=())
    found = pair_statistics([[1] * 9, [2] * 99], [[3], [4]], [[5], [6]], 1, work)
    assert sorted(x.speedup for x in found.batches if x.speedup) == [20 / 11, 200 / 101]
    assert found.speedup == 220 / 112


def test_empty_and_equal_completions() -> None:
    found = pair_statistics([[1], [2]], [[], [3]], [[], [3]], 8, Work(1, 1, ()))
    assert found.shared == 1.0
    assert found.positional == found.levenshtein == [0.0, 0.0]
    assert pair_statistics([[1]], [[]], [[]], 8, Work(1, 1, ())).speedup == 2.0
