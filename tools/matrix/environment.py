"""Environments of cells, made with uv: its cache is shared, and files are linked instead of copied."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.matrix.cells import ROOT, TESTS, Cell

UV = ROOT / "build" / "matrix" / "uv"
HEADER = "# {about}: what `python -m tools.matrix --resolve` found.\n"


class NotHere(Exception):
    """A cell that cannot be had on this machine; the message says why."""


class Failed(Exception):
    """A command that should have worked; the message has what it said."""


def find_python(version: str) -> Path:
    """The first Python of that version on the PATH that starts.

    Raises:
        NotHere: there is none.
    """
    for folder in os.get_exec_path():
        found = shutil.which(f"python{version}", path=folder)
        if found and _version(found) == version:
            return Path(found)
    raise NotHere(f"there is no python{version} on the PATH")


def resolve(cell: Cell) -> None:
    """Write the versions that go together on x86-64 Linux into the cell's constraints.

    Raises:
        Failed: none do.
    """
    wanted = ROOT / "build" / "matrix" / f"{cell.name}.in"
    wanted.parent.mkdir(parents=True, exist_ok=True)
    wanted.write_text("\n".join([*TESTS, *cell.pins]) + "\n")
    found = _run(
        *(uv(), "pip", "compile", "--quiet", "--no-header", "--no-annotate"),
        *("--python-version", cell.python, "--python-platform", "x86_64-manylinux_2_28"),
        *(("--resolution", "lowest-direct") if cell.lowest else ()),
        *(("--extra", cell.extra) if cell.extra else ()),
        *(ROOT / "pyproject.toml", wanted),
    )
    cell.constraints.parent.mkdir(parents=True, exist_ok=True)
    about = f"Python {cell.python}, {', '.join(cell.pins) or 'no pins'}"
    cell.constraints.write_text(HEADER.format(about=about) + found)


def make(cell: Cell) -> Path:
    """The Python of a new environment with the cell's packages and fastdpop as it is installed from this checkout.

    Raises:
        NotHere: there is no such Python here.
        Failed: packages cannot be installed.
    """
    environment = cell.folder / "environment"
    python = environment / "bin" / "python"
    _run(uv(), "venv", "--quiet", "--clear", "--python", find_python(cell.python), environment)
    _run(
        *(uv(), "pip", "install", "--quiet", "--python", python),
        *("--constraint", cell.constraints, "--refresh-package", "fastdpop"),
        *(f"{ROOT}[{cell.extra}]" if cell.extra else str(ROOT), *TESTS),
    )
    return python


@functools.cache
def uv() -> Path:
    """uv, from an environment of its own."""
    program = UV / "bin" / "uv"
    if not program.exists():
        _run(sys.executable, "-m", "venv", "--clear", UV)
        _run(UV / "bin" / "python", "-m", "pip", "install", "--quiet", "uv==0.13.9")
    return program


def _version(python: str) -> str | None:
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout
