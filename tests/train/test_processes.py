"""The same command under ``accelerate launch`` and ``torchrun``: one process's numbers on the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
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
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# On CPUs, --cpu would make it start a single process.
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")


def launched(
    files: Files, *more: str, out: Path, launcher: tuple[str, ...] = TORCHRUN, code: int = 0
) -> str:
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "fastdpop", *files.argv(*more, out=out)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode == 0) == (code == 0), done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("launcher", "more"),
    [(TORCHRUN, ()), (ACCELERATE, ()), (TORCHRUN, ("--share-prefixes",))],
    ids=["torchrun", "accelerate", "shared"],
)
def test_two_processes_compute_what_one_does(
    tmp_path: Path, launcher: tuple[str, ...], more: tuple[str, ...]
) -> None:
    """8 pairs, 2 times 2 a step; 3 held-out pairs, of which no process sees one twice in a mean."""
    files = Files.make(tmp_path / "files", train=4, test=3)
    train = [*rows(4), *(row | {"rejected": row["rejected"] + "?"} for row in rows(4))]
    write(files.folder / "train.jsonl", train)
    test = ("--eval-pairs", str(files.folder / "test.jsonl"), "--eval-every", "1")
    always = (*more, *test, "--save-every", "2", "--per_device_eval_batch_size", "1")
    assert files.run(*always, "--batch-pairs", "4", "--epochs", "2") == 0
    two = files.folder / "two"
    said = launched(
        files, *always, "--batch-pairs", "2", "--epochs", "2", out=two, launcher=launcher
    )
    assert said.count("train.jsonl: 8 pairs") == 1
    assert said.count(f"Saved to {two}") == 1
    assert len(files.losses(two)) == 4
    assert files.losses(two) == pytest.approx(files.losses(), rel=1e-4)
    for name, weight in files.weights().items():
        torch.testing.assert_close(files.weights(two)[name], weight, rtol=1e-3, atol=1e-4)
    names = ("logratios/chosen", "rewards/accuracies", "logps/rejected", "penalty")
    names = (*names, *("eval_" + name for name in names), "eval_logratios/chosen_standard_error")
    for one, other in zip(files.metrics(), files.metrics(two), strict=True):
        assert one["step"] == other["step"]
        for name in names:
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


def test_a_mistake_ends_every_process(tmp_path: Path) -> None:
    files = Files.make(tmp_path / "files")
    path = write(files.folder / "train.jsonl", [*rows(2), {"prompt": "a", "chosen": "b"}])
    said = launched(files, out=files.out, code=1)
    assert f"fastdpop: error: {path}:3: " in said
    assert "fastdpop/data" not in said  # no traceback
