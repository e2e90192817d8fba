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


@pytest.mark.slow
def test_gradients_and_metrics_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests/integrations/ddp.py")
    for processes in (1, 2):
        launch = [sys.executable]
        if processes == 2:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*launch, script, str(tmp_path), str(4 // processes)],
            env=environment,
            cwd=tmp_path,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    metrics, weights = torch.load(tmp_path / "4.pt")
    other_metrics, other_weights = torch.load(tmp_path / "2.pt")
    assert len(metrics) == 2
    for row, other in zip(metrics, other_metrics, strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-6)
