"""Reading rows: their places and values, and what is wrong with a file."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpop.data.read import open_source, without_filling

ROWS = [{"a": "ü", "b": [{"c": None}]}, {"a": "007", "b": []}]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path | str, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    """Places (without the folder) and fields."""
    rows = open_source(path, **options).rows()
    return [(row.place.replace(f"{Path(path).parent}/", ""), row.fields) for row in rows]


def error_of(path: Path | str, **options: Any) -> str:
    """The message, without the folder."""
    with pytest.raises(ValueError, match=r".") as error:
        read(path, **options)
    return str(error.value).replace(f"{Path(path).parent}/", "")


# ----------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.ndjson", "X.JSONL"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    content = f"\n  \n{LINES.strip()}\r\n\n"
    expected = [(f"{name}:3", ROWS[0]), (f"{name}:4", ROWS[1])]
    assert read(put(tmp_path / name, content)) == expected
    assert read(put(tmp_path / name, b"\xef\xbb\xbf" + content.encode())) == expected


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        f"\n[\n{LINES.strip().replace(chr(10), chr(10) + ',')}\n]\n",
        f"\ufeff [{LINES.replace(chr(10), ',', 1)}]",
    ],
)
def test_json_array(tmp_path: Path, content: str) -> None:
    assert read(put(tmp_path / "x.json", content)) == [
        ("x.json row 1", ROWS[0]),
        ("x.json row 2", ROWS[1]),
    ]
    assert read(put(tmp_path / "x.json", " [ ] ")) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    rows=st.lists(st.dictionaries(st.text(), JSON), min_size=1),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
)
def test_any_json_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("json")
    try:
        array = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:  # half a surrogate pair cannot be written but escaped
        array = json.dumps(rows, indent=indent).encode()
    found = read(put(folder / "x.json", array))
    assert found == [(f"x.json row {i}", row) for i, row in enumerate(rows, 1)]
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    assert read(put(folder / "y.jsonl", lines)) == [
        (f"y.jsonl:{i}", row) for i, row in enumerate(rows, 1)
    ]


def test_compressed(tmp_path: Path) -> None:
    many = gzip.compress(LINES.encode() * 5000)
    assert [fields for _, fields in read(put(tmp_path / "x.jsonl.gz", many))] == ROWS * 5000
    path = put(tmp_path / "x.csv.gz", gzip.compress(b"a,b\n1,2\n"))
    assert read(path) == [("x.csv.gz row 1", {"a": "1", "b": "2"})]
    for ending in ("jsonl", "csv"):
        noise = json.dumps({"a": bytes(range(256)).hex() * 99, "b": str(hash(ending))}).encode()
        cut = put(tmp_path / f"y.{ending}.gz", gzip.compress(LINES.encode() + noise)[:-20])
        assert ": the compressed data are damaged or cut off (" in error_of(cut)
        assert error_of(cut).startswith(f"y.{ending}.gz:")
        plain = put(tmp_path / f"z.{ending}.gz", LINES)
        assert error_of(plain).startswith(f"z.{ending}.gz:1: the compressed data are damaged")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{LINES}[1, 2]", "x.jsonl:3: expected an object, got [1, 2]"),
        (f"{LINES}null", "x.jsonl:3: expected an object, got None"),
        ('{"a": 1}{"a": 2}', "x.jsonl:1: invalid JSON at column 9 (Extra data)"),
        (
            '{\n  "a": 1\n}',
            "x.jsonl:1: invalid JSON at column 2 (Expecting property name enclosed in double quotes)",
        ),
        (b'\n{"a": "\xff"}', "x.jsonl:2: not UTF-8 (invalid start byte)"),
        (b'[{"a": 1},\n{"a":\n"\xff"}]', "x.jsonl:3: not UTF-8 (invalid start byte)"),
        (LINES.encode("utf-16"), "x.jsonl:1: not UTF-8 (invalid start byte)"),
        ('{"a": 1, "a": 2}', "x.jsonl:1: the key 'a' stands twice in one object: {'a': 2}"),
        (f'{LINES}{{"b": [{{"c": 1, "c": 1}}]}}', "x.jsonl:3: the key 'c' stands twice in one object: {'c': 1}"),
        ('[{"b": 1},\n{"a": 1,\n"a": 2}]', "x.jsonl:1: the key 'a' stands twice in one object: {'a': 2}"),
        ('{"a": ' + "[" * 100_000, "x.jsonl:1: invalid JSON (nested too deeply)"),
        ('[{"a": 1},\n3]', "x.jsonl row 2: expected an object, got 3"),
        ('[{"a": 1},\n{"a":\n}]', "x.jsonl:3: invalid JSON at column 1 (Expecting value)"),
        ('[{"a": 1}\n{"a": 2}]', "x.jsonl:2: invalid JSON at column 1 (Expecting ',' delimiter)"),
        ('\n[{"a": 1},', "x.jsonl:2: invalid JSON at column 11 (Expecting value)"),
        ('[{"a": 1}]\n[{"a": 1}]', "x.jsonl:2: invalid JSON at column 1 (Extra data)"),
    ],
)  # fmt: skip
def test_bad_json_names_its_line(tmp_path: Path, content: bytes | str, message: str) -> None:
    assert error_of(put(tmp_path / "x.jsonl", content)) == message


# ------------------------------------------------------------------------------------ CSV and Parquet


def test_csv_cells_are_text(tmp_path: Path) -> None:
    path = put(tmp_path / "x.csv", '\ufeffa,b\r\n007,\r\n\r\n"4","x, ""y""\r\nz"\r\nNA,null\r\n')
    assert read(path) == [
        ("x.csv row 1", {"a": "007", "b": ""}),
        ("x.csv row 2", {"a": "4", "b": 'x, "y"\r\nz'}),
        ("x.csv row 3", {"a": "NA", "b": "null"}),
    ]
    assert read(put(tmp_path / "x.tsv", "a\tb\n1,5\t2\n")) == [
        ("x.tsv row 1", {"a": "1,5", "b": "2"})
    ]


@given(st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0"))] * 2)))
def test_any_csv_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    written = io.StringIO(newline="")
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    path = put(tmp_path_factory.mktemp("csv") / "x.csv", written.getvalue())
    assert [fields for _, fields in read(path)] == [{"a": a, "b": b} for a, b in rows]


def test_a_long_csv_cell_is_read_whole(tmp_path: Path) -> None:
    text = "x" * 300_000
    assert read(put(tmp_path / "x.csv", f"a\n{text}\n")) == [("x.csv row 1", {"a": text})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", "x.csv:3: 1 cells under a header of 2"),
        ("a,b\n1,2,3\n", "x.csv:2: 3 cells under a header of 2"),
        ("a,a\n1,2\n", "x.csv: a column stands twice in the header ['a', 'a']"),
        (
            'a,b\n1,"2\n',
            "x.csv row 1: damaged, or of another kind (unexpected end of data)",
        ),
        ("a\n1\n\xff\n".encode("latin-1"), "x.csv:3: not UTF-8 (invalid start byte)"),
    ],
)
def test_bad_csv_names_its_row(tmp_path: Path, content: bytes | str, message: str) -> None:
    assert error_of(put(tmp_path / "x.csv", content)) == message


def test_parquet_has_no_nulls_but_its_own(tmp_path: Path) -> None:
    rows = [
        {"a": None, "m": [{"role": "user", "content": "hi"}]},
        {"a": "x", "m": [{"role": "tool", "content": "4", "call": {"x": 1}}]},
        {"a": "x", "m": [{"role": "tool", "content": "4", "call": {"y": 1}}]},
    ]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert read(path) == [(f"x.parquet row {i}", row) for i, row in enumerate(rows, 1)]
    kept = [{"m": [{"role": "user", "name": None}]}]
    features = datasets.Features({"m": datasets.List(datasets.Json())})
    datasets.Dataset.from_list(kept, features=features).to_parquet(str(path))
    assert read(path) == [("x.parquet row 1", kept[0])]
    content = path.read_bytes()
    after = "x.parquet row 1: damaged, or of another kind ("
    assert error_of(put(path, content[:-9])).startswith(after)
    pq.write_table(pa.table({"a": ["written so"]}), path, compression="none", use_dictionary=False)
    assert error_of(put(path, path.read_bytes().replace(b"written", b"\xfcritten"))).startswith(
        after
    )


def test_filling_is_told_by_the_feature() -> None:
    value = [{"a": None, "b": {"c": None, "d": 1}}]
    text = datasets.Value("string")
    struct = {"a": text, "b": {"c": text, "d": datasets.Value("int64")}}
    for feature in (datasets.List(struct), [struct], datasets.LargeList(struct)):
        assert without_filling(value, feature) == [{"b": {"d": 1}}]
    assert without_filling(value, datasets.List(datasets.Json())) == value
    assert without_filling(None, datasets.Value("string")) is None


# --------------------------------------------------------------------------------- folders and the hub


def test_folder_with_splits(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    put(folder / "train.jsonl", LINES)
    put(folder / "test.jsonl", '{"a": "t"}\n')
    assert read(folder) == [("data/train.jsonl:1", ROWS[0]), ("data/train.jsonl:2", ROWS[1])]
    assert read(folder, split="test") == [("data/test.jsonl:1", {"a": "t"})]
    assert (
        error_of(folder, split="dev") == "data: no split 'dev', expected one of ['test', 'train']"
    )


@pytest.mark.parametrize("left", ["more.jsonl", "train.csv", "in/more.json.gz"])
def test_no_file_of_a_folder_is_passed_over(tmp_path: Path, left: str) -> None:
    folder = tmp_path / "data"
    put(folder / "train.jsonl", LINES)
    put(folder / "test.jsonl", LINES)
    put(folder / ".hidden.jsonl", LINES)
    put(folder / "dataset_infos.json", "{}")
    assert len(read(folder)) == 2
    put(folder / "train-2.jsonl", LINES)
    assert len(read(folder)) == 4
    put(folder / left, "")
    assert error_of(folder) == (
        f"data: '{left}' is in none of its splits ['test', 'train']: name files by split and keep one kind "
        "of file in a folder, or give one file"
    )
    put(folder / "README.md", "---\nconfigs:\n- config_name: a\n  data_files: train.jsonl\n---\n")
    assert len(read(folder)) == 2


def test_folders_are_read_by_the_names_that_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "data" / "x.jsonl", LINES)
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    assert read("link")[0][0] == "link/x.jsonl:1"
    put(tmp_path / "a[1]" / "x.jsonl", LINES)  # datasets takes the bracket for a pattern
    assert error_of("a[1]").startswith("a[1]: no folder of data: ")


def test_folder_of_csv_parts(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    put(folder / "part-0.csv", "a\n007\n")
    put(folder / "part-1.csv", "a\nNA\n")
    assert read(folder) == [
        ("data/part-0.csv row 1", {"a": "007"}),
        ("data/part-1.csv row 1", {"a": "NA"}),
    ]


def test_folders_without_rows_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert error_of(tmp_path / "empty").startswith("empty: no folder of data: ")
    put(tmp_path / "text" / "x.txt", "hello")
    assert "text/x.txt: cannot read a file of this kind, expected one of .json," in error_of(
        tmp_path / "text"
    )


def test_saved_to_disk(tmp_path: Path) -> None:
    rows = [{"a": "x", "n": 1}, {"a": "y", "n": 2}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == [("one row 1", rows[0]), ("one row 2", rows[1])]
    datasets.DatasetDict({"train": dataset, "dev": dataset}).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "two", split="dev") == [
        ("two/dev row 1", rows[0]),
        ("two/dev row 2", rows[1]),
    ]
    assert (
        error_of(tmp_path / "two", split="x")
        == "two: no split 'x', expected one of ['dev', 'train']"
    )
    put(tmp_path / "one" / "state.json", "{}")
    assert error_of(tmp_path / "one").startswith("one: a damaged data set: ")


def test_datasets() -> None:
    dataset = datasets.Dataset.from_list([{"m": [{"x": 1}, {"y": 2}]}, {"m": []}])
    rows = [("row 1", {"m": [{"x": 1}, {"y": 2}]}, False), ("row 2", {"m": []}, False)]
    for source in (dataset, dataset.with_format("numpy")):
        assert list(open_source(source).rows()) == rows
    assert open_source(dataset).digest != open_source(dataset.select([1])).digest
    with pytest.raises(ValueError, match="pairs are a IterableDataset, expected a file"):
        open_source(dataset.to_iterable_dataset())  # type: ignore[arg-type]


def test_hub_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([{"m": [{"x": 1}, {"y": 2}]}])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or dataset)
    assert read("org/name", split="dev", config="c") == [
        ("name[dev] row 1", {"m": [{"x": 1}, {"y": 2}]})
    ]
    assert asked == [(("org/name", "c"), {"split": "dev"})]

    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError("no way\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert error_of("name") == (
        "'name' is no file or folder here, and could not be loaded from the Hugging Face hub: no way"
    )


def test_missing_and_other_files(tmp_path: Path) -> None:
    for missing in (tmp_path / "x.jsonl", tmp_path / "x", "x.jsonl", "a/b/c", "org/x.csv.gz"):
        assert error_of(missing).endswith(": no such file or folder")
    assert error_of(put(tmp_path / "x.jsonl.zst", "x")) == (
        "x.jsonl.zst: cannot read a file of this kind, expected one of .json, .jsonl, .ndjson, .csv, .tsv, "
        ".parquet (text may be compressed: .gz)"
    )
    file = put(tmp_path / "x.jsonl", LINES)
    for options in ({"split": "test"}, {"config": "c"}):
        assert error_of(file, **options).startswith("x.jsonl: a file has no splits or config")


def test_the_digest_is_of_the_contents(tmp_path: Path) -> None:
    path = put(tmp_path / "x.jsonl", LINES)
    before = open_source(path).digest
    assert open_source(path).digest == before
    put(path, LINES.replace("007", "008"))
    assert open_source(path).digest != before
