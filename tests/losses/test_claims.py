"""What a loss of one's own says and gives is looked at, once or at every call, before it is believed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdpop import losses
from fastdpop.losses import PairLogps
from fastdpop.losses.trial import tried
from tests.batches import batch, fused


class Couples(losses.PreferenceLoss):
    """A user's class that compares pairs and does not say so."""

    def __call__(self, pairs: PairLogps) -> Tensor:
        margins = pairs.chosen_logratios - pairs.rejected_logratios
        return (margins - margins.mean()) ** 2


class Declared(Couples):
    _traits = losses.Traits(couples_pairs=True)


class Scalar(losses.PreferenceLoss):
    """A user's class that averages by itself."""

    def __call__(self, pairs: PairLogps) -> Tensor:
        return (pairs.rejected_logratios - pairs.chosen_logratios).mean()


class Counted(losses.PreferenceLoss):
    """A user's class that is as it says."""

    calls = 0

    def __call__(self, pairs: PairLogps) -> Tensor:
        self.calls += 1
        return pairs.rejected_logratios - pairs.chosen_logratios


DPO_LOSS = losses.get("dpo")


@pytest.mark.parametrize(
    "loss",
    [
        Couples(),
        DPO_LOSS + Couples(),
        losses.wpo_weighted(Couples()),
        losses.length_desensitised(Couples(), 0.5),
    ],
    ids=["itself", "sum", "wpo", "ld"],
)
def test_a_class_that_couples_pairs_is_found_out(loss: losses.PreferenceLoss) -> None:
    for workspace in (None, 2_000):
        with pytest.raises(ValueError, match=r"not pairwise.*Traits\(couples_pairs=True\)"):
            fused(batch(8), loss, workspace_bytes=workspace)


def test_a_class_that_says_that_it_couples_pairs() -> None:
    example = batch(8)
    by_class, by_function = (
        torch.autograd.grad(found.loss, example.hidden)[0]
        for found in (
            fused(example, loss, ref_logps=example.ref_logps, workspace_bytes=2_000)
            for loss in (Declared(), Declared().__call__)
        )
    )
    assert by_class.abs().max() > 0
    assert torch.equal(by_class, by_function)


def test_a_claim_is_tried_once() -> None:
    loss, example = Counted(), batch(2)
    fused(example, loss)
    first = loss.calls
    fused(example, loss)
    assert first == loss.calls - first + 4  # three pairs together, and each by itself


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "loss",
    [Scalar(), DPO_LOSS + Scalar(), losses.wpo_weighted(Scalar()), Scalar().__call__],
    ids=["itself", "sum", "wpo", "function"],
)
def test_a_class_must_give_one_value_a_pair(loss: losses.PreferenceLoss, trained: bool) -> None:
    example = batch(2, trained=trained)
    with pytest.raises(ValueError, match=r"returned \(\), expected one value per pair"):
        fused(example, loss, ref_logps=example.ref_logps)


@pytest.mark.parametrize("trained", [True, False])
def test_a_loss_that_was_cut_off_from_the_policy_is_refused(trained: bool) -> None:
    def cut(pairs: PairLogps) -> Tensor:
        return (pairs.chosen - pairs.rejected).detach()

    @torch.no_grad()
    def without(pairs: PairLogps) -> Tensor:
        return pairs.chosen - pairs.rejected

    example = batch(2, trained=trained)
    message = "does not depend on pairs.chosen or pairs.rejected in a way that autograd sees"
    for function in (cut, without):
        with pytest.raises(ValueError, match=message):
            losses.pairwise(function)
        with pytest.raises(ValueError, match=f"{function.__name__}.* {message}"):
            fused(example, function)
        with torch.no_grad():
            assert bool(torch.isfinite(fused(example, function).loss))


@pytest.mark.parametrize("trained", [True, False])
def test_a_loss_of_one_side_or_at_a_flat_place_is_none_that_was_cut_off(trained: bool) -> None:
    example = batch(2, trained=trained)
    for loss in (
        losses.pairwise(lambda pairs: -pairs.chosen),
        losses.pairwise(lambda pairs: torch.relu(pairs.chosen)),
        losses.get("aft", detach_rejected=True),
    ):
        fused(example, loss, ref_logps=None).loss.backward()


def test_names_that_pairs_do_not_have(four_pairs: PairLogps) -> None:
    with pytest.raises(AttributeError, match=r"'chosen_logps' \(did you mean 'chosen'\?\)"):
        losses.pairwise(lambda pairs: pairs.chosen_logps)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"\(did you mean 'ref_rejected'\?\)"):
        four_pairs.ref_rejected_logps  # type: ignore[attr-defined]  # noqa: B018
    message = r"KeyError: 'gap', which .* pass pair_values=\{'gap': ...\}"
    for loss in (losses.as_loss, losses.pairwise):
        with pytest.raises(ValueError, match=message):
            loss(lambda pairs: pairs.chosen - pairs.values["gap"])(four_pairs)
    table: dict[str, float] = {}
    with pytest.raises(KeyError, match="offset"):  # is there, so another table lacks it
        losses.as_loss(lambda pairs: pairs.chosen - table["offset"])(
            replace(four_pairs, values={"offset": four_pairs.chosen})
        )


def test_options_of_pairwise() -> None:
    @losses.pairwise(beta=0.25)
    def margin(pairs: PairLogps) -> Tensor:
        return pairs.rejected - pairs.chosen

    assert margin.beta == 0.25
    with pytest.raises(TypeError, match="pairwise: beta is 'x', expected a finite number > 0"):
        losses.pairwise(beta="x")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="expected a function of PairLogps"):
        losses.pairwise(losses.DPOP)  # type: ignore[arg-type]


def test_token_weights_do_not_nest() -> None:
    inner = losses.length_desensitised(losses.get("dpo"), 0.3)
    with pytest.raises(ValueError, match=r"own \(ld_alpha 0.3\), which alpha=0.5 would take"):
        losses.length_desensitised(inner, 0.5)


class InFloat32(losses.PreferenceLoss):
    """Weighs pairs by a small network, whose product of three rows is rounded otherwise than those of one."""

    def __init__(self) -> None:
        self.network = torch.nn.Sequential(
            torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
        )

    def __call__(self, pairs: PairLogps) -> Tensor:
        seen = torch.stack([pairs.chosen, pairs.rejected], 1).float()
        weights = torch.sigmoid(self.network(seen)[:, 0].detach())
        return weights * (pairs.rejected_logratios - pairs.chosen_logratios)


def test_a_class_that_computes_in_float32() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        own = InFloat32()
        assert tried(own, torch.device("cpu")) is own


def of_flags(pairs: PairLogps) -> Tensor:
    flags = pairs.values["flag"]
    assert ((flags == 0) | (flags == 1)).all(), "flags are 0 or 1"
    return flags * (pairs.rejected - pairs.chosen)


def test_a_function_that_looks_at_its_values() -> None:
    losses.pairwise(of_flags)

    def of_others(pairs: PairLogps) -> Tensor:
        raise TypeError(f"{float(pairs.values['kind'][0])} is no kind")

    with pytest.raises(
        ValueError, match=r"cannot be tried: on three made-up pairs.*1.0 is no kind"
    ):
        losses.pairwise(of_others)


def test_a_trial_in_inference_mode() -> None:
    with torch.inference_mode():
        losses.pairwise(lambda pairs: pairs.rejected - pairs.chosen)
