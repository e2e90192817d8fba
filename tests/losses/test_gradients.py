"""Gradients of every loss: checked numerically, by hand where the value is special, and bit for bit
where promised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fastdpop import losses
from fastdpop.losses import PairLogps, PreferenceLoss
from tests.batches import needed_values

VARIANTS: dict[str, PreferenceLoss] = {
    **{name: losses.get(name) for name in losses.available()},
    "dpop outside": losses.get("dpop", form="outside", lam=5.0, label_smoothing=0.1),
    "dpop additive": losses.get("dpop", form="additive", lam=5.0),
    "ipo sums": losses.get("ipo", average=False),
    "dpo forward_kl": losses.get("dpo", divergence="forward_kl"),
    "nca js": losses.get("nca_pair", divergence="js"),
    "discopop alpha": losses.get("discopop", divergence="alpha", alpha=0.3),
    "alpha_po below 0": losses.get("alpha_po", alpha=-0.7, label_smoothing=0.1),
    "alpha_po at 0": losses.get("alpha_po", alpha=0.0),
    "sft of sequences": losses.get("sft", per="sequence"),
    "plackett_luce smoothed": losses.get("plackett_luce", beta=0.5, label_smoothing=0.2),
    "sum": losses.get("dpop", lam=2.0) + 0.1 * losses.get("sft"),
    "wpo": losses.wpo_weighted(losses.get("ipo")),
}
# What a loss detaches, finite differences would see: the analytic gradient is checked by hand
# below.
DETACHING = {"kto"}


def gradients(loss: PreferenceLoss, pairs: PairLogps) -> tuple[torch.Tensor, ...]:
    found = torch.autograd.grad(
        loss(pairs).sum(), (pairs.chosen, pairs.rejected), allow_unused=True
    )
    return tuple(torch.zeros_like(pairs.chosen) if g is None else g for g in found)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck(name: str, four_pairs: PairLogps) -> None:
    pairs = four_pairs
    if name in DETACHING:
        pairs = replace(pairs, kl=torch.tensor(0.4, dtype=torch.float64))

    def values(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return VARIANTS[name](replace(pairs, chosen=chosen, rejected=rejected))

    assert torch.autograd.gradcheck(values, (pairs.chosen, pairs.rejected))


@pytest.mark.parametrize("name", VARIANTS)
def test_torch_func_agrees_with_autograd(name: str, four_pairs: PairLogps) -> None:
    def total(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return VARIANTS[name](replace(four_pairs, chosen=chosen, rejected=rejected)).sum()

    by_func = torch.func.grad(total, argnums=(0, 1))(four_pairs.chosen, four_pairs.rejected)
    for got, want in zip(by_func, gradients(VARIANTS[name], four_pairs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", ["inside", "outside", "additive"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_dpop_step_is_dpos_bit_for_bit(
    form: str, label_smoothing: float, dtype: torch.dtype, make_pairs: Callable[..., PairLogps]
) -> None:
    logps = [-20.3, -7.1, -1e4, 0.0], [-25.7, -7.1, -3.3, -2.2]
    pairs = make_pairs(*logps, *logps, dtype=dtype)
    dpop = losses.get("dpop", form=form, label_smoothing=label_smoothing)
    dpo = losses.get("dpo", beta=0.3, label_smoothing=label_smoothing)
    assert torch.equal(dpop(pairs), dpo(pairs))
    for got, want in zip(gradients(dpop, pairs), gradients(dpo, pairs), strict=True):
        assert torch.equal(got, want)


def test_dpop_gradient_by_hand(four_pairs: PairLogps) -> None:
    beta, lam = 0.3, 5.0
    r_w, r_l = four_pairs.chosen_logratios.detach(), four_pairs.rejected_logratios.detach()
    on = (r_w < 0).double()
    assert on.tolist() == [0, 1, 0, 1]
    slope = beta * torch.sigmoid(-beta * (r_w - r_l + lam * on * r_w))
    chosen, rejected = gradients(losses.get("dpop", beta=beta, lam=lam), four_pairs)
    torch.testing.assert_close(chosen, -slope * (1 + lam * on))
    torch.testing.assert_close(rejected, slope)


def test_lambda_of_the_outside_form_converts(four_pairs: PairLogps) -> None:
    inside = losses.get("dpop", beta=0.3, lam=10.0)(four_pairs)
    outside = losses.get("dpop", beta=0.3, lam=3.0, form="outside")(four_pairs)
    torch.testing.assert_close(inside, outside)


def test_lambda_of_the_additive_form_bounds_the_slope(
    make_pairs: Callable[..., PairLogps],
) -> None:
    lost = make_pairs([-200.0], [-10.0], [-100.0], [-20.0])
    inside = losses.get("dpop", beta=0.3, lam=10.0)
    additive = losses.get("dpop", beta=0.3, lam=3.0, form="additive")
    torch.testing.assert_close(gradients(inside, lost), gradients(additive, lost))


def test_kto_judges_each_side_by_the_other_without_gradient(
    make_pairs: Callable[..., PairLogps],
) -> None:
    pairs = make_pairs([-9.0, -9.5], [-8.0, -8.0], [-10.0, -10.0], [-9.0, -10.0])
    chosen, rejected = gradients(losses.get("kto"), pairs)
    r_w, r_l = pairs.chosen_logratios.detach(), pairs.rejected_logratios.detach()
    p_w, p_l = torch.sigmoid(0.1 * (r_w - 1.5)), torch.sigmoid(0.1 * (0.75 - r_l))
    torch.testing.assert_close(chosen, -0.1 * p_w * (1 - p_w) / 2)
    torch.testing.assert_close(rejected, 0.1 * p_l * (1 - p_l) / 2)


def test_aft_detached_constraint_leaves_the_rejected_side_alone(four_pairs: PairLogps) -> None:
    free = gradients(losses.get("aft"), four_pairs)
    held = gradients(losses.get("aft", detach_rejected=True), four_pairs)
    assert torch.equal(held[0], free[0])
    assert (free[1] != 0).all()
    assert (held[1] == 0).all()


def test_no_synchronisation_with_the_host() -> None:
    """Losses run on meta tensors, where any look at a value would fail."""
    there = torch.ones(3, dtype=torch.bool, device="meta")
    row, number = torch.empty(3, device="meta"), torch.empty((), device="meta")
    values = dict.fromkeys((*needed_values(3), "margin", "offset"), row)
    pairs = PairLogps(*[row] * 8, there, there, None, *[number] * 3, values)
    for loss in VARIANTS.values():
        assert loss(pairs).shape == (3,)
        assert loss(replace(pairs, kl=number)).shape == (3,)
