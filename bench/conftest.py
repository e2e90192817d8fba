"""Options, machine facts, and the closing tables of the benchmarks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from typing import Any

import pytest
import torch

import fastdpop
from bench import report
from bench.cases import gradient_cases, loss_cases
from bench.contenders import ours
from bench.memory import keep_freed_memory
from bench.workloads import SHAPES, Shape, small


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where to run the benchmarks"
    )
    parser.addoption(
        "--quick", action="store_true", help="tiny workloads: does it run? The numbers mean nothing"
    )
    parser.addoption(
        "--malloc",
        default="keep",
        choices=["keep", "default"],
        help="keep: freed memory is used again, everybody's best setting; default: glibc's own",
    )


ROWS = pytest.StashKey[list[dict[str, Any]]]()
MALLOC = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    kept = config.getoption("--malloc") == "keep" and keep_freed_memory()
    config.stash[MALLOC] = "keep" if kept else "default"
    # Of the peers, and of torch.compile.
    config.addinivalue_line("filterwarnings", "default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--device")
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(loss_cases(device)), ids=str)
    if "summed_by" in metafunc.fixturenames:
        metafunc.parametrize("summed_by", gradient_cases(device))
    if "fastdpop" in metafunc.fixturenames:
        metafunc.parametrize("fastdpop", ours(device)[:1])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def shapes(quick: bool) -> dict[str, Shape]:
    return {name: small(shape) if quick else shape for name, shape in SHAPES.items()}


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The results so far, to be added to."""
    return request.config.stash[ROWS]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    device = config.getoption("--device")
    machine_info["threads"] = torch.get_num_threads()
    machine_info["capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["gpu"] = torch.cuda.get_device_name() if device == "cuda" else None
    machine_info["quick"] = config.getoption("--quick")
    machine_info["malloc"] = config.stash[MALLOC]
    machine_info["auto"] = ours(device)[0]
    versions = {"fastdpop": fastdpop.__version__, "torch": torch.__version__}
    for package in ("trl", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    versions["Python"] = platform.python_version()
    machine_info["versions"] = versions


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.stash[ROWS]:
        terminalreporter.section("fastdpop: speed and memory")
        terminalreporter.write_line(report.tables(config.stash[ROWS]))
