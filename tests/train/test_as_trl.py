"""``fastdpop train`` and TRL's own trainer from the same rows: the same token ids, the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fastdpop.train.trainer import PairTrainer
from tests.train.files import WARNINGS, Files, rows, write

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def text(row: dict[str, str]) -> dict[str, Any]:
    return row


def implicit_text(row: dict[str, str]) -> dict[str, Any]:
    return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}


def messages(row: dict[str, str]) -> dict[str, Any]:
    turns = [
        {"role": "system", "content": "Add."},
        user("hi"),
        assistant("ho"),
        user(row["prompt"]),
    ]
    return {"prompt": turns, **{name: [assistant(row[name])] for name in ("chosen", "rejected")}}


def implicit_messages(row: dict[str, str]) -> dict[str, Any]:
    return {name: [user(row["prompt"]), assistant(row[name])] for name in ("chosen", "rejected")}


@pytest.mark.parametrize("form", [text, implicit_text, messages, implicit_messages])
def test_same_ids_and_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    files = Files.make(tmp_path / "files")
    data = [form(row) for row in rows(6)]
    write(files.folder / "train.jsonl", data)
    made: list[PairTrainer] = []
    own = PairTrainer.train
    monkeypatch.setattr(
        PairTrainer, "train", lambda self, *a, **k: (made.append(self), own(self, *a, **k))[1]
    )
    argv = ("--batch-pairs", "6", "--steps", "3", "--loss_type", "sigmoid", "--beta", "0.2")
    assert files.run(*argv) == 0
    trl = DPOTrainer(
        str(files.folder / "model"),
        args=DPOConfig(
            str(tmp_path / "trl"),
            loss_type="sigmoid",
            beta=0.2,
            per_device_train_batch_size=6,
            max_steps=3,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            max_length=None,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(files.folder / "model"),
    )
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    mine, theirs = (
        sorted(zip(*(trainer.train_dataset[name] for name in names), strict=True))
        for trainer in (made[0], trl)
    )
    assert mine == theirs
    trl.train()
    expected = [row["loss"] for row in trl.state.log_history if "loss" in row]
    assert files.losses() == pytest.approx(expected, rel=1e-4)
