"""A run that was cut off goes on as if nothing had happened, bit for bit on a CPU."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from fastdpop.cli import main
from tests.train.files import WARNINGS, Files, rows, write

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
ROOT = Path(__file__).parents[2]
TIMES = ("runtime", "per_second", "total_flos")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files.make(tmp_path / "files")


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without how long it took, and without the last line, which counts from where a run began."""
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMES)}
        for row in lines
        if "train_loss" not in row
    ]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("more", [(), ("--lora", "--lora-dropout", "0.1", "--no_disable_dropout")])
def test_a_longer_run_goes_on_from_a_shorter_one(files: Files, more: tuple[str, ...]) -> None:
    """With the constant schedule; three pairs in the last batch of an epoch, an odd interval of logging."""
    write(files.folder / "train.jsonl", rows(7))
    always = (*more, "--save-every", "2", "--logging-steps", "3", "--eval-every", "3")
    always += ("--eval-pairs", str(files.folder / "test.jsonl"))
    whole = files.folder / "whole"
    assert files.run(*always, "--steps", "6", out=whole) == 0
    assert files.run(*always, "--steps", "4") == 0
    assert files.run(*always, "--steps", "6", "--resume") == 0
    assert equal(files.weights(), files.weights(whole))
    # A run evaluates at its end, which for the shorter one was step 4.
    mine = [r for r in files.metrics() if not ("eval_loss" in r and r["step"] == 4)]
    assert len(mine) == len(files.metrics()) - 1
    assert untimed(mine) == untimed(files.metrics(whole))


@pytest.mark.slow
def test_killed_at_any_moment(files: Files) -> None:
    write(files.folder / "train.jsonl", rows(40))
    write(files.folder / "test.jsonl", rows(4, 5))
    always = ("--save-every", "3", "--eval-pairs", str(files.folder / "test.jsonl"))
    always += ("--eval-every", "4", "--accumulate", "2", "--epochs", "3")
    whole = files.folder / "whole"
    assert files.run(*always, out=whole) == 0
    chance, kills = random.Random(7), 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for resumed in range(6):
        argv = files.argv(*always, *(["--resume"] if resumed else []))
        process = subprocess.Popen(
            [sys.executable, "-m", "fastdpop", *argv],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if resumed < 3:
            lines = chance.randrange(1, 14) + 8 * resumed
            while process.poll() is None and len(progress(files.out)) < lines:
                time.sleep(0.002)
            time.sleep(chance.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
        kills += 1
    assert kills >= 2
    assert equal(files.weights(), files.weights(whole))
    assert untimed(files.metrics()) == untimed(files.metrics(whole))


def progress(out: Path) -> list[str]:
    try:
        return (out / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []


def test_a_run_that_died_before_its_first_checkpoint(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command starts it again, with --resume or without."""
    from fastdpop.train.trainer import PairTrainer

    own = PairTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    for more in ((), ("--resume",)):
        with monkeypatch.context() as patch:
            patch.setattr(PairTrainer, "training_step", training_step)
            assert files.run("--save-every", "2", *more) == 130
        # A last line that was torn does not matter.
        with open(files.out / "metrics.jsonl", "a") as file:
            file.write('{"loss": 0.')
    assert files.run("--save-every", "2", "--resume") == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert [row["step"] for row in files.metrics() if "loss" in row] == [1, 2, 3]


def test_other_settings_data_or_bytes_are_refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run("--steps", "2", "--save-every", "2") == 0
    for more, message in (
        (("--beta", "0.1"), "beta: 0.3 then, 0.1 now"),
        (("--learning-rate", "1e-3"), "learning_rate: 0.01 then, 0.001 now"),
        (("--pairs", str(files.folder / "test.jsonl")), "training pairs: "),
        (("--lora",), "use_peft: False then, True now"),
        (("--neftune_noise_alpha", "5"), "neftune_noise_alpha: None then, 5.0 now"),
        (("--train_sampling_strategy", "sequential"), "train_sampling_strategy: random then"),
        (("--loss", "ipo"), "loss: None then, IPO"),
    ):
        assert files.run("--steps", "4", "--save-every", "2", "--resume", *more) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "checkpoint-2 belongs to another run; " in said
        assert message in said
    path = files.out / "checkpoint-2" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[50:114] = bytes(b ^ 255 for b in content[50:114])
    path.write_bytes(content)
    assert files.run("--steps", "4", "--save-every", "2", "--resume") == 1
    assert f"{path} is damaged: its checksum has changed" in capsys.readouterr().err


@pytest.mark.parametrize("length", [("--steps", "2"), ("--epochs", "1")])
def test_a_run_that_has_ended_is_left_alone(
    length: tuple[str, str], files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    always = (*length, "--eval-pairs", str(files.folder / "test.jsonl"))
    assert files.run(*always) == 0
    before = {path: path.read_bytes() for path in files.out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert files.run(*always, "--resume") == 0
    steps = 2 if length[0] == "--steps" else 3
    said = capsys.readouterr().out
    assert f"Nothing was left to train: all {steps} steps had been done, and {files.out} is" in said
    assert before == {path: path.read_bytes() for path in files.out.rglob("*") if path.is_file()}


def test_a_run_that_died_after_its_last_step(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that made a shorter run longer, whose model stood in the folder: no step is trained twice."""
    from fastdpop.train.trainer import PairTrainer

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    whole = files.folder / "whole"
    assert files.run("--steps", "2", out=whole) == 0
    assert files.run("--steps", "1") == 0
    with monkeypatch.context() as patch:
        patch.setattr(PairTrainer, "save_at_the_end", stop)
        assert files.run("--steps", "2", "--resume") == 130
    assert not equal(files.weights(), files.weights(whole))
    capsys.readouterr()
    assert files.run("--steps", "2", "--resume") == 0
    assert "Nothing was left to train: all 2 steps had been done\n" in capsys.readouterr().out
    assert equal(files.weights(), files.weights(whole))
    assert not list(files.out.glob("*incomplete*"))


def test_a_short_run_is_lengthened_with_the_warm_up_that_it_had(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its default is a quarter of a run."""

    def run(*more: str) -> int:
        argv = files.argv("--save-every", "4", *more)
        at = argv.index("--warmup")
        return main([*argv[:at], *argv[at + 2 :]])

    assert run("--steps", "4") == 0
    assert run("--steps", "8", "--resume") == 1
    assert "warmup_steps: 1.0 then, 2.0 now. Go on with --warmup 1.0" in capsys.readouterr().err
    assert files.run("--steps", "8", "--save-every", "4", "--warmup", "1", "--resume") == 0


def test_a_share_of_a_warm_up_belongs_to_the_whole(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run("--steps", "2", "--save-every", "2", "--warmup", "0.5") == 0
    assert files.run("--steps", "4", "--save-every", "2", "--warmup", "0.5", "--resume") == 1
    assert "max_steps: 2 then, 4 now" in capsys.readouterr().err


def test_a_run_that_goes_on_saves_as_it_is_told_now(files: Files) -> None:
    assert files.run("--steps", "2", "--save-every", "2") == 0
    assert files.run("--steps", "4", "--save-every", "1", "--resume") == 0
    assert sorted(p.name for p in files.out.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_only_the_newest_checkpoints_are_kept(files: Files) -> None:
    assert files.run("--steps", "5", "--save-every", "1") == 0
    assert sorted(p.name for p in files.out.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-5",
    ]
    state = json.loads((files.out / "checkpoint-5" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [1, 2, 3, 4, 5]
