"""The training loop: what it logs, that it learns, and that a resumed run is the same run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpop import losses
from fastdpop import train as train_module
from fastdpop.data import Batches, Pair, tokenise
from fastdpop.train import Settings, train
from tests.tiny_model import tiny_llama, tiny_tokenizer

# peft asks transformers 5 for a name that it renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SETTINGS = Settings(
    steps=6, batch_pairs=2, learning_rate=1e-3, warmup=2, eval_every=3, save_every=3
)
PAIRS = [Pair(f"{i} and {i}: ", f"{2 * i} yes", f"{2 * i + 1} no") for i in range(9)]


def batches(settings: Settings = SETTINGS, pairs: list[Pair] = PAIRS) -> Batches:
    ids, _ = tokenise(pairs, tiny_tokenizer())
    return Batches.shuffled(ids, settings.batch_pairs, 257, seed=settings.seed)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_dropout=0.1, target_modules="all-linear"
    )
    return peft.get_peft_model(model, config)


def test_first_step_starts_at_the_reference_exactly() -> None:
    rows = train(tiny_llama(), batches(), SETTINGS, held_out=batches())
    start, first = rows[0], rows[1]
    assert start["step"] == 0
    assert start["eval_chosen_logratio"] == start["eval_rejected_logratio"] == 0.0
    assert first["chosen_logratio"] == first["rejected_logratio"] == 0.0
    assert first["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item())


def test_learns_to_prefer_the_chosen() -> None:
    settings = replace(SETTINGS, steps=30, eval_every=0)
    rows = train(tiny_llama(), batches(), settings, held_out=batches())
    evaluations = [row for row in rows if "eval_accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 30]
    last = evaluations[-1]
    assert last["eval_chosen_logratio"] > max(0.0, last["eval_rejected_logratio"])


def test_model_is_left_as_it_was_found() -> None:
    model = tiny_llama()
    train(model, batches(), SETTINGS)
    assert "forward" not in vars(model)
    assert not model.training
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 258)


def test_online_reference_is_the_precomputed_one() -> None:
    one, other = tiny_llama(), tiny_llama()
    train(one, batches(), SETTINGS)
    train(other, batches(), replace(SETTINGS, reference="online"))
    assert_same(weights(one), weights(other))


def test_online_reference_of_an_adapter() -> None:
    runs = []
    for reference in ("precomputed", "online"):
        torch.manual_seed(1)
        model = with_lora(tiny_llama())
        base = weights(tiny_llama())
        rows = train(model, batches(), replace(SETTINGS, reference=reference, steps=2))
        runs.append(rows[0]["loss"])
        trained = {k: v for k, v in weights(model).items() if "lora" not in k}
        assert all(torch.equal(a, b) for a, b in zip(trained.values(), base.values(), strict=True))
    assert runs[0] == runs[1]


def test_accumulation_averages_gradients() -> None:
    even = PAIRS[:8]
    one, other = tiny_llama(), tiny_llama()
    train(one, batches(replace(SETTINGS, batch_pairs=8), even), replace(SETTINGS, steps=1))
    small = replace(SETTINGS, steps=1, accumulate=4)
    train(other, batches(small, even), small)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool
) -> None:
    def fresh() -> Any:
        torch.manual_seed(5)
        model = tiny_llama(attention_dropout=0.1)
        return with_lora(model) if adapter else model

    settings = replace(SETTINGS, schedule="cosine")
    whole = fresh()
    train(whole, batches(), settings, held_out=batches(), output=tmp_path / "whole")

    step = train_module._step

    def interrupted(*args: Any) -> Any:
        if args[4] == 4:  # after the checkpoint of step 3, and a step that must be repeated
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_module, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(fresh(), batches(), settings, held_out=batches(), output=tmp_path / "parts")
    monkeypatch.undo()
    assert not (tmp_path / "parts" / "checkpoint.pt.partial").exists()
    torch.manual_seed(99)  # the state of the process must not matter
    model = fresh()
    torch.rand(3)
    train(model, batches(), settings, held_out=batches(), output=tmp_path / "parts", resume=True)

    assert_same(weights(whole), weights(model))
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [
        0,
        1,
        2,
        3,
        3,
        4,
        5,
        6,
        6,
    ]


def test_three_steps_then_three_more_are_six(tmp_path: Path) -> None:
    whole, parts = tiny_llama(), tiny_llama()
    train(whole, batches(), SETTINGS)
    train(parts, batches(), replace(SETTINGS, steps=3), output=tmp_path)
    parts = tiny_llama()
    train(parts, batches(), SETTINGS, output=tmp_path, resume=True)
    assert_same(weights(whole), weights(parts))


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(tiny_llama(), batches(), SETTINGS, output=tmp_path, resume=True)
    train(tiny_llama(), batches(), SETTINGS, output=tmp_path)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(tiny_llama(), batches(), SETTINGS, output=tmp_path)
    other = replace(SETTINGS, learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.001 then, 0\.01 now"):
        train(tiny_llama(), batches(), other, output=tmp_path, resume=True)
    fewer = batches(pairs=PAIRS[:4])
    with pytest.raises(ValueError, match="training pairs"):
        train(tiny_llama(), fewer, SETTINGS, output=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume needs the output folder"):
        train(tiny_llama(), batches(), SETTINGS, resume=True)


def test_loss_without_a_reference() -> None:
    settings = replace(SETTINGS, loss=losses.get("simpo"), steps=2)
    data = batches()
    rows = train(tiny_llama(), data, settings, held_out=batches())
    assert not data.ref_logps
    assert "chosen_logratio" not in rows[1]
    assert (
        rows[-1]["eval_chosen_logratio"] != 0.0
    )  # evaluation compares with the start all the same


def test_length_desensitised_loss_has_its_reference_weighted_alike() -> None:
    loss = losses.length_desensitised(losses.get("dpo"), alpha=0.5)
    uneven = [Pair("p", "yes, indeed", "no"), Pair("q", "no", "certainly")]
    rows = train(tiny_llama(), batches(pairs=uneven), replace(SETTINGS, loss=loss, steps=1))
    assert rows[0]["chosen_logratio"] == rows[0]["rejected_logratio"] == 0.0


def test_bf16_trains_float32_weights() -> None:
    model = tiny_llama()
    before = weights(model)
    rows = train(model, batches(), replace(SETTINGS, bf16=True, steps=2))
    assert rows[0]["chosen_logratio"] == 0.0
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)


def test_learning_rate() -> None:
    cosine = replace(SETTINGS, steps=12, warmup=2, schedule="cosine", learning_rate=1.0)
    rates = [cosine.learning_rate_at(step) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.5)
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    constant = replace(cosine, schedule="constant")
    assert constant.learning_rate_at(11) == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_pairs", 0),
        ("warmup", -1),
        ("learning_rate", float("nan")),
        ("max_grad_norm", 0.0),
        ("weight_decay", -1.0),
        ("schedule", "linear"),
        ("reference", "none"),
        ("engine", "warp"),
        ("workspace_bytes", 0),
        ("seed", 2**63),
        ("steps", 10**400),
    ],
)
def test_bad_settings(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is"):
        replace(SETTINGS, **{field: value})


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="no training pairs"):
        train(tiny_llama(), Batches([], 2, 0), SETTINGS)
    with pytest.raises(ValueError, match="no parameter"):
        train(tiny_llama().requires_grad_(False), batches(), SETTINGS)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = tiny_llama()
    data = batches()
    scored = copy.deepcopy(data)
    train(model, scored, replace(SETTINGS, steps=1))
    data.ref_logps = {n: torch.full_like(v, float("nan")) for n, v in scored.ref_logps.items()}
    with pytest.raises((FloatingPointError, ValueError), match=r"step 1|nan|finite"):
        train(model, data, replace(SETTINGS, steps=1))
