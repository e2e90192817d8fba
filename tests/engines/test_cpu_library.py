"""How the CPU engine's library is found, what is said where there is none, and on whose threads it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastdpop import capabilities, engines, fused_logps
from fastdpop.engines import cpu_library

SAYS = "plain torch, which takes more time and memory than its engine 'cpu'"
needs_library = pytest.mark.skipif(
    cpu_library.missing() is not None, reason="fastdpop was installed without a C++ compiler"
)


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An installation whose library was not built."""
    monkeypatch.setattr(cpu_library, "__file__", str(tmp_path / "cpu_library.py"))
    monkeypatch.delenv("FASTDPOP_LIBRARY", raising=False)
    cached = (cpu_library.load, cpu_library.warn_if_missing)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def call(engine: str = "auto", dtype: torch.dtype = torch.float32) -> None:
    fused_logps(
        torch.randn(2, 3, 4, dtype=dtype),
        torch.randn(5, 4, dtype=dtype),
        torch.randint(0, 5, (2, 3)),
        engine=engine,
    )


def call_thrice() -> None:
    for _ in range(3):
        call()


@pytest.mark.usefixtures("unbuilt")
def test_a_library_that_was_not_built_is_said_once() -> None:
    with pytest.warns(UserWarning, match=SAYS) as said:
        call_thrice()
    (warning,) = said
    assert "apt install g++" in str(warning.message)
    assert "pip install --force-reinstall --no-deps --no-cache-dir" in str(warning.message)


@pytest.mark.usefixtures("unbuilt")
def test_nothing_is_said_where_plain_torch_is_meant() -> None:
    """Asked for, or the only engine for a dtype."""
    call("eager")
    call("auto", torch.float64)
    assert engines.choose("auto", torch.device("cuda"), torch.float32) != "cpu"


@pytest.mark.usefixtures("unbuilt")
def test_an_engine_without_its_library_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="engine 'cpu' cannot run on cpu: its C\\+\\+ library was not"
    ):
        call("cpu")
    reason = cpu_library.missing()
    assert reason is not None
    assert reason in [line.reason for line in engines.explain("cpu")]


@pytest.mark.usefixtures("unbuilt")
def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    reason = cpu_library.missing()
    assert reason is not None
    assert "_cpu.so" in reason
    assert reason.startswith("its C++ library cannot be loaded: ")
    assert "this builds it: pip install --force-reinstall" in reason


@pytest.mark.usefixtures("unbuilt")
def test_a_wheel_that_is_imported_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its library is there, and no compiler would help."""
    wheel = tmp_path / "fastdpop.whl"
    wheel.touch()
    monkeypatch.setattr(cpu_library, "__file__", str(wheel / "fastdpop" / "cpu_library.py"))
    assert cpu_library.missing() == cpu_library.ZIPPED
    assert capabilities.library().missing == (cpu_library.ZIPPED,)
    assert capabilities.library().commands == ()


@needs_library
def test_nothing_is_said_where_there_is_a_library() -> None:
    cpu_library.warn_if_missing.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


LOADED = """
import re, torch
torch.set_num_threads(4)
from pathlib import Path
import fastdpop
threads = lambda: len(list(Path("/proc/self/task").iterdir()))
torch.nn.functional.gelu(torch.randn(1000, 1000))
before = threads()
fastdpop.fused_logps(torch.randn(4, 64, 64), torch.randn(5000, 64), torch.randint(0, 5000, (4, 64)), engine="cpu")
assert threads() == before, (before, threads())
print(*{Path(p).name for p in re.findall(r"\\S*(?:gomp|iomp5|libomp)\\S*", Path("/proc/self/maps").read_text())})
"""


@needs_library
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_one_openmp_in_a_process_and_its_threads() -> None:
    """The library works on torch's threads, and no other OpenMP is loaded."""
    alone = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, env=alone, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout
