"""The direction of DPO's and DPOP's gradients after an edit, against autograd of the losses with respect to logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fastdpop import fused_preference_loss, losses
from fastdpop.analysis.gradients import aligned, push_after_edit, smallest_lambda
from fastdpop.analysis.score import SIDES, PairScores, first_difference, score_pairs
from tests.analysis.cases import PAIRS, own_states
from tests.tiny_models import tiny

EDIT = PAIRS[0]
"""One token of six differs, the third."""


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return tiny("llama")


def logit_gradients(model: Any, loss: str, hinge: bool, **options: float) -> list[float]:
    """Of a loss with respect to a logit that both contexts of a token have in common, the correct token's own, for
    each token after the edit. The policy is the reference, or below it by one nat where the `hinge` is on.
    """
    logits = torch.stack([own_states(model, EDIT, side)[0] for side in SIDES])
    labels = torch.tensor([EDIT[f"{side}_ids"] for side in SIDES])
    shared = torch.zeros_like(logits[0], requires_grad=True)
    reference = logits.log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2))
    if hinge:
        reference[0] += 1
    fused_preference_loss(
        logits + shared,
        torch.eye(logits.shape[-1], dtype=torch.float64),
        labels,
        loss=losses.get(loss, beta=0.3, **options),
        ref_logps=reference,
        shift_labels=False,
    ).loss.backward()
    assert shared.grad is not None
    return [float(shared.grad[k, EDIT["chosen_ids"][k]]) for k in (3, 4, 5)]


def test_wrong_way_is_the_sign_of_dpos_gradient(model: Any) -> None:
    push = push_after_edit(score_pairs(model, [EDIT]), [EDIT])
    assert push.places[0].tolist() == [[3, 3], [4, 4], [5, 5]]
    found = logit_gradients(model, "dpo", False)
    # Descent raises what has a negative gradient; DPO's factor is beta * sigmoid(0).
    expected = [-0.3 * 0.5 * x for x in push.gradient[0].tolist()]
    assert found == pytest.approx(expected, rel=1e-5)
    assert push.wrong_way[0].tolist() == [x > 0 for x in found]
    assert set(push.wrong_way[0].tolist()) == {True, False}


def test_beyond_the_smallest_lambda_dpop_raises_the_correct_token(model: Any) -> None:
    push = push_after_edit(score_pairs(model, [EDIT]), [EDIT])
    for k, lam in enumerate(push.smallest_lambda[0].tolist()):
        if lam == 0:
            assert logit_gradients(model, "dpop", True, lam=1e-9)[k] < 0
            continue
        assert logit_gradients(model, "dpop", True, lam=lam * 1.001)[k] < 0
        assert logit_gradients(model, "dpop", True, lam=lam * 0.999)[k] > 0
    assert float(push.smallest_lambda[0].max()) > 0


@pytest.mark.parametrize(
    ("s_w", "s_l", "expected"),
    [
        (0.9, 0.5, 4.0),  # (0.9 - 0.5) / 0.1
        (0.5, 0.9, 0.0),
        (0.7, 0.7, 0.0),
        (1.0, 0.5, math.inf),
        (1.0, 1.0, 0.0),
        (1 - 1e-12, 0.5, 0.5e12),
    ],
)
def test_smallest_lambda(s_w: float, s_l: float, expected: float) -> None:
    found = smallest_lambda(*(torch.tensor([math.log(s)], dtype=torch.float64) for s in (s_w, s_l)))
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_log_probs_that_were_rounded_to_above_zero() -> None:
    pairs = [{"chosen_ids": [1, 2, 3], "rejected_ids": [4, 2, 3]}]
    chosen, rejected = ([torch.tensor(x).double()] for x in ([-1, 1e-9, 1e-9], [-1, 0.0, -0.5]))
    push = push_after_edit(PairScores(chosen, rejected, torch.tensor([0])), pairs)
    assert push.smallest_lambda[0].tolist() == [0, math.inf]
    assert push.wrong_way[0].tolist() == [False, True]
    assert push.chosen[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("abcdef", "abXdef", [(3, 3), (4, 4), (5, 5)]),
        ("abcdef", "abXYdef", [(3, 4), (4, 5), (5, 6)]),  # an edit of other length
        ("abdef", "abXdef", [(2, 3), (3, 4), (4, 5)]),  # an insertion
        ("abc1def2gh", "abX1deYZ2gh", [(3, 3), (4, 4), (5, 5), (7, 8), (8, 9), (9, 10)]),
        ("abc", "abc", []),
        ("ab", "abc", []),
        ("abc", "xyz", []),
        ("", "abc", []),
    ],
)
def test_aligned(chosen: str, rejected: str, expected: list[tuple[int, int]]) -> None:
    ids = [[*map(ord, text)] for text in (chosen, rejected)]
    found = aligned(ids[0], ids[1], first_difference(ids[0], ids[1]))
    assert [tuple(place) for place in found.tolist()] == expected


def test_degenerate_pairs() -> None:
    scores = score_pairs(tiny("llama"), PAIRS)
    push = push_after_edit(scores, PAIRS)
    assert [len(x) for x in push.wrong_way] == [3, 0, 0, 0, 0, 0, 7, 1]
    assert push.places[6].tolist() == [[2 + k, 4 + k] for k in range(7)]
    nothing = push_after_edit(PairScores([], [], torch.empty(0, dtype=torch.int64)), [])
    assert nothing.wrong_way == []
