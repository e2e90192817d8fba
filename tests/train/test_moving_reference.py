"""TR-DPO (arXiv:2404.09656): a reference that moves towards the model, also across an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("trl")

from transformers import TrainerCallback

from fastdpop.train import processes, reference, run
from fastdpop.train.trainer import PairTrainer
from tests.train.files import WARNINGS, Files

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
MOVES = ("--sync-ref-model", "--ref-model-sync-steps", "2")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files.make(tmp_path / "files")


Weights = dict[str, torch.Tensor]


class Weighing(TrainerCallback):
    """Copies model and reference at the end of every step, before or behind TRL's callback that moves it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.steps: list[tuple[Weights, Weights]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        models = (self.trainer.model, self.trainer.ref_model)
        model, moved = (
            {name: p.detach().clone() for name, p in m.named_parameters()} for m in models
        )
        self.steps.append((model, moved))


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> list[Weighing]:
    made = []

    class Recording(PairTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(Weighing(self))
            self.add_callback(made[-1])

    monkeypatch.setattr(run, "PairTrainer", Recording)
    return made


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.25])
def test_where_it_moves_to(files: Files, weighed: list[Weighing], alpha: float) -> None:
    """alpha * policy + (1 - alpha) * reference in each second step, and nowhere in between."""
    assert files.run(*MOVES, "--ref_model_mixup_alpha", str(alpha), "--steps", "4") == 0
    (seen,) = weighed
    assert seen.trainer.precompute_ref_logps is False
    before = load_file(files.folder / "model" / "model.safetensors")
    for step, (model, moved) in enumerate(seen.steps, 1):
        for name, value in moved.items():
            expected = before[name]
            if step % 2 == 0:
                expected = alpha * model[name] + (1 - alpha) * before[name]
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
        before = moved
    # They are two models, and the reference is no parameter of the optimizer's.
    assert any((seen.steps[2][0][n] - seen.steps[2][1][n]).abs().max() > 1e-4 for n in before)
    ours = {p.data_ptr() for p in seen.trainer.model.parameters()}
    assert not ours & {p.data_ptr() for p in seen.trainer.ref_model.parameters()}


def test_log_ratios_are_those_to_the_moved_reference(files: Files) -> None:
    """Where it is the model as it is, log-ratios are exactly 0 again."""
    more = ("--ref_model_mixup_alpha", "1.0", "--steps", "4", "--eval-every", "2")
    assert files.run(*MOVES, *more, "--eval-pairs", str(files.folder / "test.jsonl")) == 0
    rows = files.metrics()
    found = [row["logratios/chosen"] for row in rows if "loss" in row]
    assert (found[0], found[2]) == (0.0, 0.0)
    assert all(abs(value) > 1e-3 for value in (found[1], found[3]))
    assert [row["eval_logratios/chosen"] for row in rows if "eval_loss" in row] == [0.0, 0.0, 0.0]


def test_a_run_goes_on_bit_for_bit(files: Files) -> None:
    always = (*MOVES, "--save-every", "3")
    whole = files.folder / "whole"
    assert files.run(*always, "--steps", "6", out=whole) == 0
    assert files.run(*always, "--steps", "3") == 0
    assert files.run(*always, "--steps", "6", "--resume") == 0
    assert files.losses() == files.losses(whole)
    for path in ("model.safetensors", f"checkpoint-6/{reference.FILE}"):
        mine, other = load_file(files.out / path), load_file(whole / path)
        assert all(torch.equal(mine[name], value) for name, value in other.items())
    moved = load_file(whole / f"checkpoint-3/{reference.FILE}")
    first = load_file(files.folder / "model" / "model.safetensors")
    assert not any(torch.equal(moved[n], first[n]) for n in moved if "proj" in n)
    assert not (whole / reference.FILE).exists()  # beside the model there is none


def test_a_checkpoint_without_the_reference_or_of_another(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run("--steps", "2", "--save-every", "2", "--reference", "online") == 0
    folder = files.out / "checkpoint-2"
    other = files.folder / "other"
    assert (
        files.run(*MOVES, "--steps", "4", "--resume_from_checkpoint", str(folder), out=other) == 1
    )
    assert f"{folder} holds no {reference.FILE}: with --sync_ref_model" in capsys.readouterr().err
    assert files.run(*MOVES, "--steps", "4", "--save-every", "2", "--resume") == 1
    assert "sync_ref_model: False then, True now" in capsys.readouterr().err
    save_file({"weight": torch.zeros(1)}, folder / reference.FILE)
    with pytest.raises(ValueError, match="is of another model: bias is in one of them only"):
        reference.load(torch.nn.Linear(1, 1), folder)
    save_file({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, folder / reference.FILE)
    with pytest.raises(ValueError, match=r"weight has shape \(1, 2\), expected \(1, 1\)"):
        reference.load(torch.nn.Linear(1, 1), folder)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ("--reference", "precomputed"),
            "--reference precomputed has no place with --sync-ref-model",
        ),
        (("--lora",), "--lora has no place with --sync-ref-model"),
        (("--ref_model_mixup_alpha", "1.5"), "--ref_model_mixup_alpha is 1.5, expected at least 0"),
    ],
)
def test_what_does_not_go_together(
    files: Files, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert files.run(*MOVES, *more) == 1
    assert said in capsys.readouterr().err
    assert not files.out.exists()


def test_an_adapter_has_no_reference_that_moves(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run("--lora", "--steps", "1", "--save-every", "0") == 0
    adapter = ("--model", str(files.out))
    other = files.folder / "other"
    assert files.run(*MOVES, *adapter, "--steps", "1", out=other) == 1
    assert "holds an adapter, and no reference beside it could move" in capsys.readouterr().err
    assert files.run(*MOVES, *adapter, "--merge-adapter", "--steps", "2", out=other) == 0


@pytest.mark.parametrize("kind", ["DeepSpeed", "FSDP1"])
def test_shards_that_no_checkpoint_would_hold(kind: str) -> None:
    trainer = mock.Mock(is_deepspeed_enabled=kind == "DeepSpeed", is_fsdp_enabled=kind == "FSDP1")
    trainer.accelerator.state.fsdp_plugin.fsdp_version = 1
    trainer.accelerator.device.type = "cuda"
    with pytest.raises(ValueError, match=f"--sync_ref_model has no place with {kind}, of whose"):
        processes.check(trainer)
    trainer.args.sync_ref_model = False
    processes.check(trainer)
    trainer.args.sync_ref_model, trainer.is_deepspeed_enabled = True, False
    trainer.accelerator.state.fsdp_plugin.fsdp_version = 2
    processes.check(trainer)
