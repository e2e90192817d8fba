"""The command line, end to end on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import fastdpop
from fastdpop import demo
from fastdpop.cli import main, parser
from fastdpop.cli.train import settings_of
from fastdpop.settings import Settings
from tests.tiny_model import CHATML, tiny_llama, tiny_tokenizer

ROW = {"prompt": "2 and 2: ", "chosen": "4", "rejected": "5"}
REQUIRED = ["train", "--model", "m", "--pairs", "p", "--output", "o"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Paths of a saved model and of training and held-out pairs."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    for name, count in (("train", 6), ("test", 3)):
        rows = [{**ROW, "prompt": f"{name} {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(tmp_path / name) for name in ("model", "train.jsonl", "test.jsonl", "out")}


def train(files: dict[str, str], *more: str) -> int:
    fixed = ["--model", files["model"], "--pairs", files["train.jsonl"], "--output", files["out"]]
    return main(["train", *fixed, "--batch-pairs", "2", "--device", "cpu", *more])


def metrics(files: dict[str, str]) -> list[dict[str, Any]]:
    lines = (Path(files["out"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_train_saves_a_model_that_loads(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--eval-pairs", files["test.jsonl"], "--learning-rate", "1e-3", "--warmup", "1")
    assert train(files, "--loss-option", "lam=5", "--loss-option", "form=outside", *more) == 0
    said = capsys.readouterr().out
    assert "6 pairs" in said
    assert "Held-out log-ratio after 3 steps" in said
    assert [row["step"] for row in metrics(files)] == [0, 1, 2, 3, 3]
    saved = AutoModelForCausalLM.from_pretrained(files["out"])
    assert not torch.equal(saved.lm_head.weight, tiny_llama().lm_head.weight)


def test_train_lora(files: dict[str, str]) -> None:
    pytest.importorskip("peft")
    assert train(files, "--lora", "--lora-rank", "2", "--bf16", "--epochs", "2") == 0
    assert (Path(files["out"]) / "adapter_model.safetensors").exists()
    assert metrics(files)[-1]["step"] == 6


def test_train_resumes(files: dict[str, str]) -> None:
    assert train(files, "--steps", "2", "--save-every", "2") == 0
    assert train(files, "--steps", "4", "--save-every", "2", "--resume") == 0
    assert [row["step"] for row in metrics(files)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lora-rank", "2"), "--lora-rank has no effect without --lora"),
        (("--loss-option", "lambda=3"), "has no option 'lambda'"),
        (("--loss-option", "beta=-1"), "beta is -1"),
        (("--resume",), "nothing to resume"),
        (("--learning-rate", "0"), "learning_rate is 0.0"),
        (("--max-length", "8"), "more than max_length = 8"),
        (("--eval-pairs", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_train_errors_are_one_plain_line(
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    assert train(files, *more) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fastdpop: error: ")
    assert message in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--device", "nope"), "--device is 'nope', expected a device that torch can use here"),
        (("--device", "cuda:999"), "--device is 'cuda:999'"),
        (("--device", "meta"), "--device is 'meta'"),
        (("--engine", "warp"), "engine is 'warp'"),
        (("--engine", "triton"), "engine 'triton' cannot run on cpu"),
        (("--seed", "9" * 23), f"seed is {'9' * 23}, expected at most 9223372036854775807"),
        (("--warmup", "1" + "0" * 400), "warmup is 1000"),
        (("--lora", "--lora-alpha", "nan"), "--lora-alpha is nan, expected a positive number"),
        (("--lora", "--lora-alpha", "inf"), "--lora-alpha is inf, expected a positive number"),
        (("--lora", "--lora-dropout", "nan"), "--lora-dropout is nan, expected a number from 0"),
        (("--lora", "--lora-dropout", "1"), "--lora-dropout is 1.0, expected a number from 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    argv = ["--model", "/nowhere", "--pairs", "/nowhere", "--output", "/nowhere"]
    assert main(["train", *argv, "--device", "cpu", *more]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("fastdpop: error: ")
    assert message in said


def test_epochs_beyond_all_numbers(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(files, "--epochs", "1.7e308") == 1
    assert "steps is 9223372036854775808, expected at most" in capsys.readouterr().err


def test_weights_that_are_cut_short(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path(files["model"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert train(files) == 1
    assert f"fastdpop: error: {files['model']} cannot be loaded: " in capsys.readouterr().err


def test_a_model_that_cannot_be_attached_to(
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda _: None)
    assert train(files) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fastdpop: error: LlamaForCausalLM cannot be trained: ")
    assert "no output embedding" in said


def test_a_checkpoint_that_is_cut_short(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(files, "--steps", "1", "--save-every", "1") == 0
    saved = Path(files["out"]) / "checkpoint.pt"
    whole = saved.read_bytes()
    for length in (0, len(whole) // 2):
        saved.write_bytes(whole[:length])
        assert train(files, "--steps", "2", "--save-every", "1", "--resume") == 1
        assert "checkpoint.pt cannot be read as a checkpoint" in capsys.readouterr().err


def test_memory_that_is_not_there(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    assert train(files, "--lora", "--lora-rank", "9" * 15) == 1
    assert "fastdpop: error: there is not enough memory: " in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("fastdpop.train.train", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(files)


def test_malformed_row(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(files["train.jsonl"]).write_text(json.dumps({**ROW, "chosen": 4}))
    assert train(files) == 1
    assert f"{files['train.jsonl']}:1: field 'chosen' is a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["train"],
        ["train", "--model", "m", "--pairs", "p", "--output", "o", "--loss", "nonsense"],
        ["train", "--model", "m", "--pairs", "p", "--output", "o", "--loss-option", "lam"],
        ["demo", "--steps", "0"],
        ["demo", "--threads", "9" * 23],
        [*REQUIRED, "--threads", "1025"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_defaults_are_those_of_settings() -> None:
    assert settings_of(parser().parse_args([*REQUIRED, "--steps", "7"])) == Settings(steps=7)


def test_every_setting_has_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """All but the loss, which has two, changed from their default and found in the settings."""
    changed = {
        "steps": 7,
        "batch_pairs": 3,
        "accumulate": 2,
        "learning_rate": 0.5,
        "weight_decay": 0.25,
        "warmup": 0,
        "schedule": "cosine",
        "max_grad_norm": 2.0,
        "reference": "online",
        "seed": 4,
        "eval_every": 6,
        "save_every": 8,
        "engine": "eager",
        "workspace_bytes": 9,
    }
    assert {*changed, "bf16", "loss"} == set(Settings.__dataclass_fields__)
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    assert settings_of(parser().parse_args([*REQUIRED, "--bf16", *argv])) == Settings(
        **changed, bf16=True
    )
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name in changed:
        assert Settings.__dataclass_fields__[name].metadata["help"] in said


def test_help_imports_no_more_than_the_package() -> None:
    code = """
import sys
import fastdpop
before = set(sys.modules)
from fastdpop.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
heavy = {"transformers", "accelerate", "peft", "trl", "datasets", "tqdm", "matplotlib", "numpy"}
assert not (set(sys.modules) - before) & heavy, heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: fastdpop train" in done.stdout


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fastdpop.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fastdpop {fastdpop.__version__}\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastdpop {fastdpop.__version__}\n"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said
    assert any(line.startswith("  -> ") for line in said.splitlines())


@pytest.mark.parametrize(
    ("dpo", "dpop", "steps", "code"),
    [(-9.0, 3.0, 60, 0), (-1.0, 3.0, 60, 1), (-9.0, -1.0, 60, 1), (-1.0, 3.0, 2, 0)],
)
def test_demo_reports_draws_and_judges(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    dpo: float,
    dpop: float,
    steps: int,
    code: int,
) -> None:
    """The demo with its model and its training replaced; `make demo` runs the real ones."""
    ends = {"DPO": dpo, "DPOP": dpop}

    def fake_train(*_: Any, title: str, **__: Any) -> list[dict[str, float]]:
        names = ("chosen_standard_error", "rejected_standard_error", "accuracy")
        rest = {f"eval_{name}": 0.5 for name in names}
        return [
            {"step": step, "eval_chosen_logratio": y, "eval_rejected_logratio": y - 1, **rest}
            for step, y in ((0, 0.0), (steps, ends[title]))
        ]

    monkeypatch.setattr(demo, "load_smollm2", lambda: (tiny_llama(), tiny_tokenizer(CHATML)))
    monkeypatch.setattr(demo, "train", fake_train)
    threads = torch.get_num_threads()
    arguments = ["--output", str(tmp_path / "new"), "--steps", str(steps)]
    assert main(["demo", *arguments]) == code
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "times less likely" in said
    assert ("not what was expected" in said) == (code == 1)
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert written["held_out"]["DPO"][-1]["eval_chosen_logratio"] == dpo
