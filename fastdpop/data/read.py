"""Rows of files, folders and data sets of the hub, each with its place for messages.

What a format library would guess or mend is left as written: a CSV cell is text, JSON with a key
twice is an error, and no column is filled in.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import hashlib
import io
import itertools
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

from fastdpop.data.json_text import DECODER, kind, why_invalid


class Row(NamedTuple):
    """A row: where it is, its fields, and how much of its source has been read with it."""

    place: str
    fields: dict[str, Any]
    position: float


@dataclass(frozen=True)
class Source:
    """An opened source of rows.

    Attributes:
        name: what the user called it.
        digest: a fingerprint of all its contents.
        total: its size, in ``unit``.
        unit: ``"B"`` or ``"rows"``.
        rows: reads it from the beginning; :attr:`Row.position` grows to ``total``.
    """

    name: str
    digest: str
    total: int
    unit: str
    rows: Callable[[], Iterator[Row]]


def open_source(source: str | Path, *, split: str = "train", config: str | None = None) -> Source:
    """Find rows: a file, a folder, a folder of ``Dataset.save_to_disk``, or a hub's data set.

    Args:
        source: a path, or a data set's name on the hub. What exists here is taken from here.
        split: which split of a folder or of a hub's data set.
        config: which configuration of it.

    Raises:
        ValueError: nothing of that name, no such split or configuration, or a kind of file that
            cannot be read. The rows raise it for what they find, beginning with file and line (or
            row).
        OSError: a file cannot be read.
    """
    path = Path(source)
    if path.is_file():
        if split != "train" or config is not None:
            given = f"split '{split}'" if split != "train" else f"configuration '{config}'"
            raise ValueError(f"{source}: a single file has no {given}")
        return _of_files(str(source), [path])
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(path, split)
        return _of_files(str(source), _files_of_folder(path, split, config))
    name = str(source)
    if path.exists():
        raise ValueError(f"{name}: neither a file nor a folder")
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", name) or name.startswith(".") or _kind(path):
        raise ValueError(f"{name}: no such file or folder")
    return _from_hub(name, split, config)


# --------------------------------------------------------------------------------------------- files

_COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}


def read_json(path: str | Path) -> Iterator[Row]:
    """The objects of a file of JSON Lines or of one JSON array, which may be compressed.

    Raises:
        ValueError: ``file:line: ...`` for what is not UTF-8, not JSON or not an object, and for
            compressed data that are damaged or cut off.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file, _decompressed(path, file) as stream:
        lines, begun = _lines(stream, path), False
        for number, raw in lines:
            if not raw.strip():
                continue
            if not begun and raw.lstrip().startswith(b"["):
                raw = b"".join([raw, *(line for _, line in lines)])
                text = _utf8(raw, path, number)
                del raw  # the whole file, once is enough
                yield from _array(text, path, number)
                return
            begun = True
            fields = _object(_utf8(raw, path, number), path, number)
            yield Row(f"{path}:{number}", fields, file.tell())


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = DECODER.decode(line.rstrip())
    except (ValueError, RecursionError) as error:
        where = getattr(error, "pos", 0)
        ended = where and not line[where:].strip()
        hint = "; an object stands on one line, or all of them in one list" if ended else ""
        raise ValueError(f"{path}:{number}: {why_invalid(error)}{hint}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{number}: expected an object, got {kind(value)}")
    return value


def _array(text: str, path: Path, number: int) -> Iterator[Row]:
    """The objects of a JSON array that begins on the line of that number."""
    size = path.stat().st_size
    at, counted = _skip(text, text.index("[") + 1), 0
    expected = "an object or ']'"
    while True:
        number += text.count("\n", counted, at)
        counted = at
        place = f"{path}:{number}"
        if text[at : at + 1] == "]" and expected != "an object":
            if text[at + 1 :].strip():
                raise ValueError(f"{place}: invalid JSON (more text after the end of the list)")
            return
        if expected == "',' or ']'":
            if text[at : at + 1] != ",":
                raise ValueError(f"{place}: invalid JSON (expected {expected} after an object)")
            at, expected = _skip(text, at + 1), "an object"
            continue
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # JSON's own errors know their line, which may be below that on which the object begins.
            below = text.count("\n", at, getattr(error, "pos", at))
            raise ValueError(f"{path}:{number + below}: {why_invalid(error)}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{place}: expected an object, got {kind(value)}")
        yield Row(place, value, size * end / len(text))
        at, expected = _skip(text, end), "',' or ']'"


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # it matches nothing, too
    return match.end()


def _read_csv(path: Path, delimiter: str) -> Iterator[Row]:
    """The rows of a CSV file, every cell as the text that it is."""
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # 128 KiB by default
    number = 0
    with open(path, "rb") as file, _decompressed(path, file) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        cells = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(cells, [])
            twice = [name for i, name in enumerate(header) if name in header[:i]]
            if twice:
                raise ValueError(f"{path}: the column '{twice[0]}' stands twice in the header")
            for row in cells:
                if not row:  # a blank line
                    continue
                number += 1
                if len(row) != len(header):
                    raise ValueError(
                        f"{path} row {number}: {len(row)} cells under a header of {len(header)}"
                    )
                fields = dict(zip(header, row, strict=True))
                yield Row(f"{path} row {number}", fields, file.tell())
        except csv.Error as error:
            raise ValueError(f"{path} row {number + 1}: invalid CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 after row {number} ({error.reason})") from None
        except _DAMAGED as error:
            raise _damaged(f"{path}: after row {number}", error) from None


def _read_parquet(path: Path) -> Iterator[Row]:
    def tables() -> Iterator[tuple[datasets.Dataset, int]]:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                table = pa.Table.from_batches([batch], file.schema_arrow)
                yield datasets.Dataset(InMemoryTable(table)), file.metadata.num_rows

    size = path.stat().st_size
    rows = ((fields, size, n) for dataset, n in tables() for fields in _decoded(dataset))
    return _from_arrow(str(path), rows)


def _from_arrow(name: str, rows: Iterable[tuple[dict[str, Any], int, int]]) -> Iterator[Row]:
    """Rows with their places, from fields, the size of the source and its number of rows."""
    number = 0
    try:
        for number, (fields, size, total) in enumerate(rows, 1):
            yield Row(f"{name} row {number}", fields, size * number / total)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the data's
        raise ValueError(
            f"{name}: damaged, or of another kind, after row {number} ({_first_line(error)})"
        ) from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": lambda path: _read_csv(path, ","),
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".parquet": _read_parquet,
}


def _kind(path: Path) -> str:
    """The ending that says how a file is read, without that of its compression; or nothing."""
    name = path.name.lower()
    inner, ending = Path(name).stem, Path(name).suffix
    if ending in _COMPRESSED:
        ending = Path(inner).suffix
        return ending if ending in _READERS and ending != ".parquet" else ""
    return ending if ending in _READERS else ""


def _of_files(name: str, paths: list[Path]) -> Source:
    for path in paths:
        if not _kind(path):
            raise ValueError(
                f"{path}: cannot read a file of this kind, expected one of {', '.join(_READERS)} "
                f"(text may be compressed: {', '.join(_COMPRESSED)})"
            )
    sizes = [path.stat().st_size for path in paths]

    def rows() -> Iterator[Row]:
        before = 0
        for path, size in zip(paths, sizes, strict=True):
            for row in _READERS[_kind(path)](path):
                yield row._replace(position=before + row.position)
            before += size

    return Source(name, _digest(paths), sum(sizes), "B", rows)


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        part = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                part.update(block)
        digest.update(f"{path}:{part.hexdigest()}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _decompressed(path: Path, file: IO[bytes]) -> IO[bytes]:
    decompress = _COMPRESSED.get(path.suffix.lower())
    return decompress(file) if decompress else file


_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError)


def _damaged(place: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:
        return error  # the disk's, not the data's
    return ValueError(f"{place}: the compressed data are damaged or cut off ({error})")


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a file, without a byte order mark."""
    for number in itertools.count(1):
        try:
            line = stream.readline()
        except _DAMAGED as error:
            raise _damaged(f"{path}:{number}", error) from None
        if not line:
            return
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _utf8(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason})") from None


# ------------------------------------------------------------------------------- folders and the hub


def _files_of_folder(path: Path, split: str, config: str | None) -> list[Path]:
    """The files of a folder's split, sorted into splits by their names as ``datasets`` does."""
    whole = path.resolve()
    if glob.has_magic(str(whole)):
        raise ValueError(f"{path}: datasets takes '*', '?' and '[' in a folder's path for patterns")
    try:
        builder = datasets.load_dataset_builder(str(whole), config)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: no folder of data ({_first_line(error)})") from None
    files = {
        str(name): [Path(f) for f in of] for name, of in (builder.config.data_files or {}).items()
    }
    if split not in files:
        raise ValueError(f"{path}: no split '{split}', expected one of {sorted(files)}")
    card = whole / "README.md"
    if not (card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace")):
        # Without a card that says so, datasets passes over what its name or kind puts in no split.
        known = {file for of in files.values() for file in of} | {whole / "dataset_infos.json"}
        left = sorted(file for file in whole.rglob("[!.]*") if _kind(file) and file not in known)
        if left:
            raise ValueError(
                f"{path}: '{left[0].relative_to(whole)}' is in none of its splits {sorted(files)}: name files by "
                "split and keep one kind of file in a folder, or give one file"
            )
    return [path / file.relative_to(whole) for file in files[split]]


def _saved(path: Path, split: str) -> Source:
    """A data set that ``save_to_disk`` wrote, alone or with other splits."""
    try:
        loaded = datasets.load_from_disk(str(path))
    except (ValueError, OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path}: a damaged data set ({_first_line(error)})") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{path}: no split '{split}', expected one of {sorted(loaded)}")
        path, loaded = path / split, loaded[split]
    files = sorted(file for file in path.iterdir() if file.is_file())
    return _of_dataset(str(path), loaded, _digest(files))


def _from_hub(name: str, split: str, config: str | None) -> Source:
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # those of hub, network, pyarrow and pandas have no common base
        raise ValueError(
            f"'{name}' is no file or folder here, and no data set that could be loaded from the "
            f"Hugging Face hub: {_first_line(error)}"
        ) from error
    return _of_dataset(f"{name}[{split}]", loaded, loaded._fingerprint)


def _of_dataset(name: str, loaded: datasets.Dataset, digest: str) -> Source:
    def rows() -> Iterator[Row]:
        size = len(loaded)
        return _from_arrow(name, ((fields, size, size) for fields in _decoded(loaded)))

    return Source(name, digest, len(loaded), "rows", rows)


def _decoded(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    features = dataset.features  # a deep copy at every look
    for fields in dataset:
        yield {key: without_filling(value, features[key]) for key, value in fields.items()}


def without_filling(value: Any, feature: Any) -> Any:
    """A value without the nulls that stand in Arrow where an object did not have another's key.

    Args:
        value: what a row of a ``datasets.Dataset`` holds in one column.
        feature: the column's feature, which says which objects have keys in common; those of
            ``Json()`` have not, and keep their nulls.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        return {
            key: without_filling(item, feature[key])
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_filling(item, inner) for item in value]
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
