"""What ``metrics()`` says of an output, and how an output is shown."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpop import PreferenceOutput, losses
from tests.batches import Batch, batch, fused

STATISTICS = ("entropy", "mean_logits", "token_accuracy", "displacement")


def mean(values: Any, weights: Any) -> float:
    """By hand."""
    values, weights = ([float(x) for x in each] for each in (values, weights))
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)


def test_every_name_and_its_mean() -> None:
    example = batch(3, dtype=torch.float64)
    out = fused(example, "dpop", statistics=STATISTICS)
    found = out.metrics()
    ones, chosen, rejected = [1, 1, 1], out.lengths[:3], out.lengths[3:]
    assert 0 in chosen.tolist()
    want = {
        "loss": mean(out.losses, ones),
        "rewards/chosen": mean(out.chosen_rewards, ones),
        "rewards/rejected": mean(out.rejected_rewards, ones),
        "rewards/accuracies": mean(out.chosen_rewards > out.rejected_rewards, ones),
        "rewards/margins": mean(out.chosen_rewards - out.rejected_rewards, ones),
        "logps/chosen": mean(out.chosen_logps, ones),
        "logps/rejected": mean(out.rejected_logps, ones),
        "logratios/chosen": mean(out.chosen_logps - example.ref_logps[:3], ones),
        "logratios/rejected": mean(out.rejected_logps - example.ref_logps[3:], ones),
        "penalty": mean((example.ref_logps[:3] - out.chosen_logps).relu(), ones),
        "hinge_on": mean(out.chosen_logps < example.ref_logps[:3], ones),
        "entropy": mean(out.entropy, out.lengths),
        "logits/chosen": mean(out.mean_logits[:3], chosen),
        "logits/rejected": mean(out.mean_logits[3:], rejected),
        "mean_token_accuracy": mean(out.token_accuracy[:3], chosen),
        "ches": mean(out.ches, ones),
        "ches_normalised": mean(out.ches_normalised, ones),
        "logps/first_difference": mean(out.first_logps, out.differs),
        "logps/after_difference": mean(out.after_logps, out.after_logps != 0),
    }
    assert found == pytest.approx(want, rel=1e-12)
    assert list(found) == list(want)
    assert {type(value) for value in found.values()} == {float}
    assert found["loss"] == pytest.approx(out.loss.item())
    assert found["rewards/accuracies"] == pytest.approx(out.accuracy.item())
    out.loss.backward()  # nothing was freed


def test_of_what_is_nan_there_is_no_share() -> None:
    example = batch(3)
    example.labels[0, 4] = 2
    with torch.no_grad():
        example.hidden[0, 3, 7] = torch.nan
    out = fused(example, "dpop")
    found = out.metrics()
    for name in ("loss", "rewards/accuracies", "hinge_on", "logratios/chosen"):
        assert math.isnan(found[name])
    assert math.isfinite(found["logps/rejected"])
    assert out.accuracy.isnan()


def test_what_was_not_computed_is_left_out() -> None:
    found = fused(batch(3), "simpo").metrics()
    sides = ("chosen", "rejected")
    rewards = {f"rewards/{name}" for name in (*sides, "accuracies", "margins")}
    assert found.keys() == {"loss", *rewards, *(f"logps/{side}" for side in sides)}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_one_that_was_asked_for(reduction: Any) -> None:
    out = fused(batch(3, dtype=torch.float64), "dpop", reduction=reduction)
    want = {"mean": out.losses.mean(), "sum": out.losses.sum(), "none": out.losses.mean()}
    assert out.metrics()["loss"] == pytest.approx(want[reduction].item(), rel=1e-12)


def kto(example: Batch, pairs: list[list[int]]) -> PreferenceOutput:
    return fused(example, losses.get("kto"), pairs=pairs, statistics=STATISTICS)


def test_means_are_over_the_pairs_that_have_the_side() -> None:
    example = batch(3, dtype=torch.float64)
    out = kto(example, [[0, -1], [-1, 4], [2, 5], [-1, 3]])
    assert out.pairs.tolist() == [[0, -1], [-1, 4], [2, 5], [-1, 3]]
    found = out.metrics()
    own = fused(example, "dpop", statistics=STATISTICS)
    chosen = torch.cat([own.chosen_logps, own.rejected_logps])[[0, 2]]
    assert found["logps/chosen"] == pytest.approx(chosen.mean().item())
    assert found["rewards/chosen"] == pytest.approx(out.chosen_rewards.sum().item() / 2)
    assert found["rewards/rejected"] == pytest.approx(out.rejected_rewards.sum().item() / 3)
    assert found["rewards/margins"] == pytest.approx(out.margins[2].item())
    assert found["rewards/accuracies"] == float(out.margins[2] > 0)
    assert found["penalty"] == pytest.approx(out.penalty.sum().item() / 2)
    assert found["mean_token_accuracy"] == pytest.approx(
        mean(own.token_accuracy[[0, 2]], own.lengths[[0, 2]])
    )
    assert found["logits/rejected"] == pytest.approx(
        mean(own.mean_logits[[4, 5, 3]], own.lengths[[4, 5, 3]])
    )
    assert all(map(math.isfinite, found.values()))


def test_a_mean_over_nothing_is_left_out() -> None:
    found = kto(batch(3), [[0, -1], [2, -1]]).metrics()
    assert {"loss", "rewards/chosen", "logps/chosen", "penalty"} <= found.keys()
    without = {"rewards/rejected", "logps/rejected", "rewards/margins", "rewards/accuracies"}
    assert not (without | {"ches", "logits/rejected"}) & found.keys()
    assert all(map(math.isfinite, found.values()))


def test_no_pairs_at_all() -> None:
    """As a rank of a group may have none; the loss is that of the others."""
    none, count = torch.empty(0), torch.empty(0, dtype=torch.int64)
    pairs = count.view(0, 2)
    out = PreferenceOutput(
        torch.tensor(0.5), none, none, none, none, none, none, torch.tensor(0.0), None, count, pairs
    )
    assert out.metrics() == {"loss": 0.5}
    assert repr(out) == "PreferenceOutput(loss=0.5; means of P=0 pairs)"


def test_a_loss_that_is_no_number_is_not_hidden() -> None:
    example = batch(3)
    with torch.no_grad():
        example.weight[0, 0] = float("nan")
    assert math.isnan(fused(example, "dpop").metrics()["loss"])


class Reads(TorchDispatchMode):
    """Counts how often a value of a tensor is asked for."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_one_copy_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    out = fused(batch(3), "dpop", statistics=STATISTICS)
    copies: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: copies.append(self) or tolist(self))
    with Reads() as reads:
        out.metrics()
    assert (len(copies), reads.count) == (1, 0)


def test_an_output_is_shown_in_a_line() -> None:
    out = fused(batch(3, dtype=torch.float64), "dpop", statistics=STATISTICS)
    found = out.metrics()
    assert repr(out) == (
        f"PreferenceOutput(loss={found['loss']:.4g}, accuracy={found['rewards/accuracies']:.4g}, "
        f"margins={found['rewards/margins']:.4g}, penalty={found['penalty']:.4g}; means of P=3 pairs)"
    )
    without = fused(batch(3), "simpo")
    assert "penalty" not in repr(without)
    assert repr(pickle.loads(pickle.dumps(without))) == repr(without)


def test_an_output_whose_values_cannot_be_read_is_shown_too() -> None:
    out = fused(batch(3), "simpo")
    tensors = {name: v for name, v in vars(out).items() if isinstance(v, Tensor)}
    start = "PreferenceOutput(loss: (), losses: (3,), chosen_logps: (3,), "
    on_meta = replace(out, **{name: value.to("meta") for name, value in tensors.items()})
    assert repr(on_meta).startswith(start)
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(value.detach()) for name, value in tensors.items()}
    with mode:
        assert repr(replace(out, **fake)).startswith(start)
