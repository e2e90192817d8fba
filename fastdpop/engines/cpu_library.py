"""The shared library of the CPU engine (``csrc/``), called through ctypes: it builds without torch, and
one build serves every version of it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fastdpop import installed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


ZIPPED = (
    "its C++ library cannot be loaded out of the zip file (a wheel is one) that fastdpop is imported from: install it "
    "with pip"
)


class CProblem(ctypes.Structure):
    """``Problem`` in csrc/interface.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "width")),
        *((name, ctypes.c_void_p) for name in ("hidden", "weight")),
        ("weight_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bias", "targets")),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "compute_dtype", "softcap")),
        *((name, ctypes.c_float) for name in ("scale", "cap_in", "cap_out")),
        ("threads", ctypes.c_int32),
        ("scratch_bytes", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "logps",
                "lse",
                "entropy",
                "mean_logits",
                "token_accuracy",
                "aligned_logps",
                "max_logit",
                "dlogp_dhidden",
                "kept",
                "kept_max",
            )
        ),
        *((name, ctypes.c_int64) for name in ("dhidden_from", "dhidden_to")),
        *((name, ctypes.c_int32) for name in ("again", "fresh")),
        *((name, ctypes.c_void_p) for name in ("dlogp", "dweight", "dbias")),
    ]


class Library:
    """The shared library, and the instruction set in use: the best one, or the one named."""

    def __init__(self, path: Path, instructions: str | None) -> None:
        self.calls = ctypes.CDLL(str(path))
        self.calls.fastdpop_name.restype = ctypes.c_char_p
        for name in ("supported", "openmp"):
            getattr(self.calls, f"fastdpop_{name}").restype = ctypes.c_bool
        for name in ("panel", "tile", "problem_size", "distinct"):
            getattr(self.calls, f"fastdpop_{name}").restype = ctypes.c_int64
        if self.calls.fastdpop_problem_size() != ctypes.sizeof(CProblem):
            raise OSError(f"{path} was built from another version of fastdpop")
        names = [self.calls.fastdpop_name(i).decode() for i in range(self.calls.fastdpop_count())]
        self.supported = [n for i, n in enumerate(names) if self.calls.fastdpop_supported(i)]
        self.instructions = instructions or self.supported[0]
        if self.instructions not in self.supported:
            raise ValueError(
                f"instructions is {self.instructions!r}, expected one of {self.supported}"
            )
        self.index = names.index(self.instructions)
        self.panel: int = self.calls.fastdpop_panel(self.index)
        self.tile: int = self.calls.fastdpop_tile(self.index)
        self.openmp: bool = self.calls.fastdpop_openmp()

    def forward(self, problem: CProblem) -> None:
        self.calls.fastdpop_forward(self.index, ctypes.byref(problem))

    def backward(self, problem: CProblem) -> None:
        self.calls.fastdpop_backward(self.index, ctypes.byref(problem))

    def distinct(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows that repeat no earlier one, and which of them each row is; None if none repeats."""
        rows = len(targets)
        first, which = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
        count = self.calls.fastdpop_distinct(
            ctypes.c_int64(rows),
            ctypes.c_int64(hidden.shape[1] * hidden.element_size()),
            ctypes.c_void_p(hidden.data_ptr()),
            ctypes.c_void_p(targets.data_ptr()),
            ctypes.c_void_p(first.data_ptr()),
            ctypes.c_void_p(which.data_ptr()),
        )
        return None if count == rows else (first[:count], which)


@functools.cache
def load(instructions: str | None = None) -> Library | str:
    """The library, or why there is none; :func:`missing` says what to do about it."""
    other = os.environ.get("FASTDPOP_LIBRARY")  # another build of it, for `make sanitize`
    path = Path(other) if other else Path(__file__).with_name("_cpu.so")
    if not other and not path.parent.is_dir():
        return ZIPPED
    if not other and not path.exists():
        return (
            "its C++ library was not built: when fastdpop was installed, there was no C++ compiler, or none that "
            "could build it"
        )
    try:
        _provide_openmp(path)
        return Library(path, instructions)
    except (OSError, AttributeError) as error:  # an older build lacks functions
        return f"its C++ library cannot be loaded: {error}"


def _provide_openmp(path: Path) -> None:
    """The library takes OpenMP's functions from what the process has: torch loads GNU's run-time library for
    all to see. Where it does not, the system's is loaded.
    """
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        if "GOMP_" in str(error):
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def missing() -> str | None:
    """Why the CPU engine has no library, and the command that gives it one; None where it has one."""
    library = load()
    if not isinstance(library, str):
        return None
    if library == ZIPPED:
        return library
    return (
        f"{library}. With a C++ compiler (on Debian and Ubuntu: apt install g++), this builds it: "
        + installed.reinstall()
    )


@functools.cache
def warn_if_missing() -> None:
    """Say once in a process that plain torch takes the place of the library, and why."""
    reason = missing()
    if reason is not None:
        warnings.warn(
            "fastdpop computes on this CPU with plain torch, which takes more time and memory than its engine 'cpu': "
            f"{reason} (engine='eager' asks for plain torch without this warning)",
            stacklevel=2,
        )


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this processor and the library both know, best first."""
    library = load()
    return () if isinstance(library, str) else tuple(library.supported)
