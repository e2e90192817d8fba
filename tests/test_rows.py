"""The row layout against loops over positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdpop.rows import Rows, lay_out


def brute_force(labels: Tensor, shift: bool) -> list[list[tuple[int, int]]]:
    """(position in the flattened batch, target) of every scored token of every sequence."""
    count, length = labels.shape
    return [
        [
            (s * length + t - int(shift), int(labels[s, t]))
            for t in range(int(shift), length)
            if labels[s, t] != -100
        ]
        for s in range(count)
    ]


def by_sequence(rows: Rows, sequence: int) -> list[tuple[int, int]]:
    """The rows of one sequence of the layout, in order."""
    members = torch.arange(len(rows.index)) if rows.members is None else rows.members
    mine = members[rows.offsets[sequence] : rows.offsets[sequence + 1]]
    return list(zip(rows.index[mine].tolist(), rows.targets[mine].tolist(), strict=True))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, bool]:
    count, length = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    token = st.one_of(st.just(-100), st.integers(0, 10))
    labels = torch.tensor(
        draw(
            st.lists(
                st.lists(token, min_size=length, max_size=length), min_size=count, max_size=count
            )
        )
    )
    pairs = None
    if count % 2 or draw(st.booleans()):
        index = st.integers(0, count - 1)
        pairs = torch.tensor(draw(st.lists(st.tuples(index, index), min_size=1, max_size=5)))
    return labels, pairs, draw(st.booleans())


@given(layouts())
def test_rows_are_the_scored_tokens_of_the_sequences_in_pairs(
    case: tuple[Tensor, Tensor | None, bool],
) -> None:
    labels, pairs, shift = case
    rows = lay_out(labels, 11, pairs=pairs, shift=shift)
    want = brute_force(labels, shift)
    half = len(labels) // 2
    sides = [[i, i + half] for i in range(half)] if pairs is None else pairs.tolist()
    assert [[int(rows.inputs[s]) for s in pair] for pair in rows.pairs.tolist()] == sides
    for number, source in enumerate(rows.inputs.tolist()):
        assert by_sequence(rows, number) == want[source]
    used = {s for pair in sides for s in pair}
    assert len(rows.index) == sum(len(want[s]) for s in used), "a row is scored once"


@given(layouts())
def test_packed_and_padded_batches_have_the_same_rows(
    case: tuple[Tensor, Tensor | None, bool],
) -> None:
    labels, pairs, shift = case
    bounds = torch.arange(len(labels) + 1) * labels.shape[1]
    padded = lay_out(labels, 11, pairs=pairs, shift=shift)
    packed = lay_out(labels.reshape(-1), 11, cu_seqlens=bounds, pairs=pairs, shift=shift)
    for a, b in zip(padded.tensors(), packed.tensors(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@given(layouts(), st.floats(0.0, 1.0))
def test_ld_alpha_weighs_what_lies_past_the_partner(
    case: tuple[Tensor, Tensor | None, bool], alpha: float
) -> None:
    labels, pairs, shift = case
    half = len(labels) // 2
    sides = [[i, i + half] for i in range(half)] if pairs is None else pairs.tolist()
    rows = lay_out(labels, 11, pairs=pairs, shift=shift, ld_alpha=alpha)
    want = brute_force(labels, shift)
    for own, pair in zip(rows.pairs.tolist(), sides, strict=True):
        near = min(len(want[s]) for s in pair)
        for number, source in zip(own, pair, strict=True):
            assert by_sequence(rows, number) == want[source]
            assert rows.weights is not None
            weights = rows.weights[rows.offsets[number] : rows.offsets[number + 1]].tolist()
            assert weights == [1.0 if t < near else alpha for t in range(len(want[source]))]


@given(layouts(), st.one_of(st.none(), st.floats(0.0, 1.0)))
def test_sums_and_spread_are_transposes(
    case: tuple[Tensor, Tensor | None, bool], alpha: float | None
) -> None:
    labels, pairs, shift = case
    rows = lay_out(labels, 11, pairs=pairs, shift=shift, ld_alpha=alpha)
    torch.manual_seed(0)
    x = torch.randn(len(rows.index), dtype=torch.float64)
    y = torch.randn(len(rows.inputs), dtype=torch.float64)
    torch.testing.assert_close(rows.sums(x) @ y, x @ rows.spread(y))


@given(layouts(), st.one_of(st.none(), st.floats(0.0, 1.0)))
def test_parts_are_the_whole(case: tuple[Tensor, Tensor | None, bool], alpha: float | None) -> None:
    labels, pairs, shift = case
    rows = lay_out(labels, 11, pairs=pairs, shift=shift, ld_alpha=alpha)
    torch.manual_seed(0)
    x = torch.randn(len(rows.index), dtype=torch.float64)
    groups = rows.groups.shape[1] - 1
    cut = groups // 2
    sums, pair_count = [], 0
    for first, last in ((0, cut), (cut, groups)):
        part = rows.part(first, last)
        own = x[rows.groups[0, first] : rows.groups[0, last]]
        sums.append(part.sums(own))
        of_part = rows.order[pair_count : pair_count + len(part.pairs)]
        assert torch.equal(part.inputs[part.pairs], rows.inputs[rows.pairs[of_part]])
        pair_count += len(part.pairs)
    torch.testing.assert_close(torch.cat(sums), rows.sums(x))
    assert pair_count == len(rows.pairs)


def test_pairs_that_share_a_sequence_are_one_group() -> None:
    labels = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    rows = lay_out(labels, 11, pairs=torch.tensor([[0, 1], [2, 3], [0, 3]]), shift=True)
    assert rows.groups.shape[1] - 1 == 1
    apart = lay_out(labels, 11, pairs=torch.tensor([[0, 1], [2, 3]]), shift=True)
    assert apart.groups[0].tolist() == [0, 2, 4]


def test_a_sequence_that_no_pair_uses_is_not_scored() -> None:
    labels = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    rows = lay_out(labels, 11, pairs=torch.tensor([[2, 0]]), shift=False)
    assert sorted(rows.targets.tolist()) == [1, 2, 3, 7, 8, 9]


def test_the_first_token_of_a_packed_sequence_is_never_scored() -> None:
    rows = lay_out(torch.tensor([1, 2, 3, 4, 5]), 11, cu_seqlens=torch.tensor([0, 2, 2, 5]))
    assert rows.targets.tolist() == [2, 4, 5]
    assert rows.index.tolist() == [0, 2, 3]
    assert rows.lengths.tolist() == [1, 0, 2]


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 3, 2, 5], [0], [0, 6]])
def test_wrong_bounds_are_named(bounds: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"cu_seqlens is \[.*expected non-decreasing bounds from 0 to"
    ):
        lay_out(torch.arange(5), 11, cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("wrong", [-1, 11, -101])
def test_a_label_outside_the_vocabulary_is_named(wrong: int) -> None:
    with pytest.raises(
        ValueError, match=rf"labels contain {wrong}, expected token ids in \[0, 11\)"
    ):
        lay_out(torch.tensor([[1, wrong, 3], [1, 2, 3]]), 11)
