"""A margin and an offset of each pair, in every loss that reads them, and refused by the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpop import losses
from fastdpop.losses import PairLogps
from tests.batches import batch, fused

MARGIN = torch.tensor([0.5, -0.25, 3.0, 0.0], dtype=torch.float64)
OFFSET = torch.tensor([2.0, 0.75, -4.0, 0.0], dtype=torch.float64)


def smooth(z: Tensor, e: float) -> Tensor:
    return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)


def exo(z: Tensor) -> Tensor:
    q = z.sigmoid()
    return q * (q / (1 - 1e-3)).log() + (1 - q) * ((1 - q) / 1e-3).log()


def disco(z: Tensor) -> Tensor:
    m = (z / 0.05).sigmoid()
    return -(1 - m) * F.logsigmoid(z) + m * (-z).exp()


# With r_w, r_l the log-ratios, a_w, a_l the log-probs of a token, n_w, n_l the lengths, and m, o the
# margin and the offset.
OF_Z: dict[str, Callable[[Tensor], Tensor]] = {
    "dpo": lambda z: smooth(z, 0.0),
    "sigmoid": lambda z: smooth(z, 0.0),
    "hinge": lambda z: (1 - z).relu(),
    "robust": lambda z: (-0.9 * F.logsigmoid(z) + 0.1 * F.logsigmoid(-z)) / 0.8,
    "exo_pair": exo,
    "discopop": disco,
}
READING: dict[str, Callable[..., Tensor]] = {
    "sigmoid_norm": lambda p, m, o: smooth(0.1 * (p.r_w / p.n_w - p.r_l / p.n_l - o) - m, 0.0),
    "ipo": lambda p, m, o: (p.r_w / p.n_w - p.r_l / p.n_l - o - m / 0.1 - 5.0) ** 2,
    "apo_down": lambda p, m, o: (
        (0.1 * p.r_w).sigmoid() + (-(0.1 * (p.r_w - p.r_l - o) - m)).sigmoid()
    ),
    "dpop": lambda p, m, o: smooth(0.3 * (p.r_w - p.r_l - 50 * (-p.r_w).relu() - o) - m, 0.0),
    "cpo": lambda p, m, o: smooth(0.1 * (p.n_w * p.a_w - p.n_l * p.a_l - o) - m, 0.0) + p.nll,
    "simpo": lambda p, m, o: smooth(2.0 * (p.a_w - p.a_l - o) - 1.0 - m, 0.0),
    "dpo_shift": lambda p, m, o: smooth(0.1 * (p.r_w - 0.95 * p.r_l - o) - m, 0.0),
    "mpo": lambda p, m, o: (
        0.8 * smooth(0.1 * (p.r_w - p.r_l - o) - m, 0.0)
        + 0.2 * (smooth(0.1 * p.r_w, 0.0) + smooth(-0.1 * p.r_l, 0.0))
        + p.nll
    ),
    "rpo": lambda p, m, o: smooth(0.1 * (p.r_w - p.r_l - o) - m, 0.0) + p.nll,
    **{
        name: lambda p, m, o, of_z=of_z: of_z(0.1 * (p.r_w - p.r_l - o) - m)
        for name, of_z in OF_Z.items()
    },
}


class Numbers:
    """What the formulas above read of a batch."""

    def __init__(self, pairs: PairLogps) -> None:
        self.r_w, self.r_l = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        self.n_w, self.n_l = pairs.chosen_lengths, pairs.rejected_lengths
        self.a_w, self.a_l = pairs.chosen / self.n_w, pairs.rejected / self.n_l
        self.nll = -pairs.chosen * len(self.r_w) / self.n_w.sum()


def test_the_losses_that_read_them() -> None:
    reads = {name: losses.get(name).traits.reads for name in losses.available()}
    assert {n for n, of in reads.items() if {"margin", "offset"} <= set(of or ())} == set(READING)
    assert {n for n, of in reads.items() if "margin" in (of or ())} - set(READING) == {"alpha_po"}
    assert {n for n, of in reads.items() if "offset" in (of or ())} == set(READING)


@pytest.mark.parametrize("given", [("margin",), ("offset",), ("margin", "offset")], ids=str)
@pytest.mark.parametrize("name", READING)
def test_value_and_gradient(name: str, given: tuple[str, ...], four_pairs: PairLogps) -> None:
    values = {n: v for n, v in {"margin": MARGIN, "offset": OFFSET}.items() if n in given}
    pairs, loss = replace(four_pairs, values=values), losses.get(name)
    zero = torch.zeros(4, dtype=torch.float64)
    want = READING[name](Numbers(pairs), values.get("margin", zero), values.get("offset", zero))
    got = loss(pairs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    leaves = pairs.chosen, pairs.rejected
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    )

    def values_of(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss(replace(pairs, chosen=chosen, rejected=rejected))

    assert torch.autograd.gradcheck(values_of, leaves)


@pytest.mark.parametrize("form", ["inside", "outside", "additive"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpops_hinge_looks_at_the_chosen_log_ratio_alone(
    form: str, smoothing: float, four_pairs: PairLogps
) -> None:
    pairs = replace(four_pairs, values={"margin": MARGIN, "offset": OFFSET})
    p = Numbers(pairs)
    z, penalty = 0.3 * (p.r_w - p.r_l - OFFSET) - MARGIN, 5.0 * (-p.r_w).relu()
    want = {
        "inside": smooth(z - 0.3 * penalty, smoothing),
        "outside": smooth(z - penalty, smoothing),
        "additive": smooth(z, smoothing) + penalty,
    }[form]
    loss = losses.get("dpop", form=form, lam=5.0, label_smoothing=smoothing)
    torch.testing.assert_close(loss(pairs), want, rtol=1e-12, atol=1e-13)


def test_alpha_po_and_ipo_of_sums(four_pairs: PairLogps) -> None:
    pairs = replace(four_pairs, values={"margin": MARGIN})
    p = Numbers(pairs)
    h_w, h_l = ((1 - (-0.25 * a).exp()) / 0.25 for a in (p.a_w, p.a_l))
    want = smooth(2.5 * (h_w - h_l) - 0.1 - MARGIN, 0.0)
    torch.testing.assert_close(losses.get("alpha_po")(pairs), want, rtol=1e-12, atol=1e-13)
    sums = losses.get("ipo", average=False, beta=0.5)(replace(pairs, values={"offset": OFFSET}))
    torch.testing.assert_close(sums, (p.r_w - p.r_l - OFFSET - 1.0) ** 2)


@pytest.mark.parametrize("name", sorted(READING))
def test_a_margin_is_beta_times_an_offset(name: str, four_pairs: PairLogps) -> None:
    loss = losses.get(name)
    first = loss.terms[0][1] if isinstance(loss, losses.WeightedSum) else loss
    beta = first.beta  # type: ignore[attr-defined]
    offset = loss(replace(four_pairs, values={"offset": OFFSET}))
    margin = loss(replace(four_pairs, values={"margin": beta * OFFSET}))
    torch.testing.assert_close(margin, offset, rtol=1e-12, atol=1e-12)


def test_no_shift_is_a_shift_of_nothing(four_pairs: PairLogps) -> None:
    nothing = {"margin": 0 * MARGIN, "offset": 0 * OFFSET}
    for name in READING:
        loss = losses.get(name)
        assert torch.equal(loss(replace(four_pairs, values=nothing)), loss(four_pairs))


def test_odpos_offset(make_pairs: Callable[..., PairLogps]) -> None:
    """ODPO's loss of one pair by hand: beta 0.5, log-ratios 1 and -1, and an offset of log(4 / 2)."""
    pairs = make_pairs([-9.0], [-11.0], [-10.0], [-10.0])
    pairs = replace(pairs, values={"margin": torch.tensor([math.log(2.0)], dtype=torch.float64)})
    expected = -math.log(1 / (1 + math.exp(-(1.0 - math.log(2.0)))))
    assert losses.get("dpo", beta=0.5)(pairs).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "name", [n for n in losses.available() if "margin" not in (losses.get(n).traits.reads or ())]
)
def test_others_refuse(name: str) -> None:
    example = batch(3)
    values = {n: torch.arange(3.0) for n in losses.get(name).traits.needs}
    with pytest.raises(ValueError, match=r"contains 'margin', which .* does not read"):
        fused(example, name, pair_values={**values, "margin": torch.ones(3)})


def test_divergences_are_shifted_too(four_pairs: PairLogps) -> None:
    pairs = replace(four_pairs, values={"margin": MARGIN, "offset": OFFSET})
    p = Numbers(pairs)
    scores = [math.log(2) + F.logsigmoid(r) for r in (p.r_w, p.r_l)]
    want = smooth(0.1 * (scores[0] - scores[1] - OFFSET) - MARGIN, 0.0)
    torch.testing.assert_close(losses.get("dpo", divergence="js")(pairs), want)
