"""The row layout against loops over positions."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdpop.rows import Rows, default_pairs, rows_from_labels, rows_from_members


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
    mine = rows.members[rows.offsets[sequence] : rows.offsets[sequence + 1]]
    return list(zip(rows.index[mine].tolist(), rows.targets[mine].tolist(), strict=True))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Tensor, Tensor, bool]:
    count, length = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    token = st.one_of(st.just(-100), st.integers(0, 10))
    labels = torch.tensor(
        draw(
            st.lists(
                st.lists(token, min_size=length, max_size=length), min_size=count, max_size=count
            )
        )
    )
    pairs = default_pairs(count, labels.device)
    if count % 2 or draw(st.booleans()):
        index = st.integers(0, count - 1)
        pairs = torch.tensor(draw(st.lists(st.tuples(index, index), min_size=1, max_size=5)))
    return labels, pairs, draw(st.booleans())


@given(layouts())
def test_rows_are_the_scored_tokens_of_the_sequences_in_pairs(
    case: tuple[Tensor, Tensor, bool],
) -> None:
    labels, pairs, shift = case
    rows = rows_from_labels(labels, 11, pairs, shift=shift)
    want = brute_force(labels, shift)
    sides = pairs.tolist()
    assert [[int(rows.inputs[s]) for s in pair] for pair in rows.pairs.tolist()] == sides
    for number, source in enumerate(rows.inputs.tolist()):
        assert by_sequence(rows, number) == want[source]
    used = {s for pair in sides for s in pair}
    assert len(rows.index) == sum(len(want[s]) for s in used), "a row is scored once"


@given(layouts())
def test_packed_and_padded_batches_have_the_same_rows(
    case: tuple[Tensor, Tensor, bool],
) -> None:
    labels, pairs, shift = case
    bounds = torch.arange(len(labels) + 1) * labels.shape[1]
    padded = rows_from_labels(labels, 11, pairs, shift=shift)
    packed = rows_from_labels(labels.reshape(-1), 11, pairs, cu_seqlens=bounds, shift=shift)
    for a, b in zip(padded.tensors(), packed.tensors(), strict=True):
        assert torch.equal(a, b)


@given(layouts(), st.one_of(st.none(), st.floats(0.0, 1.0)))
def test_positions_that_come_once_need_no_search(
    case: tuple[Tensor, Tensor, bool], alpha: float | None
) -> None:
    """Without `hidden_index` nothing is in common, and the rows are those that the search finds."""
    labels, pairs, shift = case
    places = torch.arange(labels.numel()).view(labels.shape)
    found, searched = (
        rows_from_labels(
            labels, 11, pairs, shift=shift, keep_unpaired=True, ld_alpha=alpha, **options
        )
        for options in ({}, {"hidden_index": places, "positions": labels.numel()})
    )
    assert all(map(torch.equal, found.tensors(), searched.tensors()))


@given(layouts(), st.floats(0.0, 1.0))
def test_ld_alpha_weighs_what_lies_past_the_partner(
    case: tuple[Tensor, Tensor, bool], alpha: float
) -> None:
    labels, pairs, shift = case
    sides = pairs.tolist()
    rows = rows_from_labels(labels, 11, pairs, shift=shift, ld_alpha=alpha)
    want = brute_force(labels, shift)
    for own, pair in zip(rows.pairs.tolist(), sides, strict=True):
        near = min(len(want[s]) for s in pair)
        for number, source in zip(own, pair, strict=True):
            assert by_sequence(rows, number) == want[source]
            assert rows.weights is not None
            weights = rows.weights[rows.offsets[number] : rows.offsets[number + 1]].tolist()
            assert weights == [1.0 if t < near else alpha for t in range(len(want[source]))]


@given(layouts(), st.one_of(st.none(), st.floats(0.0, 1.0)))
def test_the_two_sums_are_transposes(
    case: tuple[Tensor, Tensor, bool], alpha: float | None
) -> None:
    labels, pairs, shift = case
    rows = rows_from_labels(labels, 11, pairs, shift=shift, ld_alpha=alpha)
    torch.manual_seed(0)
    x = torch.randn(len(rows.index), dtype=torch.float64)
    y = torch.randn(len(rows.inputs), dtype=torch.float64)
    torch.testing.assert_close(rows.sum_per_sequence(x) @ y, x @ rows.sum_per_row(y))


@given(layouts(), st.one_of(st.none(), st.floats(0.0, 1.0)))
def test_parts_are_the_whole(case: tuple[Tensor, Tensor, bool], alpha: float | None) -> None:
    labels, pairs, shift = case
    rows = rows_from_labels(labels, 11, pairs, shift=shift, ld_alpha=alpha)
    torch.manual_seed(0)
    x = torch.randn(len(rows.index), dtype=torch.float64)
    groups = rows.groups.shape[1] - 1
    cut = groups // 2
    sums, pair_count = [], 0
    for first, last in ((0, cut), (cut, groups)):
        part = rows.part(first, last)
        own = x[rows.groups[0, first] : rows.groups[0, last]]
        sums.append(part.sum_per_sequence(own))
        of_part = rows.order[pair_count : pair_count + len(part.pairs)]
        assert torch.equal(part.inputs[part.pairs], rows.inputs[rows.pairs[of_part]])
        pair_count += len(part.pairs)
    torch.testing.assert_close(torch.cat(sums), rows.sum_per_sequence(x))
    assert pair_count == len(rows.pairs)


def test_pairs_that_share_a_sequence_are_one_group() -> None:
    labels = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    rows = rows_from_labels(labels, 11, torch.tensor([[0, 1], [2, 3], [0, 3]]), shift=True)
    assert rows.groups.shape[1] - 1 == 1
    apart = rows_from_labels(labels, 11, torch.tensor([[0, 1], [2, 3]]), shift=True)
    assert apart.groups[0].tolist() == [0, 2, 4]


def test_a_sequence_that_no_pair_uses_is_not_scored() -> None:
    labels = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    rows = rows_from_labels(labels, 11, torch.tensor([[2, 0]]), shift=False)
    assert sorted(rows.targets.tolist()) == [1, 2, 3, 7, 8, 9]


def test_the_first_token_of_a_packed_sequence_is_never_scored() -> None:
    rows = rows_from_labels(
        torch.tensor([1, 2, 3, 4, 5]),
        11,
        torch.tensor([[0, 1]]),
        cu_seqlens=torch.tensor([0, 2, 2, 5]),
        keep_unpaired=True,
    )
    assert rows.targets.tolist() == [2, 4, 5]
    assert rows.index.tolist() == [0, 2, 3]
    assert rows.lengths.tolist() == [1, 0, 2]


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 3, 2, 5], [0], [0, 6]])
def test_wrong_bounds_are_named(bounds: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"cu_seqlens is \[.*expected non-decreasing bounds from 0 to"
    ):
        rows_from_labels(
            torch.arange(5), 11, torch.tensor([[0, 0]]), cu_seqlens=torch.tensor(bounds)
        )


@pytest.mark.parametrize("wrong", [-1, 11, -101])
def test_a_label_outside_the_vocabulary_is_named(wrong: int) -> None:
    with pytest.raises(
        ValueError, match=rf"labels contain {wrong}, expected token ids in \[0, 11\)"
    ):
        rows_from_labels(torch.tensor([[1, wrong, 3], [1, 2, 3]]), 11, torch.tensor([[0, 1]]))


# ---- rows that sequences share ------------------------------------------------------------------


@st.composite
def token_lists(draw: st.DrawFn) -> tuple[list[list[tuple[int, int]]], Tensor, float | None]:
    """Sequences of (position, target), of which several may be in several sequences, and pairs."""
    token = st.tuples(st.integers(0, 5), st.integers(0, 3))
    sequence = st.lists(token, max_size=6, unique=True)
    sequences = draw(st.lists(sequence, min_size=1, max_size=6))
    index = st.integers(-1, len(sequences) - 1)
    pair = st.tuples(index, index).filter(lambda pair: max(pair) >= 0)
    pairs = torch.tensor(draw(st.lists(pair, min_size=1, max_size=5)))
    return sequences, pairs, draw(st.one_of(st.none(), st.floats(0.0, 1.0)))


def of_lists(sequences: list[list[tuple[int, int]]], pairs: Tensor, alpha: float | None) -> Rows:
    flat = torch.tensor([pair for one in sequences for pair in one], dtype=torch.int64)
    index, targets = flat.reshape(-1, 2).T
    offsets = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    return rows_from_members(index, targets, offsets, pairs, 11, ld_alpha=alpha)


@given(token_lists())
def test_what_sequences_share_is_one_row(
    case: tuple[list[list[tuple[int, int]]], Tensor, float | None],
) -> None:
    sequences, pairs, alpha = case
    rows = of_lists(sequences, pairs, alpha)
    named = list(zip(rows.index.tolist(), rows.targets.tolist(), strict=True))
    assert len(set(named)) == len(named)
    used = {s for pair in pairs.tolist() for s in pair if s >= 0}
    assert set(named) == {row for s in used for row in sequences[s]}
    for own, pair in zip(rows.pairs.tolist(), pairs.tolist(), strict=True):
        for number, source in zip(own, pair, strict=True):
            assert (number < 0) == (source < 0)
            if source >= 0:
                assert int(rows.inputs[number]) == source
                assert by_sequence(rows, number) == sequences[source]


@given(token_lists())
def test_groups_hold_all_that_their_pairs_share(
    case: tuple[list[list[tuple[int, int]]], Tensor, float | None],
) -> None:
    rows = of_lists(*case)
    of_rows, of_sequences, of_pairs = rows.groups.tolist()
    assert of_rows[-1] == len(rows.index)
    assert of_sequences[-1] == len(rows.inputs)
    assert of_pairs[-1] == len(rows.pairs)
    x = torch.arange(1.0, len(rows.index) + 1, dtype=torch.float64)
    y = torch.arange(1.0, len(rows.inputs) + 1, dtype=torch.float64)
    torch.testing.assert_close(rows.sum_per_sequence(x) @ y, x @ rows.sum_per_row(y))
    for g in range(len(of_rows) - 1):
        part = rows.part(g, g + 1)
        own, sequences = slice(of_rows[g], of_rows[g + 1]), slice(*of_sequences[g : g + 2])
        if len(part.members):
            assert part.members.min() == 0
            assert part.members.max() == len(part.index) - 1
        whole = rows.sum_per_sequence(x)[sequences]
        torch.testing.assert_close(part.sum_per_sequence(x[own]), whole)
        torch.testing.assert_close(part.sum_per_row(y[sequences]), rows.sum_per_row(y)[own])
        ids = rows.order[of_pairs[g] : of_pairs[g + 1]]
        assert torch.equal(
            torch.where(part.pairs < 0, -1, part.inputs[part.pairs.clamp_min(0)]),
            torch.where(rows.pairs[ids] < 0, -1, rows.inputs[rows.pairs[ids].clamp_min(0)]),
        )


def test_a_branch_predicts_two_tokens_from_one_position() -> None:
    """Prompt position 0, then chosen 5 6 and rejected 5 7: the first token is shared."""
    index, targets = torch.tensor([0, 1, 0, 1]), torch.tensor([5, 6, 5, 7])
    rows = rows_from_members(index, targets, torch.tensor([0, 2, 4]), torch.tensor([[0, 1]]), 11)
    assert rows.index.tolist() == [0, 1, 1]
    assert rows.targets.tolist() == [5, 6, 7]
    assert rows.members.tolist() == [0, 1, 0, 2]
    assert rows.groups.tolist() == [[0, 3], [0, 2], [0, 1]]
    assert not rows.one_pair_per_group(), "its first row counts twice"
    assert rows.sum_per_row(torch.tensor([10.0, 1.0])).tolist() == [11.0, 10.0, 1.0]


def test_sequences_that_share_a_row_are_one_group() -> None:
    index, targets = torch.tensor([0, 1, 0, 2, 7, 8]), torch.tensor([5, 6, 5, 6, 1, 1])
    offsets = torch.tensor([0, 2, 2, 4, 4, 5, 6])
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    rows = rows_from_members(index, targets, offsets, pairs, 11)
    assert rows.groups.tolist() == [[0, 3, 5], [0, 4, 6], [0, 2, 3]]


def test_what_a_row_gets_from_several_sequences_is_added_up_in_float64() -> None:
    count = 40_000  # enough for several threads
    index, targets = torch.arange(count).repeat(3), torch.zeros(3 * count, dtype=torch.int64)
    offsets = torch.arange(4) * count
    pairs = torch.tensor([[0, 1], [0, 2]])
    rows = rows_from_members(index, targets, offsets, pairs, 11)
    x = torch.randn(count, requires_grad=True)
    y = torch.tensor([0.1, 0.7, -0.8], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(rows.sum_per_sequence(x) @ y, x)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, y.sum().float().expand(count))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_far_positions_are_told_apart(dtype: torch.dtype) -> None:
    index, targets = torch.tensor([0, 65_536], dtype=dtype), torch.tensor([9, 9], dtype=dtype)
    rows = rows_from_members(index, targets, torch.tensor([0, 1, 2]), torch.tensor([[0, 1]]), 2**17)
    assert rows.index.tolist() == [0, 65_536]
    assert rows.index.dtype == rows.targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.tensor([1, 11])}, "labels contain 11, expected token ids in [0, 11)"),
        ({"targets": torch.tensor([-5, 1])}, "labels contain -5"),
        ({"offsets": torch.tensor([0, 1])}, "offsets is [0, 1], expected non-decreasing bounds"),
        ({"pairs": torch.tensor([[0, 2]])}, "pairs contains [0, 2], expected sequence indices"),
        ({"pairs": torch.tensor([[-1, -1]])}, "pairs contains [-1, -1], expected"),
    ],
)
def test_wrong_members_are_named(changes: dict[str, Tensor], message: str) -> None:
    given = {
        "index": torch.tensor([0, 1]),
        "targets": torch.tensor([1, 2]),
        "offsets": torch.tensor([0, 1, 2]),
        "pairs": torch.tensor([[0, 1]]),
    }
    rows_from_members(**given, vocab_size=11)
    with pytest.raises(ValueError, match=re.escape(message)):
        rows_from_members(**(given | changes), vocab_size=11)
