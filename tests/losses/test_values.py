"""Values of every loss against expressions written a second time, in plain Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from fastdpop import losses
from fastdpop.losses import PairLogps


@dataclass
class Pair:
    """One pair in Python floats: log-probs, log-ratios rw and rl, lengths nw and nl, and the rewards
    that it was given.
    """

    log_w: float
    log_l: float
    ref_w: float
    ref_l: float
    nw: float
    nl: float
    score_w: float
    score_l: float

    @property
    def rw(self) -> float:
        return self.log_w - self.ref_w

    @property
    def rl(self) -> float:
        return self.log_l - self.ref_l

    @property
    def d(self) -> float:
        return self.rw - self.rl


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log(1 + math.exp(-x))


def smooth(x: float, e: float) -> float:
    return (1 - e) * nls(x) + e * nls(-x)


def each(formula: Callable[[Pair], float]) -> Callable[[list[Pair]], list[float]]:
    return lambda batch: [formula(p) for p in batch]


def nll_shares(batch: list[Pair]) -> list[float]:
    return [-p.log_w * len(batch) / sum(q.nw for q in batch) for p in batch]


def odds(p: float) -> float:
    return p / (1 - p)


def orpo_ratio(p: Pair) -> float:
    return math.log(odds(math.exp(p.log_w / p.nw)) / odds(math.exp(p.log_l / p.nl)))


def aot(batch: list[Pair], e: float) -> list[float]:
    policy = [p.log_w - p.log_l for p in batch]
    reference = sorted(p.ref_w - p.ref_l for p in batch)
    return [smooth(0.1 * (m - reference[sorted(policy).index(m)]), e) for m in policy]


def aot_unpaired(batch: list[Pair]) -> list[float]:
    chosen, rejected = [p.rw for p in batch], sorted(p.rl for p in batch)
    return [nls(0.1 * (r - rejected[sorted(chosen).index(r)])) for r in chosen]


def kto(batch: list[Pair], desirable: float = 1.0, undesirable: float = 1.0) -> list[float]:
    z_w = max(0.0, sum(p.rl for p in batch) / len(batch))
    z_l = max(0.0, sum(p.rw for p in batch) / len(batch))
    return [
        (
            desirable * (1 - sigmoid(0.1 * (p.rw - z_w)))
            + undesirable * (1 - sigmoid(0.1 * (z_l - p.rl)))
        )
        / 2
        for p in batch
    ]


def bco_shifted(batch: list[Pair]) -> list[float]:
    d = sum(0.1 * p.rw + 0.1 * p.rl for p in batch) / (2 * len(batch))
    return [nls(0.1 * p.rw - d) + nls(-(0.1 * p.rl - d)) for p in batch]


def exo(p: Pair) -> float:
    q, e = sigmoid(0.1 * p.d), 1e-3
    return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)


def disco(p: Pair) -> float:
    m = sigmoid(0.1 * p.d / 0.05)
    return (1 - m) * nls(0.1 * p.d) + m * math.exp(-0.1 * p.d)


def dpop(form: str, lam: float, e: float) -> Callable[[Pair], float]:
    def formula(p: Pair) -> float:
        hinge = lam * max(0.0, p.ref_w - p.log_w)
        if form == "inside":
            return smooth(0.3 * (p.d - hinge), e)
        if form == "outside":
            return smooth(0.3 * p.d - hinge, e)
        return smooth(0.3 * p.d, e) + hinge

    return formula


def simpo(p: Pair) -> float:
    return nls(2.0 * p.log_w / p.nw - 2.0 * p.log_l / p.nl - 1.0)


def bernoulli_kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def rpo(eta: float, policy_first: bool) -> Callable[[Pair], float]:
    def formula(p: Pair) -> float:
        policy, given = sigmoid(0.1 * p.d), sigmoid(eta * (p.score_w - p.score_l))
        return bernoulli_kl(policy, given) if policy_first else bernoulli_kl(given, policy)

    return formula


def alpha_po(alpha: float) -> Callable[[Pair], float]:
    def formula(p: Pair) -> float:
        # pi(y)^(-alpha / |y|), as the paper writes it.
        power_w, power_l = (
            math.exp(p.log_w) ** (-alpha / p.nw),
            math.exp(p.log_l) ** (-alpha / p.nl),
        )
        return nls(-2.5 / alpha * power_w + 2.5 / alpha * power_l - 0.1)

    return formula


def cal_dpo(calibration: float) -> Callable[[Pair], float]:
    return lambda p: nls(p.d) + calibration * ((p.rw - 5.0) ** 2 + (p.rl + 5.0) ** 2)


def mpo(batch: list[Pair]) -> list[float]:
    return [
        0.8 * nls(0.1 * p.d) + 0.2 * (nls(0.1 * p.rw) + nls(-0.1 * p.rl)) + nll
        for p, nll in zip(batch, nll_shares(batch), strict=True)
    ]


CASES = {
    ("dpop",): each(dpop("inside", 50.0, 0.0)),
    ("dpop", ("lam", 5.0), ("form", "outside")): each(dpop("outside", 5.0, 0.0)),
    ("dpop", ("lam", 5.0), ("form", "additive")): each(dpop("additive", 5.0, 0.0)),
    ("dpop", ("lam", 5.0), ("label_smoothing", 0.2)): each(dpop("inside", 5.0, 0.2)),
    ("dpop", ("lam", 5.0), ("form", "outside"), ("label_smoothing", 0.2)): each(
        dpop("outside", 5.0, 0.2)
    ),
    ("dpop", ("lam", 5.0), ("form", "additive"), ("label_smoothing", 0.2)): each(
        dpop("additive", 5.0, 0.2)
    ),
    ("dpo",): each(lambda p: nls(0.1 * p.d)),
    ("dpo", ("beta", 0.5), ("label_smoothing", 0.1)): each(lambda p: smooth(0.5 * p.d, 0.1)),
    ("sigmoid",): each(lambda p: nls(0.1 * p.d)),
    ("sigmoid_norm", ("beta", 5.0)): each(lambda p: nls(5.0 * (p.rw / p.nw - p.rl / p.nl))),
    ("ipo",): each(lambda p: (p.rw / p.nw - p.rl / p.nl - 5.0) ** 2),
    ("ipo", ("average", False)): each(lambda p: (p.d - 5.0) ** 2),
    ("hinge",): each(lambda p: max(0.0, 1 - 0.1 * p.d)),
    ("robust",): each(lambda p: (0.9 * nls(0.1 * p.d) - 0.1 * nls(-0.1 * p.d)) / 0.8),
    ("exo_pair",): each(exo),
    ("nca_pair",): each(lambda p: nls(0.1 * p.rw) + nls(-0.1 * p.rw) / 2 + nls(-0.1 * p.rl) / 2),
    ("bco_pair",): each(lambda p: nls(0.1 * p.rw) + nls(-0.1 * p.rl)),
    ("bco_pair", ("batch_shift", True)): bco_shifted,
    ("sppo_hard",): each(lambda p: (p.rw - 5.0) ** 2 + (p.rl + 5.0) ** 2),
    ("apo_zero",): each(lambda p: 1 - sigmoid(0.1 * p.rw) + sigmoid(0.1 * p.rl)),
    ("apo_down",): each(lambda p: sigmoid(0.1 * p.rw) + 1 - sigmoid(0.1 * p.d)),
    ("discopop",): each(disco),
    ("dpo_shift",): each(lambda p: nls(0.1 * (p.rw - 0.95 * p.rl))),
    ("dpo_shift", ("f_lambda", 0.5), ("label_smoothing", 0.1)): each(
        lambda p: smooth(0.1 * p.rw - 0.05 * p.rl, 0.1)
    ),
    ("cal_dpo",): each(cal_dpo(1.0)),
    ("cal_dpo", ("calibration", 0.5)): each(cal_dpo(0.5)),
    ("rpo_sq",): each(lambda p: (0.1 * p.d - (p.score_w - p.score_l)) ** 2),
    ("rpo_sq", ("beta", 0.5), ("eta", 3.0)): each(
        lambda p: (0.5 * p.d - 3.0 * (p.score_w - p.score_l)) ** 2
    ),
    ("rpo_bwd_kl",): each(rpo(1.0, policy_first=False)),
    ("rpo_bwd_kl", ("eta", 3.0)): each(rpo(3.0, policy_first=False)),
    ("rpo_fwd_kl",): each(rpo(1.0, policy_first=True)),
    ("rpo_fwd_kl", ("eta", 3.0)): each(rpo(3.0, policy_first=True)),
    ("plackett_luce",): each(lambda p: nls(0.1 * p.d)),  # each pair is a list: see test_ranking
    ("listwise", ("label_smoothing", 0.1)): each(lambda p: smooth(0.1 * p.d, 0.1)),
    ("aot",): lambda batch: aot(batch, 0.0),
    ("aot", ("label_smoothing", 0.1)): lambda batch: aot(batch, 0.1),
    ("aot_unpaired",): aot_unpaired,
    ("kto",): kto,
    ("kto", ("desirable_weight", 1.5), ("undesirable_weight", 0.5)): lambda b: kto(b, 1.5, 0.5),
    ("sft",): nll_shares,
    ("sft", ("per", "sequence")): each(lambda p: -p.log_w / p.nw),
    ("cpo",): lambda batch: [
        nls(0.1 * (p.log_w - p.log_l)) + nll
        for p, nll in zip(batch, nll_shares(batch), strict=True)
    ],
    ("cpo", ("nll_weight", 0.0), ("label_smoothing", 0.1)): each(
        lambda p: smooth(0.1 * (p.log_w - p.log_l), 0.1)
    ),
    ("simpo",): each(simpo),
    ("alpha_po",): each(alpha_po(0.25)),
    ("alpha_po", ("alpha", -0.5)): each(alpha_po(-0.5)),
    ("alpha_po", ("alpha", 0.0), ("beta", 2.0), ("gamma", 1.0)): each(simpo),
    ("mpo",): mpo,
    ("rpo",): lambda batch: [
        nls(0.1 * p.d) + nll for p, nll in zip(batch, nll_shares(batch), strict=True)
    ],
    ("rpo", ("alpha", 0.25), ("beta", 0.4), ("label_smoothing", 0.1), ("per", "sequence")): each(
        lambda p: smooth(0.4 * p.d, 0.1) - 0.25 * p.log_w / p.nw
    ),
    ("orpo",): lambda batch: [
        0.1 * nls(orpo_ratio(p)) + nll for p, nll in zip(batch, nll_shares(batch), strict=True)
    ],
    ("aft",): each(lambda p: math.log(1 + math.exp(p.log_l / p.nl - p.log_w / p.nw))),
    ("aft", ("detach_rejected", True)): each(
        lambda p: math.log(1 + math.exp(p.log_l / p.nl - p.log_w / p.nw))
    ),
}


def test_every_loss_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(losses.available())


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value(case: tuple, four_pairs: PairLogps) -> None:
    name, *options = case
    table = [
        getattr(four_pairs, field).tolist()
        for field in (
            [
                "chosen",
                "rejected",
                "ref_chosen",
                "ref_rejected",
                "chosen_lengths",
                "rejected_lengths",
            ]
        )
    ]
    table += [four_pairs.values[name].tolist() for name in ("chosen_score", "rejected_score")]
    batch = [Pair(*numbers) for numbers in zip(*table, strict=True)]
    values = losses.get(name, **dict(options))(four_pairs)
    assert values.shape == (4,)
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(CASES[case](batch), rel=1e-12)


def test_sft_mean_over_pairs_is_the_token_mean(four_pairs: PairLogps) -> None:
    mean = losses.get("sft")(four_pairs).mean()
    assert mean.item() == pytest.approx((20 + 31.5 + 12.25 + 7) / 36)


def test_given_kl_replaces_the_batch_estimate(four_pairs: PairLogps) -> None:
    pairs = replace(four_pairs, kl=torch.tensor(0.7, dtype=torch.float64))
    r_w, r_l = pairs.chosen_logratios.tolist(), pairs.rejected_logratios.tolist()
    expected = [
        (1 - sigmoid(0.1 * (a - 0.7)) + 1 - sigmoid(0.1 * (0.7 - b))) / 2
        for a, b in zip(r_w, r_l, strict=True)
    ]
    assert losses.get("kto")(pairs).tolist() == pytest.approx(expected)
    negative = replace(four_pairs, kl=torch.tensor(-3.0, dtype=torch.float64))
    zero = replace(four_pairs, kl=torch.tensor(0.0, dtype=torch.float64))
    assert torch.equal(losses.get("kto")(negative), losses.get("kto")(zero))


SCORES = {
    ("forward_kl", None): lambda r: 1 - math.exp(-r),
    ("js", None): lambda r: math.log(2 * sigmoid(r)),
    ("alpha", None): lambda r: (math.exp(-0.5 * r) - 1) / -0.5,
    ("alpha", 2.5): lambda r: (math.exp(1.5 * r) - 1) / 1.5,
    ("alpha", 1.0): lambda r: r,
    ("reverse_kl", None): lambda r: r,
}


@pytest.mark.parametrize("divergence", SCORES, ids=repr)
def test_divergence(divergence: tuple[str, float | None], four_pairs: PairLogps) -> None:
    options = {"divergence": divergence[0], "alpha": divergence[1]}
    score = SCORES[divergence]
    r_w, r_l = four_pairs.chosen_logratios.tolist(), four_pairs.rejected_logratios.tolist()
    scores = [(score(a), score(b)) for a, b in zip(r_w, r_l, strict=True)]
    dpo = losses.get("dpo", beta=0.2, **options)(four_pairs)
    assert dpo.tolist() == pytest.approx([nls(0.2 * (a - b)) for a, b in scores])
    bco = losses.get("bco_pair", **options)(four_pairs)
    assert bco.tolist() == pytest.approx([nls(0.1 * a) + nls(-0.1 * b) for a, b in scores])


def test_every_loss_of_scores_takes_a_divergence(four_pairs: PairLogps) -> None:
    taking = "dpo sigmoid sigmoid_norm ipo hinge robust exo_pair nca_pair bco_pair sppo_hard"
    taking += " apo_down discopop"
    for name in losses.available():
        loss = losses.get(name)
        assert isinstance(loss, losses.DivergenceLoss) == (name in taking.split())
        if name in taking.split():
            other = losses.get(name, divergence="js")
            assert not torch.allclose(loss(four_pairs), other(four_pairs))


@pytest.mark.parametrize("name", losses.available())
def test_rewards(name: str, four_pairs: PairLogps) -> None:
    loss = losses.get(name)
    first = loss.terms[0][1] if isinstance(loss, losses.WeightedSum) else loss
    beta = getattr(first, "beta", 1.0)
    rewards = loss.rewards(four_pairs)
    if isinstance(loss, losses.AlphaPO):
        expected = tuple(
            2.5 / 0.25 * (1 - (-0.25 * side / length).exp())
            for side, length in (
                (four_pairs.chosen, four_pairs.chosen_lengths),
                (four_pairs.rejected, four_pairs.rejected_lengths),
            )
        )
    elif name in ("simpo", "orpo", "aft"):
        expected = (
            beta * four_pairs.chosen / four_pairs.chosen_lengths,
            beta * four_pairs.rejected / four_pairs.rejected_lengths,
        )
    elif name in ("sft", "cpo"):
        expected = beta * four_pairs.chosen, beta * four_pairs.rejected
    else:
        expected = beta * four_pairs.chosen_logratios, beta * four_pairs.rejected_logratios
    for got, want in zip(rewards, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-13)
