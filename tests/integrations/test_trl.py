"""TRL's losses, references and settings give TRL's results on fastdpop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from fastdpop.call import Call
from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer
from tests.integrations.trl_setup import (
    OWN,
    RELEASE,
    WARNINGS,
    DPOTrainer,
    assert_same_step,
    gsm8k,
    logged,
    model,
    pairs,
    step,
    stored,
    trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

OTHER_DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
OF_A_DIFFERENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
LOSSES = [
    *OF_A_DIFFERENCE,
    *("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "sft"),
]


def smoothed(*names: str) -> float:
    """EXO needs some."""
    return 0.1 if {"exo_pair", "robust", "aot", "aot_unpaired"} & {*names} else 0.0


def lora(**options: Any) -> LoraConfig:
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    return LoraConfig(**{"r": 2, "init_lora_weights": False, **settings, **options})


def both(folder: Path, **options: Any) -> tuple[Any, Any]:
    return trainer(FastDPOTrainer, folder, **options), trainer(DPOTrainer, folder, **options)


# ---- every loss, value and gradient -------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss(name: str, tmp_path: Path) -> None:
    if name == "sigmoid_norm" and RELEASE < (1, 3):
        pytest.skip("not in this TRL")
    assert_same_step(*both(tmp_path, loss_type=name, label_smoothing=smoothed(name)))


@pytest.mark.parametrize("divergence", OTHER_DIVERGENCES)
@pytest.mark.parametrize("name", OF_A_DIFFERENCE)
def test_a_divergence(name: str, divergence: str, tmp_path: Path) -> None:
    if name in ("ipo", "sigmoid_norm") and RELEASE < (1, 10):
        pytest.skip("this TRL leaves out a constant that matters for means")
    options = {"f_divergence_type": divergence, "f_alpha_divergence_coef": 0.3}
    assert_same_step(*both(tmp_path, loss_type=name, label_smoothing=smoothed(name), **options))


@pytest.mark.parametrize(
    "names", [["sigmoid", "sft"], ["apo_zero", "ipo", "sft"], ["aot", "sppo_hard"]]
)
@pytest.mark.parametrize("weights", [None, [0.7, 0.2, 1.5]])
def test_a_mix(names: list[str], weights: list[float] | None, tmp_path: Path) -> None:
    weights = weights and weights[: len(names)]
    assert_same_step(*both(tmp_path, loss_type=names, loss_weights=weights))


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "nca_pair", "aot_unpaired"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitised(name: str, alpha: float, tmp_path: Path) -> None:
    assert_same_step(*both(tmp_path, loss_type=name, ld_alpha=alpha))


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "apo_down"])
@pytest.mark.parametrize("alpha", [None, 0.4])
def test_wpo(name: str, alpha: float | None, tmp_path: Path) -> None:
    assert_same_step(*both(tmp_path, loss_type=name, use_weighting=True, ld_alpha=alpha))


def test_discopop_temperature_and_beta(tmp_path: Path) -> None:
    assert_same_step(*both(tmp_path, loss_type="discopop", discopop_tau=0.4, beta=0.05))


@pytest.mark.parametrize("form", ["a", "b"])
def test_dpop(form: str, tmp_path: Path) -> None:
    """Against the definition, from the log-probs of the trainer's own metrics."""
    options = {"beta": 0.3, "dpop_lambda": 5.0, "per_device_train_batch_size": 1}
    types = {"a": "dpop", "b": ["dpop", "sft"]}[form]
    weights = {"a": None, "b": [1.0, 0.25]}[form]
    ours = trainer(
        FastDPOTrainer,
        tmp_path,
        config=FastDPOConfig,
        loss_type=types,
        loss_weights=weights,
        **options,
    )
    loss, _, metrics = step(ours)
    (won,), (lost,), (penalty,) = (
        metrics[n] for n in ("rewards/chosen", "rewards/rejected", "penalty")
    )
    z = won - lost - 0.3 * 5.0 * penalty
    expected = -torch.nn.functional.logsigmoid(torch.tensor(z)).item()
    assert penalty == pytest.approx(max(0.0, -won / 0.3), rel=1e-4)
    if form == "b":
        batch = next(iter(ours.get_train_dataloader()))
        tokens = batch["completion_mask"][0, 1:].sum().item()
        expected += 0.25 * -metrics["logps/chosen"][0] / tokens
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_truncated_and_empty_completions(tmp_path: Path) -> None:
    assert {len(row["prompt"]) for row in pairs()} == {8, 10}
    assert_same_step(*both(tmp_path, max_length=10))


# ---- references ---------------------------------------------------------------------------------


def test_reference_from_the_models_own_folder(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")

    def made(kind: type[Any]) -> Any:
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        return trainer(kind, tmp_path, policy=policy, reference=None, loss_type="apo_zero")

    ours = made(FastDPOTrainer)
    assert_same_step(ours, made(DPOTrainer))
    assert ours._metrics["train"]["rewards/chosen"] == [0.0]


def test_reference_is_the_model_without_its_adapter(tmp_path: Path) -> None:
    def made(kind: type[Any]) -> Any:
        torch.manual_seed(3)
        return trainer(kind, tmp_path, reference=None, given={"peft_config": lora()})

    ours = made(FastDPOTrainer)
    assert_same_step(ours, made(DPOTrainer))
    assert ours._metrics["train"]["rewards/chosen"] != [0.0]


def test_reference_is_an_adapter_of_its_own(tmp_path: Path) -> None:
    def made(kind: type[Any]) -> Any:
        torch.manual_seed(3)
        of = trainer(kind, tmp_path, policy=get_peft_model(model(), lora()), reference=None)
        with torch.no_grad():
            for name, parameter in of.model.named_parameters():
                if ".default." in name:
                    parameter *= 1.1
        return of

    ours = made(FastDPOTrainer)
    assert "ref" in ours.model.peft_config
    assert_same_step(ours, made(DPOTrainer))


@pytest.mark.skipif(RELEASE < (1, 15), reason="this TRL cannot")
def test_reference_is_the_model_without_its_soft_prompt(tmp_path: Path) -> None:
    """PEFT puts virtual tokens before the prompt."""

    def made(kind: type[Any]) -> Any:
        torch.manual_seed(3)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return trainer(kind, tmp_path, reference=None, given={"peft_config": config})

    assert_same_step(made(FastDPOTrainer), made(DPOTrainer))


@pytest.mark.parametrize("adapter", [False, True])
def test_precomputed_reference(adapter: bool, tmp_path: Path) -> None:
    def made(kind: type[Any], **options: Any) -> Any:
        torch.manual_seed(3)
        given = {"peft_config": lora()} if adapter else {}
        reference = None if adapter else "noisy"
        options |= {"data": stored(tmp_path / "data"), "ld_alpha": 0.4}
        return trainer(kind, tmp_path, reference=reference, given=given, **options)

    ours = made(FastDPOTrainer, precompute_ref_log_probs=True)
    assert_same_step(ours, made(DPOTrainer, precompute_ref_log_probs=True))
    online = step(made(FastDPOTrainer))
    ours._metrics["train"].clear()
    assert step(ours)[2]["rewards/chosen"] == pytest.approx(online[2]["rewards/chosen"], rel=1e-4)


def test_cached_reference_of_another_computation_is_not_taken(tmp_path: Path) -> None:
    """TRL finds cached log-probs by data and model alone; those with other token weights differ."""

    def rewards(kind: type[Any], alpha: float | None) -> float:
        data = stored(tmp_path / "data")
        of = trainer(kind, tmp_path, data=data, precompute_ref_log_probs=True, ld_alpha=alpha)
        return step(of)[2]["rewards/chosen"][0]

    whole, weighed = rewards(FastDPOTrainer, None), rewards(FastDPOTrainer, 0.0)
    assert whole == pytest.approx(rewards(DPOTrainer, None), rel=1e-4)
    fresh = trainer(FastDPOTrainer, tmp_path, ld_alpha=0.0)
    assert weighed == pytest.approx(step(fresh)[2]["rewards/chosen"][0], rel=1e-4)
    assert whole != pytest.approx(weighed, rel=1e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_first_step_of_dpop_is_dpos(dtype: str, tmp_path: Path) -> None:
    """Equal weights give equal log-probs to the bit, so that the hinge is off."""
    ours = trainer(
        FastDPOTrainer,
        tmp_path,
        reference=model(),
        config=FastDPOConfig,
        loss_type="dpop",
        bf16=dtype == "bf16",
        max_steps=1,
    )
    ours.train()
    ((rewards, penalty, loss),) = logged(ours, "rewards/chosen", "penalty", "loss")
    assert rewards == penalty == 0.0
    assert loss == pytest.approx(0.693147, abs=1e-6)


def test_reference_comes_before_the_policy(tmp_path: Path) -> None:
    calls = []
    ours = trainer(FastDPOTrainer, tmp_path)
    for name in ("model", "ref_model"):
        getattr(ours, name).register_forward_hook(
            lambda module, args, kwargs, output, name=name: calls.append(
                (name, output.loss is None)
            ),
            with_kwargs=True,
        )
    step(ours)
    assert calls == [("ref_model", True), ("model", False)]


@pytest.mark.parametrize(("name", "at_once"), [("sigmoid", True), ("aot", False)])
def test_a_trained_head_is_passed_once(
    name: str, at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of a pair in one go: 3 matrix products. One that couples pairs needs all log-probs first."""
    calls: list[Any] = []
    own = Call.pair_loss
    monkeypatch.setattr(Call, "pair_loss", lambda *args: calls.append(args) or own(*args))
    step(trainer(FastDPOTrainer, tmp_path, loss_type=name))
    assert len(calls) == at_once


# ---- the rest of the trainer --------------------------------------------------------------------


@pytest.mark.skipif(RELEASE < (1, 7), reason="this TRL leaves it out")
@pytest.mark.parametrize("coefficient", [None, 0.0, 0.3])
def test_router_loss(coefficient: float | None, tmp_path: Path) -> None:
    if coefficient is None and RELEASE < (1, 14):
        pytest.skip("this TRL asks for a number")

    def moe() -> Any:
        torch.manual_seed(5)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
        config = MixtralConfig(
            vocab_size=258, **sizes, **heads, router_aux_loss_coef=0.7, output_router_logits=True
        )
        return MixtralForCausalLM(config)

    def made(kind: type[Any]) -> Any:
        options = {"router_aux_loss_coef": coefficient}
        return trainer(kind, tmp_path, policy=moe(), reference=moe(), **options)

    assert_same_step(made(FastDPOTrainer), made(DPOTrainer))


@pytest.mark.parametrize("adapter", [False, True])
def test_twenty_steps_on_gsm8k(adapter: bool, tmp_path: Path) -> None:
    def losses(kind: type[Any]) -> list[float]:
        torch.manual_seed(3)
        given = {"peft_config": lora()} if adapter else {}
        of = trainer(
            kind,
            tmp_path,
            reference=None if adapter else model(),
            data=gsm8k(40),
            given=given,
            max_steps=20,
            per_device_train_batch_size=2,
        )
        of.train()
        return [loss for (loss,) in logged(of, "loss")]

    ours, theirs = losses(FastDPOTrainer), losses(DPOTrainer)
    assert len(ours) == 20
    assert max(ours) - min(ours) > 1e-2
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_dpop_keeps_the_chosen_completions_likely(adapter: bool, tmp_path: Path) -> None:
    """GSM8K pairs that differ in one number: DPO lowers both sides, DPOP does not."""
    torch.manual_seed(3)
    given = {"peft_config": lora()} if adapter else {}
    of = trainer(
        FastDPOTrainer,
        tmp_path,
        reference=None if adapter else model(),
        data=gsm8k(16),
        config=FastDPOConfig,
        given=given,
        loss_type="dpop",
        max_steps=12,
        learning_rate=3e-3,
    )
    of.train()
    rewards = [reward for (reward,) in logged(of, "rewards/chosen")]
    assert rewards[-1] > rewards[1]
    assert rewards[-1] > 0


def test_gradient_accumulation(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2}
    ours, theirs = both(tmp_path, **options)
    for of in (ours, theirs):
        of.train()
    names = ("loss", "grad_norm", "rewards/margins")
    for mine, own in zip(logged(ours, *names), logged(theirs, *names), strict=True):
        assert mine == pytest.approx(own, rel=1e-4, abs=1e-6)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    assert_same_step(*both(tmp_path, gradient_checkpointing=True))


def test_evaluation_and_outputs(tmp_path: Path) -> None:
    def metrics(kind: type[Any]) -> dict[str, float]:
        shapes = []

        def compute(prediction: Any) -> dict[str, float]:
            shapes.append(prediction.predictions.shape)
            return {"top": float(prediction.predictions.max())}

        of = trainer(
            kind, tmp_path, given={"eval_dataset": pairs(4, 20), "compute_metrics": compute}
        )
        of.evaluate()
        found = of.state.log_history[-1]
        assert shapes[0][-1] == 258
        return {k: v for k, v in found.items() if "runtime" not in k and "per_second" not in k}

    ours, theirs = metrics(FastDPOTrainer), metrics(DPOTrainer)
    errors = {"logratios/chosen_standard_error", "logratios/rejected_standard_error"}
    assert set(ours) == {*theirs, *(f"eval_{name}" for name in {*OWN, *errors})}
    ours = {name: ours[name] for name in theirs}
    assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5)


def test_iterable_data(tmp_path: Path) -> None:
    results = []
    for kind in (FastDPOTrainer, DPOTrainer):
        of = trainer(kind, tmp_path, data=pairs(12).to_iterable_dataset())
        of.train()
        results.append(logged(of, "loss", "grad_norm"))
    for mine, own in zip(*results, strict=True):
        assert mine == pytest.approx(own, rel=1e-3)


def test_resumed_training_ends_where_whole_training_does(tmp_path: Path) -> None:
    def made(folder: Path) -> Any:
        options = {"loss_type": "dpop", "max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
        return trainer(FastDPOTrainer, folder, config=FastDPOConfig, **options)

    whole = made(tmp_path / "whole")
    whole.train()
    resumed = made(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for mine, own in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, own)


def test_a_changed_beta_is_used(tmp_path: Path) -> None:
    ours = trainer(FastDPOTrainer, tmp_path)
    first = step(ours)[0]
    ours.beta = 0.01
    assert step(ours)[0] != first
