"""The examples run, from a reference that is the policy (log-ratios of exactly 0) to a lower loss."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
EXAMPLES = ROOT / "examples"
LOGGED = re.compile(r"^.*?({'loss': .*})", re.MULTILINE)
STEP = re.compile(r"^step \d+ loss (\S+) margin (\S+) penalty (\S+)$", re.MULTILINE)


def run(script: str, *arguments: str, cwd: Path, **variables: str) -> str:
    # One thread, as in conftest.py, which does not reach another process; and no GPU, so that every machine agrees.
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PATH}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd,
        env=os.environ | environment | variables,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_readme_shows_the_example_that_runs() -> None:
    """The README's second block of Python, to the letter."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert blocks[1] == (EXAMPLES / "trl_dpop.py").read_text()


@pytest.mark.slow
def test_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from tests.tiny_model import tiny_llama, tiny_tokenizer

    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    steps = [
        {name: float(value) for name, value in ast.literal_eval(row).items()}
        for row in LOGGED.findall(run("trl_dpop.py", "model", cwd=tmp_path))
    ]
    assert len(steps) == 5
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[0]["rewards/margins"] == steps[0]["penalty"] == 0
    assert steps[-1]["rewards/chosen"] > 0
    assert (tmp_path / "runs" / "dpop" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_loop(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    steps = [tuple(map(float, step)) for step in STEP.findall(run(f"{name}_loop.py", cwd=tmp_path))]
    assert len(steps) == 10
    loss, margin, penalty = steps[0]
    assert loss == pytest.approx(math.log(2), abs=1e-4)
    assert margin == penalty == 0
    assert steps[-1][0] < loss
    assert steps[-1][1] > 0


@pytest.mark.slow
def test_a_loop_on_files(tmp_path: Path) -> None:
    """A saved model and a file of pairs instead of the made-up ones."""
    for package in ("accelerate", "peft"):
        pytest.importorskip(package)
    from tests.tiny_model import tiny_llama, tiny_tokenizer

    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(6)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ("--model", "model", "--pairs", "pairs.jsonl")
    output = run("accelerate_loop.py", *files, "--steps", "4", "--batch-pairs", "3", cwd=tmp_path)
    losses = [float(step[0]) for step in STEP.findall(output)]
    assert len(losses) == 4
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)


LLAMAFACTORY = """
model_name_or_path: model
stage: dpo
do_train: true
pref_beta: 0.3
dataset: pairs
dataset_dir: .
template: empty
output_dir: out
logging_steps: 1
per_device_train_batch_size: 2
learning_rate: 1.0e-3
max_steps: 3
report_to: none
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_llamafactory(kind: str, tmp_path: Path) -> None:
    """In an environment of its own: `make test-llamafactory`."""
    if importlib.util.find_spec("llamafactory") is None:
        pytest.skip("llamafactory is not installed")
    from tests.tiny_model import tiny_llama, tiny_tokenizer

    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {
            "conversations": [{"from": "human", "value": f"{i} + {i}?"}],
            "chosen": {"from": "gpt", "value": str(2 * i)},
            "rejected": {"from": "gpt", "value": str(2 * i + 1)},
        }
        for i in range(8)
    ]
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    pairs = {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt"}
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": pairs | {"columns": columns}}))
    (tmp_path / "config.yaml").write_text(f"{LLAMAFACTORY}finetuning_type: {kind}\n")
    # It imports torchaudio for text, too, whose builds do not follow every torch's.
    audio = tmp_path / "stand-in" / "torchaudio"
    audio.mkdir(parents=True)
    (audio / "__init__.py").touch()
    variables = {"PYTHONPATH": f"{audio.parent}{os.pathsep}{PATH}", "DISABLE_VERSION_CHECK": "1"}
    run("llamafactory_dpop.py", "config.yaml", cwd=tmp_path, **variables)
    lines = (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(steps) == 3
    assert steps[0]["penalty"] == steps[0]["rewards/margins"] == 0
