"""Writing pairs to a file: whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

ENDINGS = (".jsonl", ".parquet")
_BATCH = 1000
"""Rows that are written together to a Parquet file."""


def schema(*, chat: bool, edit: bool) -> pa.Schema:
    """The columns of pairs of texts or of messages, with or without an edit."""
    side = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns = [(name, side if chat else pa.string()) for name in ("prompt", "chosen", "rejected")]
    columns.append(("source", pa.string()))
    if edit:
        parts = [("start", pa.int64()), ("right", pa.string()), ("wrong", pa.string())]
        columns.append(("edit", pa.struct(parts)))
    return pa.schema(columns)


def check_target(out: Path, *, force: bool) -> None:
    """Refuse a file that is there, unless `force`, or that cannot be.

    Raises:
        ValueError: with a message for the user.
    """
    if out.suffix.lower() not in ENDINGS:
        raise ValueError(f"--out is {str(out)!r}, expected a name that ends with {ENDINGS}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {str(out)!r}: there is no such folder")
    if out.is_dir() or (out.exists() and not force):
        how = "" if out.is_dir() else ": --force replaces it"
        raise ValueError(f"--out is {str(out)!r}, which is there already{how}")


def write(pairs: Iterable[dict[str, Any]], out: Path, columns: pa.Schema, *, force: bool) -> None:
    """Write pairs as JSON Lines or Parquet, by the name's ending.

    They go to a file beside it, which gets the name when all is written and is removed otherwise.

    Raises:
        ValueError: see :func:`check_target`; and whatever `pairs` raises.
        OSError: the file cannot be written.
    """
    check_target(out, force=force)
    with _beside(out) as file:
        if out.suffix.lower() == ".parquet":
            rows = iter(pairs)
            with pq.ParquetWriter(file, columns) as writer:
                while batch := list(islice(rows, _BATCH)):
                    writer.write_table(pa.Table.from_pylist(batch, columns))
        else:
            for pair in pairs:
                file.write(json.dumps(pair, ensure_ascii=False).encode() + b"\n")


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[IO[bytes]]:
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
