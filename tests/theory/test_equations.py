"""The equations of the DPOP paper (arXiv:2402.13228), as identities in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdpop.losses import get
from tests.theory.shared_logits import (
    of_logps,
    one_hot,
    sequence_logp,
    theta_gradient,
)
from tests.tiny_model import tiny_llama

EXACT = {"rtol": 1e-12, "atol": 1e-15}
TOKENS, VOCABULARY, EDIT = 9, 13, 3
BETA = 0.3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def pair() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logits and tokens of a pair at edit distance 1: equal contexts up to and at the edit."""
    chosen = 3 * torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)
    rejected = 3 * torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)
    rejected[: EDIT + 1] = chosen[: EDIT + 1]
    right = torch.randint(VOCABULARY, (TOKENS,))
    wrong = right.clone()
    wrong[EDIT] = (right[EDIT] + 1) % VOCABULARY
    return (chosen, rejected), (right, wrong)


def test_equation_4() -> None:
    """d log s_i / d theta_j = 1{i=j} - s_j."""
    theta = torch.randn(VOCABULARY, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(lambda x: x.log_softmax(-1), theta)
    expected = torch.eye(VOCABULARY).double() - theta.softmax(-1)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(("r_w", "r_l"), [(0.0, 0.0), (0.5, -1.0), (-2.0, 3.0)])
def test_equations_2_and_5(
    pair: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], r_w: float, r_l: float
) -> None:
    """DPO: nothing before the edit, two one-hot vectors at it, s{y_l} - s{y_w} after it."""
    logits, tokens = pair
    found = theta_gradient(get("dpo", beta=BETA), logits, tokens, (r_w, r_l))
    factor = -BETA * sigmoid(-BETA * (r_w - r_l))
    assert torch.equal(found[:EDIT], torch.zeros(EDIT, VOCABULARY).double())
    at_edit = one_hot(tokens[0], VOCABULARY)[EDIT] - one_hot(tokens[1], VOCABULARY)[EDIT]
    torch.testing.assert_close(found[EDIT], factor * at_edit, **EXACT)
    s_w, s_l = (row.softmax(-1) for row in logits)
    torch.testing.assert_close(found[EDIT + 1 :], factor * (s_l - s_w)[EDIT + 1 :], **EXACT)


def test_logits_that_are_not_shared_are_pushed_the_right_way(
    pair: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """What Eq. 2 rests on: as variables of their own, the chosen logits get 1{i=j} - s_j."""
    logits, tokens = pair
    leaves = [row.clone().requires_grad_() for row in logits]
    chosen, rejected = map(sequence_logp, leaves, tokens)
    loss = get("dpo", beta=BETA)(of_logps(chosen, rejected, 0.0, 0.0)).sum()
    found = torch.autograd.grad(loss, leaves[0])[0]
    expected = -BETA / 2 * (one_hot(tokens[0], VOCABULARY) - logits[0].softmax(-1))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("lam", [0.5, 5.0, 50.0, 500.0])
@pytest.mark.parametrize(("r_w", "r_l"), [(-0.125, -0.25), (-2.0, 3.0)])
def test_appendix_b2(
    pair: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], lam: float, r_w: float, r_l: float
) -> None:
    """DPOP below the reference: (1 + lambda)(1{i=j} - s_j{y_w}) - (1{i=j} - s_j{y_l})."""
    logits, tokens = pair
    found = theta_gradient(get("dpop", beta=BETA, lam=lam), logits, tokens, (r_w, r_l))
    # The factor's z has the penalty in it, and is the same for all positions.
    factor = -BETA * sigmoid(-BETA * (r_w - r_l + lam * r_w))
    chosen, rejected = (
        one_hot(ids, VOCABULARY) - row.softmax(-1) for row, ids in zip(logits, tokens, strict=True)
    )
    torch.testing.assert_close(found, factor * ((1 + lam) * chosen - rejected), **EXACT)


@pytest.mark.parametrize(("r_w", "r_l"), [(0.0, 0.0), (0.5, -1.0), (2.0, 3.0)])
def test_appendix_b2_above_the_reference(
    pair: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], r_w: float, r_l: float
) -> None:
    """pi_ratio >= 1, equality included: DPO's gradient, bit for bit."""
    dpo = theta_gradient(get("dpo", beta=BETA), *pair, (r_w, r_l))
    dpop = theta_gradient(get("dpop", beta=BETA, lam=50.0), *pair, (r_w, r_l))
    assert torch.equal(dpo, dpop)


@pytest.mark.parametrize(("name", "push"), [("dpo", 1.0), ("dpop", 51.0)])
def test_theta_as_a_bias_of_the_lm_head(name: str, push: float) -> None:
    """In a transformer, a bias of the lm_head is a theta that all positions share as well."""
    model = tiny_llama().double()
    right = torch.randint(256, (1, TOKENS))
    wrong = right.clone()
    wrong[0, EDIT] = (right[0, EDIT] + 1) % 256
    bias = torch.zeros(258, dtype=torch.float64, requires_grad=True)
    ratios = (-0.5, 0.25)
    logits = [model(ids).logits[0, :-1].detach() for ids in (right, wrong)]
    chosen, rejected = (
        sequence_logp(row + bias, ids[0, 1:])
        for row, ids in zip(logits, (right, wrong), strict=True)
    )
    loss = get(name, beta=BETA)(of_logps(chosen, rejected, *ratios)).sum()
    found = torch.autograd.grad(loss, bias)[0]
    z = BETA * (ratios[0] - ratios[1] + (push - 1) * ratios[0])
    rows = (
        one_hot(ids[0, 1:], 258) - row.softmax(-1)
        for row, ids in zip(logits, (right, wrong), strict=True)
    )
    chosen_rows, rejected_rows = rows
    expected = -BETA * sigmoid(-z) * (push * chosen_rows - rejected_rows).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def logps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log pi and log ref of y_w and y_l: eight pairs, above and below the reference."""
    pi_w, pi_l, ref_w, ref_l = -20 - 5 * torch.randn(4, 8, dtype=torch.float64)
    return pi_w, pi_l, ref_w, ref_l


@pytest.mark.parametrize("lam", [0.5, 50.0])
def test_appendix_c(lam: float) -> None:
    """The corrected contrastive objective is Eq. 3's argument, and the additive form's terms."""
    pi_w, pi_l, ref_w, ref_l = logps()
    log_embedding_w, log_embedding_l = pi_w - ref_w, pi_l - ref_l  # E = pi / ref
    ideal = -ref_w  # log p*, of a policy that is certain: p* = 1 / ref
    margin = -ref_w  # log(1 / ref)
    dissimilar = log_embedding_w - log_embedding_l
    similar = ideal - log_embedding_w
    torch.testing.assert_close(similar, -pi_w, **EXACT)
    assert (similar > margin).any()
    assert (similar < margin).any()
    penalty = torch.relu(similar - margin)  # max(D - m, 0): beyond the margin points are pulled
    given = [
        of_logps(pi_w[[i]], pi_l[[i]], log_embedding_w[i].item(), log_embedding_l[i].item())
        for i in range(8)
    ]

    def values(form: str) -> Tensor:
        return torch.cat([get("dpop", beta=BETA, lam=lam, form=form)(one) for one in given])

    log_sigmoid = torch.nn.functional.logsigmoid
    additive = -log_sigmoid(BETA * dissimilar) + lam * penalty
    torch.testing.assert_close(values("additive"), additive, rtol=1e-11, atol=1e-12)
    inside = -log_sigmoid(BETA * (dissimilar - lam * penalty))
    torch.testing.assert_close(values("inside"), inside, rtol=1e-11, atol=1e-12)


def test_appendix_c_as_printed_has_the_other_half_of_the_hinge() -> None:
    """min(D - m, 0) is 0 where the policy is below its reference, and grows above it without end."""
    pi_w, _, ref_w, _ = logps()
    printed = torch.clamp(-pi_w - -ref_w, max=0.0)
    r_w = pi_w - ref_w
    torch.testing.assert_close(printed, -torch.relu(r_w), **EXACT)
    assert (printed[r_w < 0] == 0).all()
    corrected = torch.relu(-r_w)
    torch.testing.assert_close(corrected + printed, -r_w, **EXACT)


@pytest.mark.parametrize(
    ("form", "lam", "near", "far"),
    [("inside", 50.0, 50.0, 50.0), ("additive", 7.5, 50.0, 527.14)],
)
def test_appendix_c_where_the_penalty_stands(
    form: str, lam: float, near: float, far: float
) -> None:
    """The penalty's slope over DPO's, at z = 0 and at z = 3: constant inside, growing outside."""
    for z, expected in ((0.0, near), (3.0, far)):
        r_w = -1e-3
        penalty = lam * 1e-3 if form == "inside" else 0.0
        r_l = r_w - penalty - z / BETA
        chosen, rejected = (torch.tensor([-9.0]).double().requires_grad_() for _ in range(2))
        loss = get("dpop", beta=BETA, lam=lam, form=form)(of_logps(chosen, rejected, r_w, r_l))
        slope_w, slope_l = torch.autograd.grad(loss.sum(), (chosen, rejected))
        found = (-slope_w - slope_l) / slope_l
        assert found.item() == pytest.approx(expected, rel=1e-4)
