"""``fastdpop pairs build``: files of pairs, what is said of them, and what a user may get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("datasets")

from fastdpop.cli import main
from fastdpop.cli.pairs import DATA_SETS
from fastdpop.data.build import CORRUPTED, KINDS, build
from fastdpop.data.build.write import schema

ROWS = [
    {"question": f"Q{i}", "answer": f"He has 2*{i}=<<2*{i}={2 * i}>>{2 * i}.\n<<1+1=2>>2\n#### 2"}
    for i in range(5, 12)
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", *ROWS)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source: Path, out: Path, *more: str, kind: str = "gsm8k") -> int:
    return main(["pairs", "build", kind, str(source), "--out", str(out), *more])


def test_json_lines_and_parquet(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [*build("gsm8k", source, seed=3)]
    assert len(pairs) == 7
    lines, table = tmp_path / "pairs.jsonl", tmp_path / "pairs.parquet"
    for out in (lines, table):
        assert run(source, out, "--seed", "3") == 0
        assert capsys.readouterr().out == f"{out}: 7 pairs of 7 rows\n"
    assert [json.loads(line) for line in lines.read_text().splitlines()] == pairs
    assert pq.read_table(table).to_pylist() == pairs
    before = lines.read_bytes(), table.read_bytes()
    for out in (lines, table):
        assert run(source, out, "--seed", "3", "--force") == 0
    assert (lines.read_bytes(), table.read_bytes()) == before
    assert {file.name for file in tmp_path.iterdir()} == {source.name, lines.name, table.name}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("edit", [False, True])
def test_columns_are_those_of_the_pairs(tmp_path: Path, chat: bool, edit: bool) -> None:
    arc = {"question": "Q", "choices": ["a", "b"], "label": 0}
    kind, rows = ("gsm8k", ROWS) if edit else ("arc", [arc])
    out = tmp_path / "pairs.parquet"
    assert run(write(tmp_path / "x.jsonl", *rows), out, *["--chat"] * chat, kind=kind) == 0
    table = pq.read_table(out)
    assert table.schema == schema(chat=chat, edit=edit)
    assert table.to_pylist() == [*build(kind, tmp_path / "x.jsonl", chat=chat)]


def test_options_and_what_is_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(source, *ROWS, {"question": "Q", "answer": "It is 7.\n#### 7"})
    out = tmp_path / "pairs.jsonl"
    assert run(source, out) == 0
    assert capsys.readouterr().out == (
        f"{out}: 7 pairs of 8 rows\nleft out: 1 with no intermediate result to make wrong\n"
    )
    assert run(source, out, "--force", "--json") == 0
    left_out = {"no intermediate result to make wrong": 1}
    said = {"out": str(out), "rows": 8, "pairs": 7, "left_out": left_out}
    assert json.loads(capsys.readouterr().out) == said
    assert run(source, out, "--force", "--few-shot", "2", "--chat", "--limit", "3") == 0
    expected = [*build("gsm8k", source, few_shot=2, chat=True, limit=3)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert len(expected) == 3


def test_a_split_of_a_folder(source: Path, tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", ROWS[0])
    out = tmp_path.parent / f"{tmp_path.name}.jsonl"
    assert run(tmp_path, out, "--split", "test") == 0
    assert json.loads(out.read_text())["source"] == "test.jsonl:1"


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_no_half_file(
    source: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(source, *ROWS, {"question": "Q"})
    out = tmp_path / name
    for before in (None, b"mine"):
        if before:
            out.write_bytes(before)
        assert run(source, out, *["--force"] * bool(before)) == 1
        assert "train.jsonl:8: no row of gsm8k: field 'answer' is miss" in capsys.readouterr().err
        assert (out.read_bytes() if out.exists() else None) == before
        assert {file.name for file in tmp_path.iterdir()} - {name} == {source.name}


@pytest.mark.parametrize("name", ["train.jsonl", "new.jsonl"])
def test_nothing_is_written_into_the_source(
    name: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = source.read_bytes()
    arguments = ["gsm8k", str(source.parent), "--out", str(source.parent / name), "--force"]
    assert main(["pairs", "build", *arguments]) == 1
    assert "expected a file outside the source" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert [file.name for file in source.parent.iterdir()] == [source.name]


def test_mistakes(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = write(tmp_path / "there.jsonl", {})
    for out, more, message in (
        (there, [], "there.jsonl', which is there already: --force replaces it"),
        (tmp_path, ["--force"], "expected a name that ends with ('.jsonl', '.parquet')"),
        (tmp_path / "x.csv", [], "x.csv', expected a name that ends with ('.jsonl', '.parquet')"),
        (tmp_path / "no" / "x.jsonl", [], "x.jsonl': there is no such folder"),
        (source, ["--force"], "train.jsonl', which is the source itself"),
        (tmp_path / "x.jsonl", ["--split", "test"], "a file has no splits"),
        (tmp_path / "x.jsonl", ["--few-shot", "7"], "6 other tasks, too few for 7 examples"),
    ):
        assert run(source, out, *more) == 1
        assert message in capsys.readouterr().err
    assert source.read_text().count("\n") == 7
    assert there.read_text() == "{}\n"
    (tmp_path / "folder.jsonl").mkdir()
    assert run(source, tmp_path / "folder.jsonl", "--force") == 1
    assert capsys.readouterr().err.endswith("folder.jsonl', which is there already\n")


def test_usage(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--limit", "0"], ["--few-shot", "0"], ["--seed", "x"]):
        with pytest.raises(SystemExit) as stop:
            run(source, tmp_path / "x.jsonl", *more)
        assert stop.value.code == 2
    assert tuple(KINDS) == DATA_SETS
    assert {*CORRUPTED} < {*DATA_SETS}
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "build", "mmlu", "x", "--out", "y.jsonl"])
    assert stop.value.code == 2
    assert "invalid choice: 'mmlu'" in capsys.readouterr().err


def test_help_imports_no_libraries_of_data() -> None:
    code = (
        "import sys\n"
        "from fastdpop.cli import main\n"
        "try:\n    main(['pairs', 'build', '--help'])\n"
        "except SystemExit:\n    print({'datasets', 'pyarrow', 'transformers'} & {*sys.modules})\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("set()\n")
