"""Two processes with two pairs each are one process with four."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(processes: int, script: str, *arguments: str) -> str:
    """What a script of this folder said to stderr."""
    launch = [sys.executable]
    if processes == 2:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "tests/integrations" / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize("share", [(), ("share",)], ids=["padded", "shared"])
def test_gradients_and_metrics_are_those_of_the_whole_batch(
    share: tuple[str, ...], tmp_path: Path
) -> None:
    for processes in (1, 2):
        run(processes, "ddp.py", str(tmp_path), str(4 // processes), *share)
    metrics, weights = torch.load(tmp_path / "4.pt")
    other_metrics, other_weights = torch.load(tmp_path / "2.pt")
    assert len(metrics) == 2
    for row, other in zip(metrics, other_metrics, strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-6)


def test_repeated_pairs_count_once_and_cached_references_are_found(tmp_path: Path) -> None:
    """Five pairs, where two processes with two each get eight. The weights stay."""
    first, second = (
        run(processes, "ddp_pairs.py", str(tmp_path), str(processes)) for processes in (2, 1)
    )
    for said, times in ((first, 1), (second, 0)):
        # The evaluation data are the training data: of the same hash.
        assert said.count("dataset computed, and kept in") == times
        assert said.count("dataset found in") == 2 - times
    (whole, log), (found, other_log) = (torch.load(tmp_path / f"pairs-{n}.pt") for n in (1, 2))
    skipped = ("loss", "grad_norm", "num_tokens", "runtime", "second", "time")
    for row, other in ((whole, found), (log[0], other_log[0])):
        assert len(row) == len(other) > 15
        for name in row:
            if name == "eval_loss" or not name.endswith(skipped):
                assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), name
    for name in ("rewards/chosen", "logratios/rejected", "entropy", "penalty"):
        assert log[0][name] == pytest.approx(whole[f"eval_{name}"], rel=1e-4), name
    assert whole["eval_logratios/chosen_standard_error"] > 0.01
