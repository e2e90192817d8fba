"""What a monitor of falling chosen log-probs reads, against loops over tokens and plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from fastdpop import PreferenceOutput, engines, fused_preference_loss, losses
from fastdpop.displacement import displacement, first_difference
from fastdpop.rows import rows_from_members
from tests.batches import HEADS, LOSSES, Batch, batch, fused, sides_of, token_logps
from tests.displacing import NAMES, of_pairs

ASKED: dict[str, Any] = {"statistics": ("displacement",)}


def alike(pairs: int = 4, dtype: torch.dtype = torch.float64, **more: Any) -> Batch:
    """Pairs whose completions begin alike, of different lengths, or where they are cut."""
    example = batch(pairs, 12, vocabulary=37, dtype=dtype, bias=True, **more)
    for p in range(pairs):
        example.labels[p] = -100
        start, chosen, rejected = 2 + p % 3, 9 + p % 2, 11 - p % 4
        example.labels[p, start:chosen] = torch.randint(37, (chosen - start,))
        example.labels[pairs + p] = -100
        example.labels[pairs + p, start:rejected] = torch.randint(37, (rejected - start,))
        edit = start + p % 4
        example.labels[pairs + p, start:edit] = example.labels[p, start:edit]
    return example


def by_loops(
    example: Batch, pairs: Sequence[Sequence[int]] | None = None, head: str = "plain"
) -> dict[str, Tensor]:
    """By the definitions, in float64."""
    wide = replace(example, hidden=example.hidden.detach(), weight=example.weight.detach())
    wide = wide.to(torch.float64)
    logps = token_logps(wide, HEADS[head]).detach()
    return of_pairs(wide.hidden, wide.labels, logps, sides_of(len(wide.labels), pairs))


def assert_displacement(
    out: PreferenceOutput, want: dict[str, Tensor], rtol: float = 1e-11, atol: float = 1e-12
) -> None:
    for name in NAMES:
        value = getattr(out, name)
        assert not value.requires_grad, name
        assert value.dtype == (torch.bool if name == "differs" else out.losses.dtype), name
        torch.testing.assert_close(value.double(), want[name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("workspace", [None, 3_000, 1], ids=["whole", "chunks", "single"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("engine", engines.available("cpu"))
def test_of_pairs_that_begin_alike(
    engine: str, reduction: str, trained: bool, workspace: int | None
) -> None:
    dtype = torch.float64 if engine == "eager" else torch.float32
    example = alike(dtype=dtype, trained=trained)
    out = fused(
        example, "dpop", engine=engine, reduction=reduction, workspace_bytes=workspace, **ASKED
    )
    want = by_loops(example)
    assert want["differs"].all()
    assert len(want["first_logps"].unique()) == 4
    close = (1e-11, 1e-12) if dtype == torch.float64 else (1e-5, 1e-4)
    assert_displacement(out, want, *close)
    plain = fused(example, "dpop", engine=engine, reduction=reduction, workspace_bytes=workspace)
    assert all(getattr(plain, name) is None for name in NAMES)
    assert torch.equal(out.loss, plain.loss)
    ours, theirs = (torch.autograd.grad(o.loss.sum(), example.trained) for o in (out, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_log_probs_are_those_of_the_loss(head: str) -> None:
    example = alike()
    out = fused(example, "dpop", HEADS[head], **ASKED)
    assert_displacement(out, by_loops(example, head=head))


@pytest.mark.parametrize("name", ["wpo", "ld", "aot", "orpo"])
def test_any_loss(name: str) -> None:
    """LD-DPO weighs tokens and makes each side a sequence of its own; neither shows here."""
    example, loss = alike(), LOSSES[name]
    for pairs in (None, [[2, 6], [0, 5], [0, 4], [3, 4]]):
        given = {"ref_logps": (torch.zeros(4),) * 2} if loss.traits.needs_reference else {}
        out = fused(example, loss, pairs=pairs, **given, **ASKED)
        assert_displacement(out, by_loops(example, pairs))


def test_beside_other_statistics() -> None:
    example = alike()
    names = ("token_accuracy", "displacement", "entropy")
    out, want = (fused(example, "dpop", statistics=s) for s in (names, names[::2]))
    assert_displacement(out, by_loops(example))
    assert torch.equal(out.entropy, want.entropy)
    assert torch.equal(out.token_accuracy, want.token_accuracy)
    assert out.mean_logits is None


EDGES: dict[str, tuple[list[int], list[int]]] = {
    "identical": ([5, 6, 7], [5, 6, 7]),
    "one token, identical": ([5], [5]),
    "rejected begins chosen": ([5, 6, 7, 8], [5, 6]),
    "chosen begins rejected": ([5, 6], [5, 6, 7]),
    "no chosen": ([], [5, 6]),
    "no rejected": ([5, 6], []),
    "neither": ([], []),
    "at the first": ([1, 6, 7], [2, 6, 7]),
    "at the last": ([5, 6, 1], [5, 6, 2]),
    "masked in the middle": ([5, -100, 7, 8], [5, 7, -100, 9]),
    "same again later": ([5, 1, 7, 1], [5, 2, 7, 3]),
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_edges(trained: bool) -> None:
    """All in one batch, whose unscored places are NaN."""
    example = batch(len(EDGES), 6, dtype=torch.float64, trained=trained)
    example.labels[:] = -100
    for p, sides in enumerate(EDGES.values()):
        for side, tokens in enumerate(sides):
            line = p + side * len(EDGES)
            example.labels[line, 1 : 1 + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    want = by_loops(example)
    names = list(EDGES)
    assert want["differs"].tolist() == [
        name
        not in (
            "identical",
            "one token, identical",
            "chosen begins rejected",
            "no chosen",
            "neither",
        )
        for name in names
    ]
    last, early = names.index("at the last"), names.index("no rejected")
    assert want["after_logps"][last] == 0.0
    assert want["rejected_first_logps"][early] == 0.0
    assert want["first_logps"][early] != 0.0
    with torch.no_grad():
        read = torch.cat([example.labels[:, 1:] != -100, torch.zeros(2 * len(EDGES), 1) > 0], 1)
        example.hidden[~read] = torch.nan
    for workspace in (None, 1_000):
        out = fused(example, losses.get("sft"), workspace_bytes=workspace, **ASKED)
        assert_displacement(out, want)


def test_identical_states_have_a_score_of_exactly_nothing() -> None:
    example = alike(dtype=torch.float32)
    with torch.no_grad():
        example.hidden[4:] = example.hidden[:4]
    example.labels[4:] = example.labels[:4]
    out = fused(example, "dpop", **ASKED)
    assert torch.equal(out.ches, torch.zeros(4))
    assert torch.equal(out.ches_normalised, torch.zeros(4))
    assert not out.differs.any()


def test_unpaired_sides() -> None:
    example = alike()
    pairs = [[0, -1], [-1, 5], [3, 7], [1, 6], [3, -1]]
    out = fused(example, "kto", pairs=pairs, **ASKED)
    want = by_loops(example, pairs)
    assert want["differs"].tolist() == [0, 0, 1, 1, 0]
    assert_displacement(out, want)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_sequences_that_share_hidden_states(trained: bool) -> None:
    """A prefix that two completions share stands once; it counts for both."""
    example = alike(trained=trained)
    index = torch.arange(example.labels.numel()).view_as(example.labels)
    hidden = example.hidden.detach().flatten(0, 1)
    for p in range(4):  # up to the state that predicts the first token that differs
        first = 2 + p % 3 + p % 4
        index[4 + p, :first] = index[p, :first]
    hidden = hidden[: index.max() + 1].clone().requires_grad_()
    same = replace(example, hidden=hidden.detach()[index].requires_grad_())
    out = fused_preference_loss(
        hidden,
        example.weight,
        example.labels,
        bias=example.bias,
        ref_logps=example.ref_logps,
        hidden_index=index,
        **ASKED,
    )
    assert len(torch.unique(index)) < index.numel()
    assert_displacement(out, by_loops(same))


def test_packed_sequences() -> None:
    example = alike()
    out = fused_preference_loss(
        example.hidden.flatten(0, 1),
        example.weight,
        example.labels.flatten(),
        bias=example.bias,
        ref_logps=example.ref_logps,
        cu_seqlens=torch.arange(9) * 12,
        **ASKED,
    )
    assert_displacement(out, by_loops(example))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_16_bit_states_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    example = alike(dtype=dtype, scale=40.0)
    out = fused(example, "dpop", **ASKED)
    want = by_loops(example)
    for name in ("ches", "ches_normalised"):
        torch.testing.assert_close(getattr(out, name).double(), want[name], rtol=1e-5, atol=1e-3)
    assert float(want["ches"].abs().max()) > torch.finfo(torch.float16).max


sequences = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(sequences, st.data())
def test_first_differences(tokens: list[list[int]], data: st.DataObject) -> None:
    """Of any pairs of any sequences, with what they have in common once or apart."""
    number = st.integers(-1, len(tokens) - 1)
    pair = st.tuples(number, number).filter(lambda sides: max(sides) >= 0)
    pairs = data.draw(st.lists(pair, max_size=6))
    # The place of a token in the tree of all sequences is its own and all those before it.
    tree: dict[tuple[int, ...], int] = {}
    at = [tree.setdefault(tuple(of[:t]), len(tree)) for of in tokens for t in range(len(of))]
    shared = data.draw(st.booleans())
    index = torch.tensor(at if shared else range(len(at)), dtype=torch.int64)
    flat = torch.tensor([token for of in tokens for token in of], dtype=torch.int64)
    offsets = torch.tensor([0, *map(len, tokens)]).cumsum(0)
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    rows = rows_from_members(index, flat, offsets, table, 3)
    want = []
    for w, l in pairs:  # noqa: E741
        own, other = (tokens[w], tokens[l]) if min(w, l) >= 0 else ([], [])
        place = 0
        while place < min(len(own), len(other)) and own[place] == other[place]:
            place += 1
        want.append(place)
    assert first_difference(rows).tolist() == want


@pytest.mark.parametrize("workspace", [1, 1 << 20])
def test_the_operator(workspace: int) -> None:
    rows = rows_from_members(
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([3, 4, 4, 5]),
        torch.tensor([0, 2, 4]),
        torch.tensor([[0, 1], [0, -1]]),
        7,
    )
    given_ = (torch.randn(3, 5), torch.randn(len(rows.index)), rows.tensors(), workspace)
    opcheck(displacement, given_)


def test_one_graph() -> None:
    def run(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor) -> tuple[Tensor, ...]:
        out = fused_preference_loss(hidden, weight, labels, ref_logps=ref, **ASKED)
        return out.loss, *(getattr(out, name) for name in NAMES)

    torch._dynamo.reset()
    example = alike(dtype=torch.float32)
    inputs = (example.hidden, example.weight, example.labels, example.ref_logps)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), run(*inputs))
    torch._dynamo.reset()


def test_what_adapters_of_a_head_computed_is_no_state() -> None:
    example = alike()
    hidden = torch.cat([example.hidden.detach(), torch.full((8, 12, 2), 7.0)], dim=-1)
    weight = torch.cat([example.weight.detach(), torch.zeros(37, 2)], dim=-1)
    wider = replace(example, hidden=hidden, weight=weight)
    assert_displacement(fused(wider, "dpop", state_columns=16, **ASKED), by_loops(example))
    for wrong in (0, 19, True, 3.0):
        with pytest.raises(ValueError, match=r"state_columns is .*expected a number from 1 to 18"):
            fused(wider, "dpop", state_columns=wrong)
    with pytest.raises(
        ValueError, match="state_columns is 16 without 'displacement' in statistics"
    ):
        fused(wider, "dpop", state_columns=16)
