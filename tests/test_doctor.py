"""What ``fastdpop doctor`` says of compilers and chips, with and without either."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdpop import doctor, installed
from fastdpop.engines import triton

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
H100 = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)


def plant_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture(autouse=True)
def look_again() -> Iterator[None]:
    triton.unusable.cache_clear()
    yield
    triton.unusable.cache_clear()


def plant_triton(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(triton, "_version", lambda: version)


@needs_triton
def test_a_gpu_and_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdpop.engines import self_check

    plant_gpu(monkeypatch)
    self_check.combination.cache_clear()
    said = doctor.report()
    target, ptxas = self_check.combination(torch.device("cuda", 0))
    assert target == "sm_90a"
    assert "GPU 0: H100\n  80 GiB, compute 9.0\n  triton " in said
    assert f"compiles for sm_90a with ptxas {ptxas}: not verified, so kernels are checked" in said
    monkeypatch.setenv(self_check.VARIABLE, "0")
    assert "not verified, and FASTDPOP_SELF_CHECK=0 turns the check off" in doctor.report()
    monkeypatch.setattr(self_check, "VERIFIED", frozenset({(target, ptxas)}))
    assert f"with ptxas {ptxas}: verified\n" in doctor.report()
    self_check.combination.cache_clear()


@needs_triton
def test_what_triton_would_compile_with(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.facts()["cuda"]["compilers"]
    assert set(found) == {"sm_80", "sm_90a", "sm_100"}
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in found.values())
    plant_triton(monkeypatch, None)
    triton.unusable.cache_clear()
    assert doctor.facts()["cuda"]["compilers"] == {}


@needs_triton
def test_a_triton_without_assemblers(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdpop.engines import self_check

    def broken(*_: Any) -> None:
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(self_check, "ptxas_version", broken)
    assert doctor.facts()["cuda"]["compilers"] == {}
    plant_gpu(monkeypatch)
    monkeypatch.setattr(self_check, "combination", broken)
    assert "triton cannot compile for it: Cannot find ptxas" in doctor.report()


@pytest.mark.parametrize(
    ("version", "why"),
    [
        (None, f"triton is not installed: {installed.install('triton')}"),
        ("3.5.1", "triton is 3.5.1, expected 3.6 or later, which comes with torch 2.10"),
    ],
)
def test_no_triton_or_an_old_one(
    monkeypatch: pytest.MonkeyPatch, version: str | None, why: str
) -> None:
    plant_triton(monkeypatch, version)
    plant_gpu(monkeypatch)
    said = doctor.report()
    assert f"  no kernels are compiled for it: {why}\n" in said
    assert f"\n     triton: not available: {why}" in said


@needs_triton
def test_the_version_of_a_nightly_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose distribution has another name."""
    import triton as module

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(module, "__version__", "3.7.0+git1234")
    assert triton.unusable() is None
    assert triton._version() == "3.7.0+git1234"


@pytest.mark.parametrize(
    ("cuda", "driver", "why"),
    [
        (None, None, "torch 2.9.0 is built for CPUs alone"),
        (
            None,
            "550.54",
            "torch 2.9.0 is built for CPUs alone; https://pytorch.org/get-started/locally has others",
        ),
        ("12.8", None, "there is no NVIDIA driver"),
        ("12.8", "550.54", "torch sees none"),
    ],
)
def test_why_no_gpu_is_used(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, driver: str | None, why: str
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    assert f"\n  no   GPUs: {why}\n" in doctor.report()
    assert doctor.facts()["uses"]["gpu"]["missing"] == (why,)


MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\n"


@pytest.mark.parametrize(("text", "version"), [(MODULE, "550.54.15"), (OPEN, "570.124.06")])
def test_the_driver_by_its_module(monkeypatch: pytest.MonkeyPatch, text: str, version: str) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: text + "GCC version:  gcc 12.2.0\n")
    assert doctor.driver() == version


def test_the_driver_by_its_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor.driver() is None
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="551.23\n551.23\n")
    )
    assert doctor.driver() == "551.23"

    def broken(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    monkeypatch.setattr(subprocess, "run", broken)
    assert doctor.driver() is None
