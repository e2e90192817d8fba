"""Rankings: Plackett and Luce's model, against its definition, in any order and any parts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from fastdpop import fused_preference_loss, losses
from fastdpop.losses import PairLogps
from fastdpop.losses.ranking import placed, places
from tests.batches import batch, fused, token_logps

LISTS = [[6, 0, 3, 2], [7, 4], [1, 8, 5]]


def by_definition(rewards: Tensor, lists: list[list[int]]) -> list[Tensor]:
    """Minus the log of the product over k of ``exp(b_k) / sum_(j >= k) exp(b_j)``, of each list."""
    return [
        -torch.stack([rewards[of[k]].exp() / rewards[of[k:]].exp().sum() for k in range(len(of))])
        .log()
        .sum()
        for of in lists
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("workspace", [None, 2_000], ids=["whole", "chunks"])
@pytest.mark.parametrize("order", ["forward", "backward", "mixed"])
def test_lists_by_definition(
    order: str, workspace: int | None, trained: bool, dtype: torch.dtype
) -> None:
    example = batch(5, dtype=dtype, trained=trained)
    pairs, values = losses.ranked(LISTS)
    of = {
        "forward": torch.arange(6),
        "backward": torch.arange(6).flip(0),
        "mixed": torch.tensor([4, 1, 5, 3, 0, 2]),
    }[order]
    out = fused(
        example,
        losses.get("plackett_luce", beta=0.7),
        pairs=pairs[of],
        pair_values={"list": values["list"][of]},
        reduction="sum",
        workspace_bytes=workspace,
    )
    wide = example.to(torch.float64)
    want = by_definition(0.7 * (token_logps(wide).sum(1) - example.ref_logps), LISTS)
    exact = (
        {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(out.loss.double(), sum(want), **exact)
    of_lists = [out.losses[values["list"][of] == number].sum() for number in range(len(LISTS))]
    torch.testing.assert_close(torch.stack(of_lists).double(), torch.stack(want).detach(), **exact)
    got = torch.autograd.grad(out.loss, example.trained)
    wanted = torch.autograd.grad(sum(want), wide.trained)
    torch.testing.assert_close([g.double() for g in got], list(wanted), **exact)


def test_a_list_of_two_is_dpo_bit_for_bit(four_pairs: PairLogps) -> None:
    for options in ({}, {"beta": 0.7, "label_smoothing": 0.1}):
        found = []
        for name in ("plackett_luce", "dpo"):
            values = losses.get(name, **options)(four_pairs)
            grads = torch.autograd.grad(values.sum(), (four_pairs.chosen, four_pairs.rejected))
            found.append((values, *grads))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    example = batch(3)
    out = [
        fused(example, "plackett_luce", pair_values={"list": torch.tensor([5, 3, 4])}),
        fused(example, "dpo"),
    ]
    grads = [torch.autograd.grad(o.loss, example.trained) for o in out]
    assert torch.equal(out[0].losses, out[1].losses)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@given(st.lists(st.integers(2, 5), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_any_lists_in_any_order(sizes: list[int], random: object) -> None:
    """A list's losses add up to its log-likelihood, whatever stands between its pairs."""
    count = sum(sizes)
    sequences = list(range(count))
    random.shuffle(sequences)  # type: ignore[attr-defined]
    take = iter(sequences)
    lists = [list(itertools.islice(take, size)) for size in sizes]
    pairs, values = losses.ranked(lists)
    order = list(range(len(pairs)))
    random.shuffle(order)  # type: ignore[attr-defined]
    pairs, numbers = pairs[order], values["list"][order].double()
    rewards = torch.linspace(-3.0, 2.0, count, dtype=torch.float64)
    number, place = places(pairs, numbers)
    ones = torch.ones(len(pairs), dtype=torch.float64)
    there = ones > 0
    chosen, rejected = rewards[pairs].unbind(1)
    logps = PairLogps(
        chosen, rejected, ones, ones, 0 * ones, 0 * ones, None, None, there, there, None,
        ones.sum(), 2 * ones.sum(), ones.sum(), {"list": number, "place in the list": place},
    )  # fmt: skip
    found = losses.get("plackett_luce", beta=1.0)(logps)
    of_lists = [found[numbers == n].sum() for n in range(len(lists))]
    want = by_definition(rewards, lists)
    torch.testing.assert_close(torch.stack(of_lists), torch.stack(want))


def test_gradcheck_of_a_list(four_pairs: PairLogps) -> None:
    """Pairs without a layout stand in the order of their list."""
    pairs = replace(four_pairs, values={"list": torch.tensor([1, 1, 0, 1]).double()})

    def values(chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses.get("plackett_luce", beta=0.5)(
            replace(pairs, chosen=chosen, rejected=rejected)
        )

    assert torch.autograd.gradcheck(values, (pairs.chosen, pairs.rejected))


def test_far_apart_completions_stay_finite(four_pairs: PairLogps) -> None:
    chosen = torch.tensor([-1e5, 0.0, -1e4, -1.0], dtype=torch.float64, requires_grad=True)
    pairs = replace(four_pairs, chosen=chosen, values={"list": torch.zeros(4).double()})
    found = losses.get("plackett_luce", beta=3.0)(pairs)
    assert found.isfinite().all()
    assert torch.autograd.grad(found.sum(), chosen)[0].isfinite().all()


def test_ranked() -> None:
    pairs, values = losses.ranked([[3, 1, 2], (0, 4)])
    assert pairs.tolist() == [[3, 1], [1, 2], [0, 4]]
    assert values["list"].tolist() == [0, 0, 1]
    none, of_none = losses.ranked([])
    assert none.shape == (0, 2)
    assert of_none["list"].shape == (0,)
    wrong: Any
    for wrong in (
        [[0]],
        [[0, 1], [2, 3, 2]],
        [0, 1],
        [None],
        [[0, -1]],
        [[0.0, 1.0]],
        [[False, True]],
        ["01"],
    ):
        with pytest.raises(
            ValueError, match=r"lists\[\d\] is .*, expected the indices of at least two sequences"
        ):
            losses.ranked(wrong)


@pytest.mark.parametrize(
    "pairs",
    [
        [[0, 1], [2, 3]],
        [[0, 1], [0, 2]],
        [[0, 2], [1, 2]],
        [[0, 1], [1, 0]],
        [[0, 1], [1, 2], [2, 1]],
        [[4, 5], [0, 1], [1, 0]],
        [[2, 2]],
    ],
    ids=str,
)
def test_what_is_no_chain_is_refused(pairs: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"\['list'\] is 7 for the pairs .*, expected a chain"):
        fused(
            batch(3),
            "plackett_luce",
            pairs=pairs,
            pair_values={"list": torch.full((len(pairs),), 7)},
        )


def test_pairs_with_their_own_copies_of_a_completion_are_no_list() -> None:
    with pytest.raises(ValueError, match=r"\[\[0, 3\], \[1, 4\], \[2, 5\]\], expected a chain"):
        fused(batch(3), "plackett_luce", pair_values={"list": torch.zeros(3)})


def test_what_a_ranking_cannot_be() -> None:
    example = batch(3)
    with pytest.raises(
        ValueError, match=r"not given, and Plackett.* needs more: pair_values=\{'list'"
    ):
        fused(example, "plackett_luce", pair_values={})
    with pytest.raises(ValueError, match=r"-1"):
        fused(example, "plackett_luce", pairs=[[0, -1]], pair_values={"list": torch.zeros(1)})
    with pytest.raises(ValueError, match="has no one partner"):
        losses.length_desensitised(0.5 * losses.get("listwise") + losses.get("sft"), 0.5)


def test_weights_are_those_of_choices() -> None:
    example = batch(5, dtype=torch.float64)
    pairs, values = losses.ranked(LISTS)
    weight = torch.linspace(0.0, 2.0, len(pairs), dtype=torch.float64)
    plain = fused(example, "plackett_luce", pairs=pairs, pair_values=values)
    heavy = fused(example, "plackett_luce", pairs=pairs, pair_values={**values, "weight": weight})
    torch.testing.assert_close(heavy.losses, plain.losses * weight)


def test_the_operator() -> None:
    pairs, values = losses.ranked(LISTS)
    opcheck(places, (pairs, values["list"].double()))


def test_one_graph() -> None:
    """Of lists of two: a table of pairs breaks the graph for any loss."""

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor, of: Tensor) -> Tensor:
        return fused_preference_loss(
            hidden, weight, labels, loss="plackett_luce", ref_logps=ref, pair_values={"list": of}
        ).loss

    torch._dynamo.reset()
    example = batch(3)
    given = (example.hidden, example.weight, example.labels, example.ref_logps)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    lists = torch.arange(3)
    torch.testing.assert_close(compiled(*given, lists), run(*given, lists))
    with pytest.raises(ValueError, match="expected a chain"):
        compiled(*given, 0 * lists)
    torch._dynamo.reset()


def test_weights_that_make_a_mean_over_lists() -> None:
    """As docs/losses.md says."""
    example = batch(5, dtype=torch.float64)
    pairs, values = losses.ranked(LISTS)
    rewards = 0.1 * (token_logps(example).sum(1) - example.ref_logps).detach()
    want = torch.stack(by_definition(rewards, LISTS))
    choices = torch.tensor([len(of) - 1 for of in LISTS])
    of_pair = choices[values["list"]]
    for weight, mean in (
        (torch.full((6,), 6 / 3), want.mean()),
        (6 / (3 * of_pair), (want / choices).mean()),
    ):
        given = {**values, "weight": weight.double()}
        out = fused(example, "plackett_luce", pairs=pairs, pair_values=given)
        torch.testing.assert_close(out.loss, mean)


def test_lists_of_other_processes_are_other_lists() -> None:
    """Where a loss beside it brings the pairs of all processes together."""
    pairs, values = losses.ranked([[0, 1, 2]])
    of_both = [placed(pairs, {"list": values["list"].double()}, process) for process in (0, 1)]
    joined = {name: torch.cat([of[name] for of in of_both]) for name in of_both[0]}
    ones = torch.ones(4, dtype=torch.float64)
    chosen = torch.tensor([1.0, 0.0, -2.0, 3.0], dtype=torch.float64)
    rejected = torch.tensor([0.0, -1.0, 3.0, 0.5], dtype=torch.float64)
    logps = PairLogps(
        chosen, rejected, ones, ones, 0 * ones, 0 * ones, None, None, ones > 0, ones > 0, None,
        ones.sum(), 2 * ones.sum(), ones.sum(), joined,
    )  # fmt: skip
    together = losses.get("plackett_luce", beta=1.0)(logps)
    rewards = torch.tensor([[1.0, 0.0, -1.0], [-2.0, 3.0, 0.5]], dtype=torch.float64)
    want = [by_definition(of, [[0, 1, 2]])[0] for of in rewards]
    torch.testing.assert_close(together.view(2, 2).sum(1), torch.stack(want))
