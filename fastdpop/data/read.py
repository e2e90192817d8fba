"""Rows of files, folders and data sets, each with its place for messages.

What a format library would guess or mend is left as written: a CSV cell is text, JSON with a key
twice is an error, and no column is filled in.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable

from fastdpop.data.json_text import cell, decode


class Row(NamedTuple):
    """A row: where it is, its fields, and whether they can be nothing but text, as in CSV."""

    place: str
    fields: dict[str, Any]
    untyped: bool = False


@dataclass(frozen=True)
class Source:
    """Rows: what the user calls them, a fingerprint of their contents, and how to read them."""

    name: str
    digest: str
    rows: Callable[[], Iterator[Row]]


def open_source(
    source: str | Path | datasets.Dataset, *, split: str = "train", config: str | None = None
) -> Source:
    """Find rows; see :func:`fastdpop.data.load_pairs` for what can be named.

    Raises:
        ValueError: nothing of that name, or of a kind that cannot be read. The rows raise it for what
            they find, beginning with file and line (or row).
        OSError: a file cannot be read.
    """
    if isinstance(source, datasets.Dataset):
        return _of_dataset("the dataset", "row", source)
    if not isinstance(source, (str, Path)):
        raise ValueError(
            f"pairs are a {type(source).__name__}, expected a file, a folder, the name of a data set, or "
            "a datasets.Dataset (a stream cannot be checked before training)"
        )
    path = Path(source)
    if path.is_file():
        if split != "train" or config is not None:
            raise ValueError(
                f"{path}: a file has no splits or configurations, got split '{split}' and "
                f"configuration {config!r}"
            )
        return _of_files(path, [path])
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(path, split)
        return _of_files(path, _files_of_folder(path, split, config))
    if _reader(path) or len(path.parts) > 2:
        raise ValueError(f"{path}: no such file or folder")
    problem = (
        f"'{source}' is no file or folder here, and could not be loaded from the Hugging Face hub"
    )
    loaded = _attempt(problem, datasets.load_dataset, str(source), config, split=split)
    return _of_dataset(f"{source}[{split}]", f"{source}[{split}] row", loaded)


# --------------------------------------------------------------------------------------------- files


def read_json(path: Path) -> Iterator[Row]:
    """The objects of a file of JSON Lines or of one JSON array; raises as :func:`open_source`."""
    lines, begun = _lines(path), False
    for number, line in lines:
        if not begun and line.lstrip().startswith("["):
            text = line + "".join(line for _, line in lines)  # all that is left
            for i, item in enumerate(_parsed(text, path, number), 1):
                yield _object(item, f"{path} row {i}")
        elif line.strip():
            begun = True
            yield _object(_parsed(line, path, number), f"{path}:{number}")


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object, got {value!r:.80}")
    return Row(place, value)


def _parsed(text: str, path: Path, number: int) -> Any:
    """The value of JSON text that begins on the line of that number."""
    try:
        return decode(text.rstrip())
    except JSONDecodeError as error:
        raise ValueError(
            f"{path}:{number + error.lineno - 1}: invalid JSON at column {error.colno} ({error.msg})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, decompressed and without a byte order mark."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}:{number + 1}: the compressed data are damaged or cut off ({error})"
        ) from None


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    # Not by pandas, which takes a short row for empty cells and a long one for an index.
    csv.field_size_limit(2**31 - 1)  # 128 KiB by default
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    table = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header = next(table, [])
    if len({*header}) < len(header):
        raise ValueError(f"{path}: a column stands twice in the header {header}")
    for cells in filter(None, table):  # a blank line has no cells
        if len(cells) != len(header):
            raise ValueError(
                f"{path}:{table.line_num}: {len(cells)} cells under a header of {len(header)}"
            )
        try:
            yield dict(zip(header, map(cell, cells), strict=True))
        except ValueError as error:
            raise ValueError(f"{path}:{table.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for field in file.schema_arrow:
            if pa.types.is_map(field.type):
                raise ValueError(
                    f"{path}: column '{field.name}' is a map, which cannot be read: leave it out"
                )
        for batch in file.iter_batches(batch_size=1000):
            table = pa.Table.from_batches([batch], file.schema_arrow)
            yield from _unfilled(datasets.Dataset(InMemoryTable(table)))


def _numbered(name: str, rows: Iterable[dict[str, Any]], untyped: bool = False) -> Iterator[Row]:
    number = 0
    try:
        for number, fields in enumerate(rows, 1):
            yield Row(f"{name} {number}", fields, untyped)
    except (csv.Error, pa.ArrowException, UnicodeDecodeError, OSError, KeyError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's, not the data's
        raise ValueError(
            f"{name} {number + 1}: damaged, or of another kind ({_first_line(error)})"
        ) from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": lambda path: _numbered(f"{path} row", _csv(path), untyped=True),
    ".tsv": lambda path: _numbered(f"{path} row", _csv(path), untyped=True),
    ".parquet": lambda path: _numbered(f"{path} row", _parquet(path)),
}


def _reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    return _READERS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _of_files(name: Path, paths: list[Path]) -> Source:
    readers, digests = [], []
    for path in paths:
        reader = _reader(path)
        if not reader:
            raise ValueError(
                f"{path}: cannot read a file of this kind, expected one of {', '.join(_READERS)} "
                "(text may be compressed: .gz)"
            )
        with open(path, "rb") as file:
            digests.append((str(path), Hasher.hash_bytes(file)))
        readers.append(partial(reader, path))
    return Source(
        str(name), Hasher.hash(digests), lambda: chain.from_iterable(read() for read in readers)
    )


# ---------------------------------------------------------------------------- folders and data sets


def _attempt(problem: str, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return load(*args, **options)
    except Exception as error:  # those of hub, network, pyarrow and YAML have no common base
        raise ValueError(f"{problem}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _files_of_folder(path: Path, split: str, config: str | None) -> list[Path]:
    """The files of a folder's split, sorted into splits by their names as ``datasets`` does."""
    whole = path.resolve()
    load = datasets.load_dataset_builder
    builder = _attempt(f"{path}: no folder of data", load, str(whole), config)
    files = {
        str(name): [Path(f) for f in of] for name, of in (builder.config.data_files or {}).items()
    }
    if split not in files:
        raise ValueError(f"{path}: no split '{split}', expected one of {sorted(files)}")
    card = whole / "README.md"
    if not (card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace")):
        # Without a card that says so, datasets passes over what its name or kind puts in no split.
        known = {file for of in files.values() for file in of} | {whole / "dataset_infos.json"}
        left = sorted(file for file in whole.rglob("[!.]*") if _reader(file) and file not in known)
        if left:
            raise ValueError(
                f"{path}: '{left[0].relative_to(whole)}' is in none of its splits {sorted(files)}: name "
                "files by split and keep one kind of file in a folder, or give one file"
            )
    return [path / file.relative_to(whole) for file in files[split]]


def _saved(path: Path, split: str) -> Source:
    """A data set that ``save_to_disk`` wrote, alone or with other splits."""
    loaded = _attempt(f"{path}: a damaged data set", datasets.load_from_disk, str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{path}: no split '{split}', expected one of {sorted(loaded)}")
        path, loaded = path / split, loaded[split]
    return _of_dataset(str(path), f"{path} row", loaded)


def _of_dataset(name: str, row: str, dataset: datasets.Dataset) -> Source:
    plain = dataset.with_format(None)
    return Source(name, dataset._fingerprint, lambda: _numbered(row, _unfilled(plain)))


def _unfilled(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    features = dataset.features  # a deep copy at every look
    for fields in dataset:
        yield {key: without_filling(value, features[key]) for key, value in fields.items()}


def without_filling(value: Any, feature: Any) -> Any:
    """A value without the nulls that stand in Arrow where an object did not have another's key.

    The feature tells them: objects of ``Json()`` share no keys, and keep their nulls.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {k: without_filling(v, feature[k]) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_filling(item, inner) for item in value]
    return value
