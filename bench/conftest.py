"""Options, machine facts and the closing table of the benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch


class Line(NamedTuple):
    """One line of the closing table."""

    case: str
    contender: str
    seconds: float
    to_floor: float
    peak_bytes: int
    worst_error: float | None


LINES = pytest.StashKey[list[Line]]()
NOTES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where to run the benchmarks"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LINES] = []
    config.stash[NOTES] = []


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> list[Line]:
    """The closing table, to be added to."""
    return request.config.stash[LINES]


@pytest.fixture
def notes(request: pytest.FixtureRequest) -> list[str]:
    """Lines to print below the table."""
    return request.config.stash[NOTES]


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, object]
) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["capability"] = torch.backends.cpu.get_cpu_capability()
    if config.getoption("--device") == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines, notes = config.stash[LINES], config.stash[NOTES]
    if not lines and not notes:
        return
    write = terminalreporter.write_line
    terminalreporter.section("fastdpop: speed and memory")
    where = torch.cuda.get_device_name() if config.getoption("--device") == "cuda" else "CPU"
    write(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    case = None
    for line in lines:
        if line.case != case:
            case = line.case
            write(
                f"\n{case:<40}{'seconds':>9}{'x floor':>9}{'peak MiB':>10}{'worst error, nat':>18}"
            )
        error = "" if line.worst_error is None else f"{line.worst_error:.1e}"
        write(
            f"  {line.contender:<38}{line.seconds:9.2f}{line.to_floor:9.2f}{line.peak_bytes / 2**20:10.0f}{error:>18}"
        )
    for note in notes:
        write(f"\n{note}")
