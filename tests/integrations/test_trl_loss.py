"""Losses that a trainer is given instead of a loss type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from fastdpop import losses
from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer
from tests.integrations.trl_setup import WARNINGS, assert_same_metrics, step, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


def given(folder: Path, loss: Any, **options: Any) -> Any:
    return trainer(FastDPOTrainer, folder, config=FastDPOConfig, given={"loss": loss}, **options)


def configured(folder: Path, **options: Any) -> Any:
    return trainer(FastDPOTrainer, folder, config=FastDPOConfig, **options)


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.4}, {"use_weighting": True}], ids=str)
@pytest.mark.parametrize("name", ["dpop", "aot", "apo_zero"])
def test_the_configs_own(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if name == "aot" and "use_weighting" in options:
        pytest.skip("TRL refuses it")
    parameters = {"lam": 5.0} if name == "dpop" else {}
    loss = losses.get(name, beta=0.3, **parameters)
    settings = {"dpop_lambda": 5.0} if name == "dpop" else {}
    ours = given(tmp_path, loss, beta=0.3, **options)
    theirs = configured(tmp_path, loss_type=name, beta=0.3, **settings, **options)
    found, expected = step(ours), step(theirs)
    assert found[0] == expected[0]
    assert found[2] == expected[2]
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())


def test_a_weighted_sum(tmp_path: Path) -> None:
    loss = losses.get("dpop", beta=0.3, lam=7.0) + 0.2 * losses.get("sft")
    ours = given(tmp_path, loss, beta=0.3)
    mixed = {"loss_type": ["dpop", "sft"], "loss_weights": [1.0, 0.2], "dpop_lambda": 7.0}
    assert step(ours)[0] == step(configured(tmp_path, beta=0.3, **mixed))[0]


def test_one_that_reads_no_reference(tmp_path: Path) -> None:
    """Its value is SimPO's by its definition, and rewards are logged against the reference."""
    ours = given(tmp_path, losses.get("simpo", beta=2.0, gamma=1.0), beta=2.0)
    policy: list[Any] = []
    ours.model.register_forward_hook(lambda model, inputs, output: policy.append(output))
    loss, gradient, metrics = step(ours)
    (out,) = policy
    chosen, rejected = (out.logps / out.lengths).double().chunk(2)
    expected = -torch.nn.functional.logsigmoid(2.0 * (chosen - rejected) - 1.0).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert any(value.abs().max() > 0 for value in gradient.values())
    plain = step(configured(tmp_path, beta=2.0))[2]
    assert_same_metrics(metrics, plain)
    assert metrics["logratios/chosen"] != [0.0]


def test_ones_own_function(tmp_path: Path) -> None:
    def squared(pairs: losses.PairLogps) -> torch.Tensor:
        return (pairs.chosen_logratios - pairs.rejected_logratios - 2.0) ** 2

    loss = losses.pairwise(squared, beta=0.7)
    alone = step(given(tmp_path, loss, beta=0.7, per_device_train_batch_size=1))
    margin = alone[2]["rewards/margins"][0] / 0.7
    assert alone[0].item() == pytest.approx((margin - 2.0) ** 2, rel=1e-4)
    whole, plain = step(given(tmp_path, loss, beta=0.7)), step(configured(tmp_path, beta=0.7))
    assert_same_metrics(whole[2], plain[2])
    assert whole[0] != plain[0]


def test_its_own_token_weights_are_the_references_too(tmp_path: Path) -> None:
    loss = losses.length_desensitised(losses.get("dpo", beta=0.5), 0.4)
    ours, theirs = given(tmp_path, loss), configured(tmp_path, loss_type="sigmoid", ld_alpha=0.4)
    found, expected = step(ours), step(theirs)
    assert found[0] == expected[0]
    assert found[2] == expected[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": "ipo"},
            r"loss_type is \['ipo'\] beside loss=DPOP\(...\), expected \['sigmoid'\]",
        ),
        ({"loss_weights": [2.0]}, r"loss_weights is \[2.0\]"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type is 'forward_kl'"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef is 0.3"),
        ({"discopop_tau": 0.4}, "discopop_tau is 0.4"),
        ({"dpop_lambda": 5.0}, "dpop_lambda is 5.0 beside .*, expected 50.0"),
        ({"beta": 0.2}, "beta is 0.2 beside .*, expected its own, 0.3"),
    ],
    ids=str,
)
def test_settings_without_effect(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        given(tmp_path, losses.get("dpop"), **{"beta": 0.3, **options})


def test_two_token_weights(tmp_path: Path) -> None:
    loss = losses.length_desensitised(losses.get("dpo", beta=0.5), 0.4)
    with pytest.raises(ValueError, match=r"ld_alpha is 0.2 .*, expected None"):
        given(tmp_path, loss, ld_alpha=0.2)


def test_no_loss(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="loss is 3, expected a name, a PreferenceLoss object or a"):
        given(tmp_path, 3)


def test_a_name_is_a_loss_and_so_is_a_function(tmp_path: Path) -> None:
    assert given(tmp_path, "simpo", beta=2.0)._fastdpop.loss == losses.get("simpo")
    ours = given(tmp_path, lambda p: p.rejected - p.chosen, beta=1.0)
    assert ours._fastdpop.loss.traits.couples_pairs


def test_losses_that_the_config_does_not_have(tmp_path: Path) -> None:
    message = r"FastDPOTrainer\(..., loss=fastdpop.losses.get\('simpo'\)"
    with pytest.raises(ValueError, match=message):
        configured(tmp_path, loss_type="simpo")
