"""Hand-checked special values, and log-probabilities at which careless formulas give NaN."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fastdpop import losses
from fastdpop.losses import PairLogps, PreferenceLoss

DIVERGENCES = [
    {},
    {"divergence": "forward_kl"},
    {"divergence": "js"},
    {"divergence": "alpha", "alpha": 0.3},
    {"divergence": "alpha", "alpha": 2.0},
]


def variants() -> list[PreferenceLoss]:
    """Every loss, in every divergence that it takes."""
    found: list[PreferenceLoss] = []
    for name in losses.available():
        takes = isinstance(losses.get(name), losses.DivergenceLoss)
        found += [losses.get(name, **options) for options in DIVERGENCES[: None if takes else 1]]
    found += [losses.get("dpop", form=form) for form in ("outside", "additive")]
    found += [losses.get("ipo", average=False, divergence="forward_kl")]
    found += [losses.get("discopop", tau=3.0), losses.get("bco_pair", batch_shift=True)]
    return found


LOGPS = [0.0, -1e-9, -1.0, -90.0, -1e5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("loss", variants(), ids=repr)
def test_finite(
    loss: PreferenceLoss, length: float, dtype: torch.dtype, make_pairs: Callable[..., PairLogps]
) -> None:
    chosen, rejected, ref_chosen, ref_rejected = zip(
        *itertools.product(LOGPS, repeat=4), strict=True
    )
    count = len(chosen)
    pairs = make_pairs(
        chosen, rejected, ref_chosen, ref_rejected, [length] * count, [length] * count, dtype=dtype
    )
    values = loss(pairs)
    assert values.dtype == dtype
    assert torch.isfinite(values).all()
    found = torch.autograd.grad(values.sum(), (pairs.chosen, pairs.rejected), allow_unused=True)
    for gradient in found:
        assert gradient is None or torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", math.log(2)),
        ("sigmoid_norm", math.log(2)),
        ("dpop", math.log(2)),
        ("robust", math.log(2)),
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),
        ("sppo_hard", 50.0),
        ("nca_pair", 2 * math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("kto", 0.5),
        ("discopop", (1 + math.log(2)) / 2),
        ("dpo_shift", math.log(2)),
        ("cal_dpo", math.log(2) + 50.0),
        ("plackett_luce", math.log(2)),
        ("listwise", math.log(2)),
        ("exo_pair", -math.log(2) - math.log(1e-3 * (1 - 1e-3)) / 2),
    ],
)
def test_policy_equal_to_reference(
    name: str, expected: float, make_pairs: Callable[..., PairLogps]
) -> None:
    pairs = make_pairs([-20.0, -3.0], [-30.0, -4.0], [-20.0, -3.0], [-30.0, -4.0])
    assert losses.get(name)(pairs).tolist() == pytest.approx([expected] * 2)


def test_reward_aware_losses_at_the_reference_and_at_their_target(
    make_pairs: Callable[..., PairLogps],
) -> None:
    """t is log 3: sigmoid(t) = 3/4."""
    scores = {"chosen_score": 2 * math.log(3), "rejected_score": math.log(3)}
    values = {name: torch.tensor([score]).double() for name, score in scores.items()}
    reference = replace(make_pairs([-20.0], [-30.0], [-20.0], [-30.0]), values=values)
    expected = {
        "rpo_sq": math.log(3) ** 2,
        "rpo_bwd_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "rpo_fwd_kl": 0.5 * math.log(2 / 3) + 0.5 * math.log(2),
    }
    ahead = 10 * math.log(3)
    target = replace(make_pairs([-20.0 + ahead], [-30.0], [-20.0], [-30.0]), values=values)
    slopes = {
        "rpo_sq": -0.2 * math.log(3),
        "rpo_bwd_kl": -0.1 / 4,
        "rpo_fwd_kl": -0.1 / 4 * math.log(3),
    }
    for name, value in expected.items():
        loss = losses.get(name)
        assert loss(reference).item() == pytest.approx(value)
        assert loss(target).item() == pytest.approx(0.0, abs=1e-14)
        (slope,) = torch.autograd.grad(loss(reference).sum(), reference.chosen)
        assert slope.item() == pytest.approx(slopes[name])
        with pytest.raises(
            ValueError, match="reads the pairs' 'chosen_score', which are not there"
        ):
            loss(replace(reference, values={}))


@pytest.mark.parametrize("name", losses.available())
def test_value_at_the_reference_is_pinned_or_reference_free(name: str) -> None:
    """A new loss that reads a reference has to be added to the list above; a sum is what its parts are."""
    pinned = test_policy_equal_to_reference.pytestmark[0].args[1]  # type: ignore[attr-defined]
    names = {case[0] for case in pinned} | {"sigmoid", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"}
    loss = losses.get(name)
    assert name in names or isinstance(loss, losses.WeightedSum) or not loss.traits.needs_reference


def test_orpo_of_certain_completions(make_pairs: Callable[..., PairLogps]) -> None:
    orpo = losses.get("orpo", beta=1.0)
    both_certain = make_pairs([0.0], [0.0])
    assert orpo(both_certain).item() == pytest.approx(math.log(2))
    chosen_certain = make_pairs([0.0], [-10.0])
    assert orpo(chosen_certain).item() == pytest.approx(0.0, abs=1e-12)
    rejected_certain = make_pairs([-10.0], [0.0])
    ceiling = -math.log(torch.finfo(torch.float64).eps)
    cost = ceiling + math.log((1 - math.exp(-1)) / math.exp(-1))
    assert orpo(rejected_certain).item() == pytest.approx(1.0 + cost)


def test_lost_pair_keeps_a_gradient_beyond_the_exponent_cap(
    make_pairs: Callable[..., PairLogps],
) -> None:
    lost = make_pairs([-1e4], [-50.0], [-50.0], [-50.0])
    loss = losses.get("dpo", divergence="forward_kl")
    (gradient,) = torch.autograd.grad(loss(lost).sum(), lost.chosen)
    assert gradient.item() < -1.0


@pytest.mark.parametrize(
    "name", [n for n in losses.available() if losses.get(n).traits.accepts_unpaired]
)
def test_absent_sides_add_exactly_nothing(name: str, make_pairs: Callable[..., PairLogps]) -> None:
    loss = losses.get(name)
    absent = ((1, 3), (2,))
    pairs = make_pairs(
        [-9.0, 0.0, -4.0, 0.0],
        [-8.0, -7.0, 0.0, -5.0],
        [-10.0, 0.0, -6.0, 0.0],
        [-9.0, -6.0, 0.0, -5.5],
        [10.0, 0.0, 5.0, 0.0],
        absent=absent,
        kl=0.5 if name == "kto" else None,
    )
    for side, other in ((0, "rejected"), (1, "chosen")):
        alone = replace(pairs, **{f"{other}_present": torch.zeros(4, dtype=torch.bool)})
        values = loss(alone)
        assert (values[list(absent[side])] == 0).all()
        gradient = torch.autograd.grad(
            values.sum(), (pairs.chosen, pairs.rejected)[side], allow_unused=True
        )[0]
        if gradient is None:  # SFT never looks at the rejected side
            assert name == "sft"
            continue
        here = [i for i in range(4) if i not in absent[side]]
        assert (gradient[list(absent[side])] == 0).all()
        assert (gradient[here].sign() == 2 * side - 1).all()


def test_kto_mean_over_pairs_is_the_mean_over_sides(make_pairs: Callable[..., PairLogps]) -> None:
    pairs = make_pairs(
        [-9.0, 0.0], [-8.0, -7.0], [-10.0, 0.0], [-9.0, -6.0], absent=((1,), ()), kl=0.0
    )
    sides = [torch.sigmoid(torch.tensor(0.1 * x)).item() for x in (-1.0, 1.0, -1.0)]
    assert losses.get("kto")(pairs).mean().item() == pytest.approx(sum(sides) / 3)


def test_kto_without_any_rejected_side_takes_zero_as_reference_point(
    make_pairs: Callable[..., PairLogps],
) -> None:
    pairs = make_pairs([-9.0, -9.0], [0.0, 0.0], [-10.0, -12.0], [0.0, 0.0], absent=((), (0, 1)))
    expected = torch.sigmoid(torch.tensor([-0.1, -0.3], dtype=torch.float64))
    torch.testing.assert_close(losses.get("kto")(pairs).detach(), expected)
