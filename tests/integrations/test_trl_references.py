"""Log-probs of the reference that an earlier trainer has kept on disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import get_peft_model

import fastdpop
from fastdpop.integrations.trl import FastDPOTrainer, references
from fastdpop.integrations.trl import step as steps
from fastdpop.losses import get, length_desensitised
from tests.integrations.test_trl import lora
from tests.integrations.trl_setup import WARNINGS, DPOTrainer, model, pairs, step, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each batch that a reference scores ahead of training."""
    scored: list[int] = []
    own = steps._reference

    def counted(of: Any, model: Any, call: Any, *more: Any) -> Any:
        scored.append(len(call["input_ids"]) // 2)
        return own(of, model, call, *more)

    monkeypatch.setattr(steps, "_reference", counted)
    return scored


def made(folder: Path, **options: Any) -> Any:
    kind = options.pop("kind", FastDPOTrainer)
    return trainer(kind, folder, **{"precompute_ref_log_probs": True} | options)


def logps(of: Any) -> np.ndarray:
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    return np.stack([np.asarray(of.train_dataset[name]) for name in columns], axis=1)


def test_a_second_trainer_finds_them(
    tmp_path: Path, batches: list[int], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = made(tmp_path)
    assert batches == [4, 4]
    (file,) = (cache / "fastdpop").iterdir()
    said = f"fastdpop: reference log-probs of the train dataset computed, and kept in {file}\n"
    assert said in capsys.readouterr().err
    second = made(tmp_path)
    assert batches == [4, 4]
    said = f"fastdpop: reference log-probs of the train dataset found in {file}\n"
    assert said in capsys.readouterr().err
    assert first.train_dataset.features["ref_chosen_logps"].dtype == "float32"
    assert np.array_equal(logps(first), logps(second))
    assert step(first)[2] == step(second)[2]


def test_they_are_those_of_the_step(tmp_path: Path) -> None:
    online, found = step(trainer(FastDPOTrainer, tmp_path))[2], step(made(tmp_path))[2]
    assert online["rewards/chosen"] == pytest.approx(found["rewards/chosen"], abs=1e-4)


def test_a_subclass_may_score_the_reference_itself(tmp_path: Path) -> None:
    class Halved(FastDPOTrainer):
        def compute_ref_log_probs(self, *args: Any) -> Any:
            return tuple(side / 2 for side in super().compute_ref_log_probs(*args))

    whole = logps(made(tmp_path))
    assert np.array_equal(logps(made(tmp_path, kind=Halved)), whole / 2)


def test_evaluation_data_too(tmp_path: Path, batches: list[int]) -> None:
    given = {"eval_dataset": {"a": pairs(3, 20), "b": pairs(2, 40)}}
    for _ in range(2):
        of = made(tmp_path, given=given)
        assert batches == [4, 4, 3, 2]
        assert of.evaluate(of.eval_dataset["b"])["eval_loss"] > 0


def test_where_prefixes_are_shared(tmp_path: Path, batches: list[int]) -> None:
    """A model that has shared some has another name for its attention from then on, and computes the same."""
    used = model(noise=0.02)
    for reference in (used, used, model(noise=0.02)):
        given = {"eval_dataset": pairs(3, 20)}
        made(tmp_path, given=given, reference=reference, padding_free=True)
        assert batches == [4, 4, 3]


def test_however_the_data_came_about(tmp_path: Path, batches: list[int]) -> None:
    made(tmp_path)
    others = pairs(12)
    others.save_to_disk(tmp_path / "data")
    for data in (
        others.select(range(8)),
        others.select([*range(11, -1, -1)]).select([*range(11, 3, -1)]),
        Dataset.load_from_disk(str(tmp_path / "data")).filter(
            lambda _, i: i < 8, with_indices=True
        ),
        pairs().add_column("place", ["somewhere"] * 8),
    ):
        made(tmp_path, data=data)
    assert batches == [4, 4]


def test_patched_trainers_and_this_one_share_them(tmp_path: Path, batches: list[int]) -> None:
    fastdpop.patch_trl()
    try:
        made(tmp_path, kind=DPOTrainer)
        made(tmp_path)
    finally:
        fastdpop.unpatch_trl()
    assert batches == [4, 4]


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "weights": lambda: {"reference": model(noise=0.03)},
    "rope": lambda: {"reference": model(noise=0.02, rope_theta=5e5)},
    "attention": lambda: {"reference": model(noise=0.02, attn_implementation="eager")},
    "order": lambda: {"data": pairs().select([*range(7, -1, -1)])},
    "one pair more": lambda: {"data": pairs(9)},
    "template": lambda: {"data": pairs().map(lambda row: {"prompt": "Q: " + row["prompt"]})},
    "bounds": lambda: {"data": moved()},
    "max_length": lambda: {"max_length": 12},
    "truncation_mode": lambda: {"truncation_mode": "keep_end"},
    "bf16": lambda: {"bf16": True},
    "ld_alpha": lambda: {"ld_alpha": 0.5},
    "a loss's alpha": lambda: {"given": {"loss": length_desensitised(get("dpo", beta=0.5), 0.5)}},
    "engine": lambda: {"given": {"engine": "eager"}},
    "prefixes": lambda: {"padding_free": True},
    "batch": lambda: {"per_device_train_batch_size": 2},
    "padding": lambda: {"pad_to_multiple_of": 16},
}


def moved() -> Dataset:
    """The same tokens with another bound between prompt and completions."""

    def move(row: dict[str, str]) -> dict[str, str]:
        first = row["chosen"][0]
        sides = {side: row[side].removeprefix(first) for side in ("chosen", "rejected")}
        return {"prompt": row["prompt"] + first, **sides}

    return pairs().map(move)


@pytest.mark.parametrize("name", CHANGES)
def test_what_they_depend_on(name: str, tmp_path: Path, batches: list[int]) -> None:
    made(tmp_path)
    changed = CHANGES[name]()
    made(tmp_path, **changed)
    count = len(batches)
    assert count > 2
    made(tmp_path, **CHANGES[name]())
    assert len(batches) == count


def test_adapters(tmp_path: Path, batches: list[int]) -> None:
    """A new one, whose reference is the bare model, and one that is its own reference."""

    def one(scale: float, kind: str, **options: Any) -> None:
        torch.manual_seed(3)
        config = lora(**options)
        if kind == "new":
            made(tmp_path, reference=None, given={"peft_config": config})
            return
        policy = get_peft_model(model(), config)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter *= scale if parameter.requires_grad else 1.0
        made(tmp_path, policy=policy, reference=None)

    counts = []
    for case in (
        ("new", 1.0, 2),
        ("continued", 1.0, 2),
        ("continued", 1.1, 2),
        ("continued", 1.0, 4),
    ):
        for _ in range(2):
            one(case[1], case[0], lora_alpha=case[2])
            counts.append(len(batches))
    assert counts == [2, 2, 4, 4, 6, 6, 8, 8]


# ---- files that cannot be trusted ---------------------------------------------------------------


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    """A bit of a number, which stays a number."""
    data = bytearray(file.read_bytes())
    data[-6] ^= 1
    file.write_bytes(data)


def text(file: Path) -> None:
    file.write_text("no such thing " * 9)


@pytest.mark.parametrize("damage", [truncated, empty, flipped, text])
def test_damaged(
    damage: Callable[[Path], None],
    tmp_path: Path,
    batches: list[int],
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = logps(made(tmp_path))
    (file,) = (cache / "fastdpop").iterdir()
    whole = file.read_bytes()
    damage(file)
    assert file.read_bytes() != whole
    assert np.array_equal(logps(made(tmp_path)), right)
    assert batches == [4, 4, 4, 4]
    assert f"{file} is damaged, and not used" in capsys.readouterr().err
    made(tmp_path)
    assert len(batches) == 4
    assert file.read_bytes() == whole


def test_every_byte_counts(tmp_path: Path) -> None:
    numbers = np.linspace(-9, -1, 10, dtype=np.float32).reshape(5, 2)
    file = tmp_path / "logps"
    references._write(file, numbers)
    whole = file.read_bytes()
    found = references._read(file)
    assert found.dtype == np.float32
    assert np.array_equal(found, numbers)
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        assert references._read(file) is None
        file.write_bytes(whole[:place])
        assert references._read(file) is None


def test_a_file_that_cannot_be_read(
    tmp_path: Path, batches: list[int], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = logps(made(tmp_path))
    (file,) = (cache / "fastdpop").iterdir()
    file.unlink()
    file.mkdir()
    assert np.array_equal(logps(made(tmp_path)), right)
    assert batches == [4, 4, 4, 4]
    said = capsys.readouterr().err
    assert f"{file} cannot be read" in said
    assert "computed, and not kept" in said


def test_a_run_that_is_killed_leaves_none(
    tmp_path: Path, batches: list[int], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path)
    assert not any((cache / "fastdpop").iterdir())
    made(tmp_path)
    assert batches == [4, 4, 4, 4]


def test_no_room(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    right = logps(made(tmp_path))
    shutil.rmtree(cache / "fastdpop")
    monkeypatch.setattr(os, "fsync", full)
    assert np.array_equal(logps(made(tmp_path)), right)
    said = "computed, and not kept: [Errno 28] No space left on device"
    assert said in capsys.readouterr().err
    assert not any((cache / "fastdpop").iterdir())


def test_a_reference_that_is_not_finite(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = steps._reference

    def overflown(*args: Any) -> torch.Tensor:
        logps = own(*args)
        return logps.masked_fill(torch.arange(len(logps)) == 2, float("nan"))

    monkeypatch.setattr(steps, "_reference", overflown)
    with pytest.raises(FloatingPointError, match=r"of pair 3 of the train dataset are .*nan"):
        made(tmp_path)
    assert not (cache / "fastdpop").exists()
