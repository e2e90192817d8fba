"""``accelerate launch`` with the files of ``examples/``, as printed there, in two processes on CPUs; and what becomes
of a run of which a process dies.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from tests.train.files import WARNINGS, Files, rows, write

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(line) for line in WARNINGS),
]
ROOT = Path(__file__).parents[2]
ALWAYS = ("--save-every", "2", "--share-prefixes", "--loss_type", "dpop", "sft", "--max_steps", "6")


def command(name: str, files: Files, out: Path, processes: int, *more: str) -> list[str]:
    """The line that an example prints, with what is in capital letters there, and a number of processes."""
    found = re.findall(r"^# +(accelerate launch .*)$", (ROOT / "examples" / name).read_text(), re.M)
    assert len(found) == 1
    launch, options = shlex.split(found[0])[2:], files.argv(*more, out=out)[1:]
    values = {"MODEL": files.folder / "model", "PAIRS": files.folder / "train.jsonl", "run": out}
    printed = [str(values.get(word, word)) for word in launch]
    at = printed.index("-m")
    asked = [*printed[:at], "--num_processes", str(processes), "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *asked, *printed[at:], *options]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def launched(argv: list[str]) -> None:
    done = subprocess.run(
        argv, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]


def rank_one(launcher: int) -> int:
    """The process of rank 1 that a launcher has started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and b"\0RANK=1\0" in (path / "environ").read_bytes():
                return int(path.name)
        except OSError:
            continue
    raise AssertionError("there is no such process")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    made = Files.make(tmp_path_factory.mktemp("files") / "files")
    write(made.folder / "train.jsonl", rows(11))
    return made


@pytest.fixture(scope="module")
def whole(files: Files) -> Path:
    """A run in two processes from beginning to end."""
    out = files.folder / "whole"
    launched(command("fsdp2.yaml", files, out, 2, *ALWAYS))
    return out


def test_fsdp2_computes_what_one_process_does(files: Files, whole: Path) -> None:
    assert (whole / "checkpoint-6/pytorch_model_fsdp_0/__1_0.distcp").exists()
    one = files.folder / "one"
    assert files.run(*ALWAYS, "--batch-pairs", "4", out=one) == 0
    assert len(files.losses(one)) == 6
    assert files.losses(whole) == pytest.approx(files.losses(one), rel=1e-4)


def test_another_number_of_processes_goes_on(files: Files, whole: Path, tmp_path: Path) -> None:
    """Two with two pairs each, then one with four."""
    out = tmp_path / "run"
    always = (*ALWAYS[:-1],)
    launched(command("fsdp2.yaml", files, out, 2, *always, "2", "--schedule", "constant"))
    launched(command("fsdp2.yaml", files, out, 1, *ALWAYS, "--batch-pairs", "4", "--resume"))
    assert files.losses(out) == pytest.approx(files.losses(whole), rel=1e-4)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_process_that_is_killed_ends_the_run_which_goes_on(
    files: Files, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    argv = command("fsdp2.yaml", files, out, 2, *ALWAYS)
    with subprocess.Popen(
        argv, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        started = time.monotonic()
        while not (out / "checkpoint-2/fastdpop.json").exists():
            assert job.poll() is None
            assert time.monotonic() - started < 300
            time.sleep(0.01)
        os.kill(rank_one(job.pid), signal.SIGKILL)
        assert job.wait(timeout=60) != 0
    assert not (out / "model.safetensors").exists()
    launched(command("fsdp2.yaml", files, out, 2, *ALWAYS, "--resume"))
    assert files.losses(out) == files.losses(whole)
    weights = files.weights(whole)
    assert all(torch.equal(value, weights[name]) for name, value in files.weights(out).items())


def test_zero3_computes_what_fsdp2_does(files: Files, whole: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    out = tmp_path / "run"
    launched(command("zero3.yaml", files, out, 2, *ALWAYS))
    assert (out / "checkpoint-6/latest").exists()
    assert files.losses(out) == pytest.approx(files.losses(whole), rel=1e-4)
    weights = files.weights(whole)
    for name, value in files.weights(out).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4)
