"""Run the smoke tests in a cell's environment, on fastdpop as it is installed there."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.matrix.cells import ROOT, Cell
from tools.matrix.environment import Failed

PACKAGES = (
    *("torch", "triton", "transformers", "trl", "accelerate", "peft", "datasets", "numpy"),
    "fastdpop",
)
SECONDS = 900
CONFIG = """[pytest]
addopts = --strict-markers --strict-config --import-mode=importlib
pythonpath = .
markers = slow
filterwarnings = error:::fastdpop
"""
"""Warnings of libraries are theirs; those about what fastdpop itself does are errors."""
VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Result:
    """What became of a cell: the versions that met, and the tests by what they came to."""

    date: str
    versions: dict[str, str | None]
    passed: list[str]
    failed: list[str]
    skipped: dict[str, str]
    seconds: int

    def right(self, cell: Cell) -> bool:
        """All tests that should have run did, and passed."""
        return bool(self.passed) and not self.failed and set(self.skipped) == set(cell.skips)


def smoke(cell: Cell, python: Path) -> Result:
    """Run the tests, which take their own copy: this checkout's fastdpop must not be in reach.

    Raises:
        Failed: they gave no report.
    """
    work = cell.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(ROOT / "tests", work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (work / "pytest.ini").write_text(CONFIG)
    report = work / "report.xml"
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environ.pop("PYTHONPATH", None)
    started = time.monotonic()
    done = subprocess.run(
        [python, "-m", "pytest", "tests/smoke", f"--junitxml={report}", "--show-capture=no"],
        cwd=work,
        env=environ,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    seconds = round(time.monotonic() - started)
    (cell.folder / "log.txt").write_text(done.stdout + done.stderr)
    if not report.exists():
        raise Failed(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    today = datetime.date.today().isoformat()
    return Result(today, versions(python), *read(report), seconds)


def versions(python: Path) -> dict[str, str | None]:
    """Of Python and the packages; None for those that are not installed."""
    done = subprocess.run(
        [python, "-c", VERSIONS, *PACKAGES], cwd="/", capture_output=True, text=True, check=True
    )
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def read(report: Path) -> tuple[list[str], list[str], dict[str, str]]:
    """The tests in a report of pytest: passed, failed and, with the reasons, skipped."""
    passed: list[str] = []
    failed: list[str] = []
    skipped: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        skip = case.find("skipped")
        if skip is not None:
            skipped[name] = skip.get("message", "")
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        else:
            passed.append(name)
    return passed, failed, skipped


def save(cell: Cell, result: Result) -> None:
    cell.results.parent.mkdir(parents=True, exist_ok=True)
    cell.results.write_text(json.dumps(asdict(result), indent=2) + "\n")


def load(cell: Cell) -> Result | None:
    """What the last run of a cell gave, if there was one."""
    return Result(**json.loads(cell.results.read_text())) if cell.results.exists() else None
