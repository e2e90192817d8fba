"""``fastdpop trl dpo``: TRL's own command on fastdpop, end to end on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from trl import DPOConfig

from fastdpop.cli import trl
from tests.tiny_model import tiny_llama, tiny_tokenizer

IGNORED = ["ignore::FutureWarning", "ignore::DeprecationWarning"]  # between TRL and transformers
pytestmark = [pytest.mark.filterwarnings(line) for line in IGNORED]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a data set."""
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    made = [
        {"prompt": f"{n} + {n} = ", "chosen": f"{2 * n}", "rejected": f"{2 * n + 1}!"}
        for n in range(8)
    ]
    Path("data").mkdir()
    Path("data/train.jsonl").write_text("\n".join(map(json.dumps, made)))
    return tmp_path


FIXED = ["--model_name_or_path", "model", "--dataset_name", "data", "--output_dir", "out"]
FIXED += ["--use_cpu", "--bf16", "False", "--dtype", "float32", "--report_to", "none"]
FIXED += [
    "--max_steps",
    "2",
    "--logging_steps",
    "1",
    "--save_strategy",
    "steps",
    "--save_steps",
    "2",
]
FIXED += ["--learning_rate", "0.1", "--lr_scheduler_type", "constant"]
BETA, LAMBDA = 0.3, 7.5


def rows() -> list[dict[str, float]]:
    """What was logged, by step."""
    state = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def assert_dpop(row: dict[str, float]) -> None:
    """The loss of a step with one pair, from its own metrics."""
    margin = row["rewards/margins"] - BETA * LAMBDA * row["penalty"]
    assert row["loss"] == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-4)


@pytest.mark.parametrize("more", [[], ["--share_prefixes", "--seed", "1"]])
def test_dpop_with_its_lambda(more: list[str], files: Path) -> None:
    options = ["--loss_type", "dpop", "--dpop_lambda", str(LAMBDA), "--beta", str(BETA), *more]
    assert trl.run(["dpo", *FIXED, *options, "--per_device_train_batch_size", "1"]) == 0
    first, second = rows()
    assert first["penalty"] == 0.0  # the reference is the model
    assert second["penalty"] > 0.1
    for row in (first, second):
        assert_dpop(row)
    assert Path("out/model.safetensors").exists()
    assert "fastdpop" not in Path("out/config.json").read_text()
    args = torch.load("out/training_args.bin", weights_only=False)
    assert args.share_prefixes is (True if more else None)
    assert not hasattr(DPOConfig, "dpop_lambda")  # the patch was the command's


@pytest.mark.slow
def test_a_yaml_file_and_two_processes(files: Path) -> None:
    lines = [f"dpop_lambda: {LAMBDA}", "loss_type: dpop", f"beta: {BETA}"]
    lines += ["per_device_train_batch_size: 2", "num_processes: 2", "share_prefixes: true"]
    Path("config.yaml").write_text("\n".join(lines))
    # Any free port, as tests run beside one another.
    launch = ["--config", "config.yaml", "--multi_gpu", "--main_process_port", "0"]
    assert trl.run(["dpo", *FIXED, *launch]) == 0
    assert rows()[0]["loss"] == pytest.approx(math.log(2.0), rel=1e-5)
    assert [row["epoch"] for row in rows()] == [0.5, 1.0]  # of eight pairs, four in a step
    args = torch.load("out/training_args.bin", weights_only=False)
    assert (args.loss_type, args.dpop_lambda, args.share_prefixes) == (["dpop"], LAMBDA, True)


# ---- what is refused, and what fails ------------------------------------------------------------


@pytest.mark.parametrize("line", [[], ["-h"], ["--help"]])
def test_help(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert trl.run(line) == 0
    assert "fastdpop trl dpo [OPTION ...]" in capsys.readouterr().out


def test_help_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        trl.run(["dpo", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "--dpop_lambda" in said
    assert "--share_prefixes" in said


def test_other_commands() -> None:
    with pytest.raises(ValueError, match="the command of TRL is 'grpo', expected 'dpo'"):
        trl.run(["grpo", "--help"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--config", "none.yaml"], OSError, "none.yaml"),
        (["--config", "broken.yaml"], ValueError, "the file of --config is no YAML"),
        (["--accelerate_config", "none"], ValueError, "Accelerate config none"),
        (["stray.py"], ValueError, "'stray.py' is no option of TRL or of accelerate launch"),
        (["--metric_for_best_model", "eval_los"], ValueError, "did you mean 'loss'"),
        (["--config", "metric.yaml"], ValueError, "the greatest hinge_on, which is the worst"),
        (["--model_revision", "v2"], ValueError, "v2 has no effect: model is a folder"),
    ],
    ids=str,
)
def test_wrong_options(
    options: list[str], error: type[Exception], message: str, files: Path
) -> None:
    Path("broken.yaml").write_text("beta: [")
    Path("metric.yaml").write_text("metric_for_best_model: eval_hinge_on")
    with pytest.raises(error, match=message):
        trl.run(["dpo", *FIXED, *options])
    assert not Path("out").exists()


def test_a_wrong_lambda(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """TRL 0.29 finds it in the process that it starts."""
    try:
        code, said = trl.run(["dpo", *FIXED, "--dpop_lambda", "-1"]), capfd.readouterr().err
    except ValueError as error:
        code, said = 1, str(error)
    assert code == 1
    assert "dpop_lambda is -1.0, expected a finite number" in said


def test_a_training_that_fails(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert trl.run(["dpo", *FIXED, "--loss_type", "nonesuch"]) == 1
    said = capfd.readouterr().err
    assert "fastdpop: error: loss_type is 'nonesuch', expected one of" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("code", "expected"), [(3, 3), (-9, 137)])
def test_exit_codes(code: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdpop.integrations.trl import command

    def failing(args: Any) -> None:
        raise subprocess.CalledProcessError(code, "python")

    monkeypatch.setattr(command, "launch_command", failing)
    assert trl.run(["dpo", *FIXED, "--dataset_name", "data"]) == expected
