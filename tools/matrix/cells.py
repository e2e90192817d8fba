"""The cells of the matrix: which versions meet.

Every Python, every minor version of torch (with the triton that it asks for), transformers and TRL
from the first to the newest are in some cell. `requirements/matrix` has what each was resolved to.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# The compiler of torch 2.9 and 2.10 imports setuptools, which they do not ask for on every Python.
TESTS = ("pytest>=8.4", "hypothesis>=6.130", "setuptools>=77")
NUMPY = "numpy==2.3.5"
"""The interpreters of triton before 3.7 do not take a newer one."""


class Cell(NamedTuple):
    """An environment.

    Attributes:
        name: of the cell, its folder and its files.
        python: such as ``"3.10"``.
        pins: what is asked for beyond pyproject.toml; the newest that goes with it is taken of the rest.
        extra: of fastdpop; without, it has torch alone.
        lowest: take the oldest versions that pyproject.toml allows instead.
        skips: tests that have nothing to test here, by name. That any other is skipped is an error.
    """

    name: str
    python: str
    pins: tuple[str, ...] = ()
    extra: str = "demo"
    lowest: bool = False
    skips: tuple[str, ...] = ()

    @property
    def constraints(self) -> Path:
        return ROOT / "requirements" / "matrix" / f"{self.name}.txt"

    @property
    def results(self) -> Path:
        return ROOT / "tools" / "matrix" / "results" / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        return ROOT / "build" / "matrix" / self.name


INTERPRETER = "test_kernels_in_the_interpreter"  # triton 3.5 is too old, or there is no numpy
CELLS = (
    Cell("oldest", "3.10", lowest=True, skips=(INTERPRETER,)),
    Cell("torch2.9", "3.12", ("torch==2.9.*",), skips=(INTERPRETER,)),
    Cell("torch2.10", "3.11", ("torch==2.10.*", NUMPY, "transformers==5.4.*", "trl==1.0.*")),
    Cell("torch2.11", "3.12", ("torch==2.11.*", NUMPY, "transformers==5.8.*", "trl==1.4.*")),
    Cell("torch2.12", "3.13", ("torch==2.12.*", "transformers==5.13.*", "trl==1.8.*")),
    Cell("torch2.13", "3.11", ("torch==2.13.*", "transformers==5.18.*", "trl==1.12.*")),
    Cell("torch2.14", "3.10", ("torch==2.14.*",)),
    Cell("newest", "3.14"),
    Cell("torch-alone", "3.13", extra="", skips=(INTERPRETER, "tests.smoke.test_libraries")),
)
