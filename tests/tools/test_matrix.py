"""The matrix of versions: what its table and its results say, and what becomes of cells that cannot be had or fail."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tools.matrix import command, environment, smoke, table
from tools.matrix.cells import CELLS, Cell
from tools.matrix.smoke import Result

REPORT = """<testsuites><testsuite>
<testcase name="test_a"/>
<testcase name="test_b"><failure message="no"/></testcase>
<testcase name="test_c"><error message="no"/></testcase>
<testcase name="test_d"><skipped message="numpy is missing"/></testcase>
</testsuite></testsuites>"""
VERSIONS: dict[str, str | None] = {
    "python": "3.11.7",
    **dict.fromkeys(table.COLUMNS, "1.0"),
    "torch": "2.9.0+cpu",
}
RIGHT = Result("2026-11-27", VERSIONS, ["test_a"], [], {}, 3)


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cell:
    """The only one, with its files in a folder of the test's."""
    only = Cell("only", "3.11")
    monkeypatch.setattr(Cell, "results", tmp_path / "only.json")
    monkeypatch.setattr(Cell, "folder", tmp_path)
    monkeypatch.setattr(command, "CELLS", (only,))
    monkeypatch.setattr(table, "CELLS", (only,))
    monkeypatch.setattr(table, "PAGE", tmp_path / "versions.md")
    table.PAGE.write_text(f"before\n{table.BEGIN}\n{table.END}\nafter\n")
    return only


def test_the_page_has_the_results() -> None:
    text = table.PAGE.read_text()
    assert table.page(text) == text


def test_every_version_is_in_some_cell() -> None:
    def pinned(cell: Cell, package: str) -> str:
        found = re.search(rf"^{package}==(\d+\.\d+)", cell.constraints.read_text(), re.MULTILINE)
        return found[1] if found else ""

    assert {cell.python for cell in CELLS} == {"3.10", "3.11", "3.12", "3.13", "3.14"}
    torch = {pinned(cell, "torch") for cell in CELLS}
    assert torch >= {f"2.{minor}" for minor in range(9, 15)}
    assert {"5.0", "5.24"} <= {pinned(cell, "transformers") for cell in CELLS}
    assert {"0.29", "1.16"} <= {pinned(cell, "trl") for cell in CELLS}


def test_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    passed, failed, skipped = smoke.read(report)
    assert passed == ["test_a"]
    assert failed == ["test_b", "test_c"]
    assert skipped == {"test_d": "numpy is missing"}


@pytest.mark.parametrize(
    ("changes", "skips", "right", "said"),
    [
        ({}, (), True, "1 passed"),
        ({"passed": []}, (), False, "**failed**"),
        ({"failed": ["test_b"]}, (), False, "**failed**: test_b"),
        ({"skipped": {"test_d": "why"}}, (), False, "**failed**: test_d"),
        ({"skipped": {"test_d": "why"}}, ("test_d",), True, "1 passed, 1 without its packages"),
        (
            {},
            ("test_d",),
            False,
            "**failed**: test_d",
        ),  # the list of what is left out is out of date
    ],
)
def test_what_counts_as_passed(
    cell: Cell, changes: dict[str, object], skips: tuple[str, ...], right: bool, said: str
) -> None:
    result = dataclasses.replace(RIGHT, **changes)
    other = cell._replace(skips=skips)
    assert result.right(other) == right
    smoke.save(cell, result)
    assert smoke.load(cell) == result
    assert f" | {said}" in " | ".join(table._row(other))


def test_runs(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "make", lambda cell: Path("python"))
    monkeypatch.setattr(smoke, "smoke", lambda cell, python: RIGHT)
    assert command.main([]) == 0
    assert capsys.readouterr().out == "only: passed, 1 tests in 3 s\n1 passed\n"
    row = "| `only` | 3.11.7 | 2.9.0 | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | 1.0 | 1 passed | 2026-11-27 |"
    assert row in table.PAGE.read_text()
    assert table.PAGE.read_text().endswith("after\n")


@pytest.mark.parametrize(("named", "code"), [([], 0), (["only"], 1)])
def test_a_cell_that_cannot_be_had_has_not_passed(
    cell: Cell,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    named: list[str],
    code: int,
) -> None:
    monkeypatch.setenv("PATH", str(cell.folder))
    assert command.main(named) == code
    said = capsys.readouterr().out
    assert said == (
        "only: not run, there is no python3.11 on the PATH\n0 passed, 1 not run (only)\n"
    )
    assert "| not run |" in table.PAGE.read_text()


def test_an_environment_that_cannot_be_made_is_a_failure_in_the_table(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(cell: Cell) -> Path:
        raise environment.Failed("no such package")

    smoke.save(cell, RIGHT)
    monkeypatch.setattr(environment, "make", broken)
    assert command.main([]) == 1
    assert "**failed**: no such package" in table.PAGE.read_text()


def test_a_python_that_does_not_start_is_none(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As pyenv leaves of those that it does not use."""
    for folder, text in (("shims", "exit 127"), ("other", "echo 3.10"), ("real", "echo 3.11")):
        (tmp_path / folder).mkdir()
        python = tmp_path / folder / "python3.11"
        python.write_text(f"#!/bin/sh\n{text}\n")
        python.chmod(0o755)
    path = ":".join(str(tmp_path / name) for name in ("shims", "other", "real"))
    monkeypatch.setenv("PATH", path)
    assert environment.find_python("3.11") == tmp_path / "real" / "python3.11"


def test_a_cell_that_there_is_not(cell: Cell) -> None:
    with pytest.raises(SystemExit, match="cell is 'torch1', expected one of only"):
        command.main(["torch1"])
