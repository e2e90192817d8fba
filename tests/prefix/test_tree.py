"""The trie of a batch's sequences: every token sees exactly those before it in its sequences."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdpop.prefix.tree import LEAST_SHARED, PrefixTree, build_tree, runs, sees, side_by_side

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=8)


def rows(tree: PrefixTree) -> list[list[int]]:
    """The nodes of each sequence."""
    bounds = tree.offsets.tolist()
    return [tree.nodes[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@given(SEQUENCES, st.sampled_from([1, 2, 3, LEAST_SHARED, 100]))
def test_every_token_sees_its_own_past(sequences: list[list[int]], least: int) -> None:
    tree = build_tree(sequences, least)
    n = len(tree.input_ids)
    end = tree.end.tolist()
    for sequence, nodes in zip(sequences, rows(tree), strict=True):
        assert tree.input_ids[nodes].tolist() == sequence
        assert tree.position_ids[nodes].tolist() == list(range(len(sequence)))
        for place, node in enumerate(nodes):
            assert [j for j in range(n) if j <= node < end[j]] == nodes[: place + 1]
    assert set(tree.nodes.tolist()) == set(range(n))
    assert [x for run in runs(tree.end) for x in range(run.first, run.last)] == list(range(n))
    assert all(tree.end[run.first] == run.end for run in runs(tree.end))


@given(SEQUENCES)
def test_each_prefix_stands_once(sequences: list[list[int]]) -> None:
    prefixes = {tuple(row[: i + 1]) for row in sequences for i in range(len(row))}
    assert len(build_tree(sequences, 1).input_ids) == len(prefixes)


def test_a_pair() -> None:
    tree = build_tree([[5, 6, 7, 8], [5, 6, 9]], 1)
    assert tree.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert tree.end.tolist() == [5, 5, 4, 4, 5]
    assert rows(tree) == [[0, 1, 2, 3], [0, 1, 4]]
    assert runs(tree.end) == [(0, 2, 5), (2, 4, 4), (4, 5, 5)]


def test_short_stretches_are_not_shared() -> None:
    system, question = list(range(10, 30)), list(range(40, 43))
    sequences = [[*system, *question, 1], [*system, *question, 2], [*system, 3]]
    tree = build_tree(sequences)
    # The three tokens of the question stand twice: a run of their own would cost more.
    assert len(tree.input_ids) == len(system) + 2 * (len(question) + 1) + 1
    assert build_tree(sequences, 1).input_ids.tolist() == [*system, 3, *question, 1, 2]


def test_equal_sequences_stand_once_however_short() -> None:
    tree = build_tree([[1, 2], [1, 2], [1, 2, 3]])
    # Where a run ends anyway, the third goes on for nothing.
    assert tree.input_ids.tolist() == [1, 2, 3]
    assert rows(tree) == [[0, 1], [0, 1], [0, 1, 2]]
    assert len(build_tree([[1, 2], [1, 2, 3]]).input_ids) == 2 + 3


@given(SEQUENCES)
def test_side_by_side_nothing_is_shared(sequences: list[list[int]]) -> None:
    tree = side_by_side(sequences)
    places = torch.arange(len(tree.input_ids))
    seen = sees(tree.end, places[:, None], places)
    for sequence, nodes in zip(sequences, rows(tree), strict=True):
        assert tree.input_ids[nodes].tolist() == sequence
        assert tree.position_ids[nodes].tolist() == list(range(len(sequence)))
        for place, node in enumerate(nodes):
            assert seen[node].nonzero()[:, 0].tolist() == nodes[: place + 1]
    assert len(places) == sum(map(len, sequences))


def test_equal_sequences_do_not_make_others_branch_side_by_side() -> None:
    """They end a run, at which a tree of whatever least stretch lets longer ones go on."""
    sequences = [[1, 2], [1, 2], [1, 2, 3], [1, 2, 4]]
    assert len(build_tree(sequences, 100).input_ids) == 4
    assert side_by_side(sequences).input_ids.tolist() == [1, 2, 1, 2, 1, 2, 3, 1, 2, 4]


def test_arrays_and_nothing() -> None:
    whole = build_tree([np.array([3, 4]), np.array([], dtype=np.int64)])
    assert whole.offsets.tolist() == [0, 2, 2]
    for sequences in ([], [[]], [[], []]):
        tree = build_tree(sequences)
        assert len(tree.input_ids) == len(tree.end) == len(tree.nodes) == 0
        assert tree.offsets.tolist() == [0] * (len(sequences) + 1)
        assert all(
            getattr(tree, name).dtype == torch.int64 for name in ("input_ids", "end", "nodes")
        )
