"""What is logged: means over pairs, or tokens, of everything since the last time, without waiting in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer, metrics
from tests.integrations.trl_setup import WARNINGS, pairs, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

PAIRS = 5
BY_PAIR = (
    *("rewards/chosen", "rewards/accuracies", "logps/rejected", "logratios/chosen", "penalty"),
    *("hinge_on", "ches", "ches_normalised", "logps/first_difference", "logps/after_difference"),
)
BY_TOKEN = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


def evaluating(folder: Path, batch: int, **options: Any) -> Any:
    given = {"eval_dataset": pairs(PAIRS, 20)}
    options |= {"loss_type": "dpop", "per_device_eval_batch_size": batch}
    return trainer(FastDPOTrainer, folder, config=FastDPOConfig, given=given, **options)


def evaluated(of: Any) -> dict[str, float]:
    """What an evaluation logs; before TRL 1.8 it does not return all of it."""
    of.evaluate()
    found: dict[str, float] = of.state.log_history[-1]
    return found


def pair_by_pair(of: Any) -> dict[str, torch.Tensor]:
    """Log-ratios of `of`'s evaluation data, from a call of both models for each pair, ``(PAIRS,)``."""
    found = []
    for row in of.eval_dataset:
        batch = of._prepare_inputs(of.data_collator([row]))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        call = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            policy, reference = (
                model(**call, labels=labels, return_logps=True).logps
                for model in (of.model, of.ref_model)
            )
        found.append(policy - reference)
    chosen, rejected = torch.stack(found).double().unbind(1)
    return {"chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_an_evaluation_is_over_pairs(batch: int, tmp_path: Path) -> None:
    of = evaluating(tmp_path, batch)
    found = evaluated(of)
    logratios = pair_by_pair(of)
    for side, values in logratios.items():
        assert values.std() > 0.1
        mean, error = values.mean().item(), (values.std() / PAIRS**0.5).item()
        assert found[f"eval_logratios/{side}"] == pytest.approx(mean, rel=1e-4)
        assert found[f"eval_logratios/{side}_standard_error"] == pytest.approx(error, rel=1e-4)
        assert found[f"eval_rewards/{side}"] == pytest.approx(0.5 * mean, rel=1e-4)
    better = (logratios["chosen"] > logratios["rejected"]).double().mean().item()
    assert found["eval_rewards/accuracies"] == pytest.approx(better)
    assert found["eval_penalty"] == pytest.approx((-logratios["chosen"]).relu().mean().item(), 1e-4)
    whole = evaluated(evaluating(tmp_path, PAIRS))
    for name in ("loss", *BY_PAIR, *BY_TOKEN):
        assert found[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-4), name


def test_the_monitor_is_what_it_says(tmp_path: Path) -> None:
    """Token by token, from logits and hidden states; one pair does not differ, and one ends with the difference."""
    data = Dataset.from_list(
        [
            {"prompt": "1 + 1 = ", "chosen": "2, of course", "rejected": "3, of course"},
            {"prompt": "2 + 2 = ", "chosen": "the same", "rejected": "the same"},
            {"prompt": "4 + 4 = ", "chosen": "that is 8!", "rejected": "that is 9"},
        ]
    )
    of = trainer(FastDPOTrainer, tmp_path, data=data, given={"eval_dataset": data})
    found = evaluated(of)
    first, after, ches, normalised, hinge = [], [], [], [], []
    for row in of.eval_dataset:
        ids = [row[f"{side}_ids"] for side in ("chosen", "rejected")]
        states, logps, total = [], [], []
        for side in ids:
            whole = torch.tensor([row["prompt_ids"] + side])
            with torch.no_grad():
                out = of.model(whole, output_hidden_states=True)
                ref = of.ref_model(whole).logits
            start = len(row["prompt_ids"]) - 1
            states.append(out.hidden_states[-1][0, start:-1].double())
            both = [
                logits[0, start:-1].double().log_softmax(-1).gather(1, torch.tensor(side)[:, None])
                for logits in (out.logits, ref)
            ]
            logps.append(both[0][:, 0])
            total.append((both[0] - both[1]).sum())
        chosen, rejected = (s.sum(0) for s in states)
        ches.append((chosen @ rejected - chosen @ chosen).item())
        chosen, rejected = (s.mean(0) for s in states)
        normalised.append((chosen @ rejected - chosen @ chosen).item())
        hinge.append(float(total[0] < 0))
        place = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), None)
        if place is not None:
            first.append(logps[0][place].item())
            after.append(logps[0][place + 1 :].mean().item())
    assert (len(first), len(ches)) == (2, 3)
    for name, values in {
        "logps/first_difference": first,
        "logps/after_difference": after,
        "ches": ches,
        "ches_normalised": normalised,
        "hinge_on": hinge,
    }.items():
        expected = sum(values) / len(values)
        assert found[f"eval_{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_pairs_that_do_not_differ_have_no_first_difference(tmp_path: Path) -> None:
    data = pairs(4).map(lambda row: {"rejected": row["chosen"]})
    of = trainer(FastDPOTrainer, tmp_path, data=data, max_steps=1)
    with pytest.warns(UserWarning, match="chosen-equals-rejected"):
        of.train()
    row = of.state.log_history[0]
    assert row["ches"] == row["hinge_on"] * 0.0 == 0.0
    assert not any("difference" in name for name in row)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_training_is_over_pairs_too(options: dict[str, Any], tmp_path: Path) -> None:
    """Batches of 4 and 1 in one interval, at a learning rate of 0."""
    settings = {"learning_rate": 0.0, "max_steps": -1, "num_train_epochs": 1, **options}
    of = trainer(
        FastDPOTrainer,
        tmp_path,
        data=pairs(PAIRS, 20),
        config=FastDPOConfig,
        loss_type="dpop",
        logging_steps=2 // options.get("gradient_accumulation_steps", 1),
        **settings,
    )
    of.train()
    found = of.state.log_history[0]
    whole = evaluated(evaluating(tmp_path, PAIRS))
    for name in (*BY_PAIR, *BY_TOKEN):
        assert found[name] == pytest.approx(whole[f"eval_{name}"], rel=1e-4), name
    assert not any("standard_error" in name for name in found)


def test_equal_log_ratios_have_no_error(tmp_path: Path) -> None:
    given = {"eval_dataset": pairs(1)}
    found = evaluated(trainer(FastDPOTrainer, tmp_path, given=given))
    assert found["eval_logratios/chosen"] != 0.0
    assert found["eval_logratios/chosen_standard_error"] == 0.0


def test_tokens_are_all_that_were_trained_on(tmp_path: Path) -> None:
    """Also those of steps that are not logged yet when an evaluation is."""
    given = {"eval_dataset": pairs(2)}
    options = {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    of = trainer(FastDPOTrainer, tmp_path, given=given, **options)
    seen: list[int] = []
    of.model.register_forward_hook(
        lambda model, args, kwargs, output: seen.append(
            int(kwargs["attention_mask"].sum()) if model.training else 0
        ),
        with_kwargs=True,
    )
    of.train()
    steps = [count for count in seen if count]
    rows = of.state.log_history
    assert len(steps) == 4
    tokens = [(row["step"], row["num_tokens"]) for row in rows if "num_tokens" in row]
    evaluated = [(row["step"], row["eval_num_tokens"]) for row in rows if "eval_loss" in row]
    assert tokens == [(3, sum(steps[:3]))]
    assert evaluated == [(2, sum(steps[:2])), (4, sum(steps))]


def test_a_prediction_is_no_part_of_the_next_evaluation(tmp_path: Path) -> None:
    of = evaluating(tmp_path, 4)
    alone = evaluated(of)
    other = trainer(FastDPOTrainer, tmp_path, given={"eval_dataset": pairs(8)}).eval_dataset
    of.predict(other)
    again = evaluated(of)
    for name in BY_PAIR:
        assert again[f"eval_{name}"] == alone[f"eval_{name}"]


@pytest.mark.parametrize("loss", ["dpop", "sigmoid", "ipo"])
def test_a_step_logs_what_its_output_says(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"loss_type": loss, "max_steps": 1, "logging_steps": 1}
    of = trainer(FastDPOTrainer, tmp_path, config=FastDPOConfig, **options)
    own, outputs = metrics.note, []

    def note(*args: Any) -> None:
        outputs.append(args[2])
        own(*args)

    monkeypatch.setattr(metrics, "note", note)
    of.train()
    (out,), row = outputs, of.state.log_history[0]
    found = out.metrics()
    assert found.keys() >= {"loss", "hinge_on", "rewards/margins", *BY_PAIR, *BY_TOKEN} - {
        "logratios/chosen"
    }
    # TRL rounds the loss.
    assert row["loss"] == pytest.approx(found.pop("loss"), abs=1e-4)
    # Its own rewards are of log-probs that were rounded to float32.
    assert {name: row[name] for name in found} == pytest.approx(found, rel=1e-6, abs=5e-6)


# ---- what a step costs --------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts how often a value of a tensor is asked for."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_and_exchanges_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = trainer(FastDPOTrainer, tmp_path, max_steps=4, logging_steps=2)
    exchanged: list[Any] = []
    gather = of.accelerator.gather
    monkeypatch.setattr(of.accelerator, "gather", lambda x: exchanged.append(x) or gather(x))
    reads, own, noted = Reads(), metrics.note, []

    def note(*args: Any) -> None:
        with reads:
            own(*args)
        noted.append(metrics.pending(of).steps["train"][-1])

    monkeypatch.setattr(metrics, "note", note)
    of.train()
    assert (len(noted), len(exchanged), reads.count) == (4, 4, 0)
    assert not any(kept.requires_grad for kept in noted)
    assert len([row for row in of.state.log_history if "penalty" in row]) == 2
    with reads:  # the counter counts
        torch.ones(1).item()
    assert reads.count == 1


def test_each_model_is_called_once_a_batch(tmp_path: Path) -> None:
    of = evaluating(tmp_path, 4, eval_strategy="epoch", max_steps=2)
    calls = []
    for name in ("model", "ref_model"):
        getattr(of, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    of.train()
    assert calls == ["ref_model", "model"] * 4  # two steps, and two batches of an evaluation


class Fails(TrainerCallback):
    """Ends the first evaluation in its middle."""

    failed = False

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if not self.failed:
            self.failed = True
            raise KeyboardInterrupt


def test_an_evaluation_that_failed_leaves_nothing(tmp_path: Path) -> None:
    of = evaluating(tmp_path, 4)
    of.add_callback(Fails())
    with pytest.raises(KeyboardInterrupt):
        of.evaluate()
    found = evaluated(of)
    expected = evaluated(evaluating(tmp_path, 4))
    assert found["eval_logps/chosen"] == expected["eval_logps/chosen"]
