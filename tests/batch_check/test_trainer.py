"""Trainers look at their first training batch, at numbers that they have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
from datasets import Dataset

from fastdpop.batch_check import check_batch
from fastdpop.integrations.trl import FastDPOTrainer, first_batch
from tests.integrations.trl_setup import WARNINGS, gradients, model, pairs, trainer

NAMES = ("input_ids", "attention_mask", "completion_mask")
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


def equal_pairs() -> Dataset:
    return pairs().map(lambda row: {"rejected": row["chosen"]})


def found(of: Any) -> list[str]:
    """What training warns of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        of.train()
    return [str(w.message) for w in said if "fastdpop: the first batch" in str(w.message)]


def test_good_data_are_trained_on_without_a_word(tmp_path: Path) -> None:
    assert found(trainer(FastDPOTrainer, tmp_path)) == []


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    (said,) = found(trainer(FastDPOTrainer, tmp_path, data=equal_pairs()))
    assert (
        "(chosen-equals-rejected): chosen and rejected are the same tokens in 4 of 4 pairs" in said
    )
    assert "FASTDPOP_CHECK_BATCH=0" in said


def test_dropout_that_trl_leaves_on(tmp_path: Path) -> None:
    own = trainer(
        FastDPOTrainer,
        tmp_path,
        policy=model(attention_dropout=0.3),
        reference=model(),
        max_steps=1,
    )
    (said,) = found(own)
    assert "(dropout-on)" in said
    assert "before the first step" in said


def test_weights_that_are_trained_in_16_bits(tmp_path: Path) -> None:
    """Once, and not where DeepSpeed trains float32 copies."""
    narrow = {"policy": model().bfloat16(), "reference": model().bfloat16()}
    own = trainer(FastDPOTrainer, tmp_path, **narrow)
    (said,) = found(own)
    assert "(weights-half-precision): all trained weights are torch.bfloat16" in said
    copies = trainer(FastDPOTrainer, tmp_path, **narrow, max_steps=1)
    copies.is_deepspeed_enabled = True
    call = {name: next(iter(copies.get_train_dataloader()))[name] for name in NAMES}
    labels = call["input_ids"].masked_fill(call.pop("completion_mask") == 0, -100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_batch.look(copies, call, labels, torch.full((len(labels),), -9.0), None)
    assert copies._batch_seen


def test_the_model_of_a_trainer_is_checked_as_any_other(tmp_path: Path) -> None:
    """Though TRL wraps its forward, and hides that it is attached."""
    own = trainer(FastDPOTrainer, tmp_path)
    before = own.model.forward
    given = next(iter(own.get_train_dataloader()))
    report = check_batch(own.model, given, tokenizer=own.processing_class, verbose=False)
    assert report.ok
    assert "log-probs per sequence: -" in report.facts[-1]
    assert own.model.forward == before
    assert found(own) == []


def test_it_is_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPOP_CHECK_BATCH", "0")
    assert found(trainer(FastDPOTrainer, tmp_path, data=equal_pairs())) == []
    monkeypatch.setenv("FASTDPOP_CHECK_BATCH", "no")
    with pytest.raises(ValueError, match="FASTDPOP_CHECK_BATCH is 'no', expected 0 or 1"):
        trainer(FastDPOTrainer, tmp_path)  # before anything is trained


def test_training_is_the_same_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, which would show a random number more."""
    weights = []
    for value in ("0", "1"):
        monkeypatch.setenv("FASTDPOP_CHECK_BATCH", value)
        own = trainer(
            FastDPOTrainer, tmp_path, policy=model(attention_dropout=0.3), disable_dropout=False
        )
        assert found(own) == []
        weights.append({name: p.detach().clone() for name, p in own.model.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert gradients(own.model).keys() <= weights[0].keys()
