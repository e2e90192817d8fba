"""Loading preference pairs into a ``datasets.Dataset`` that is kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets.arrow_writer import ArrowWriter
from datasets.table import MemoryMappedTable
from tqdm import tqdm

import fastdpop
from fastdpop.data.formats import Pair, convert
from fastdpop.data.read import Row, Source, open_source, without_filling

_TEXT = datasets.Features(
    {name: datasets.Value("string") for name in ("prompt", "chosen", "rejected", "place")}
)
_MESSAGES = datasets.Features(
    {name: datasets.List(datasets.Json()) for name in ("prompt", "chosen", "rejected")}
    | {"tools": datasets.Value("string"), "chat_template_kwargs": datasets.Json()}
    | {"place": datasets.Value("string")}
)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs, and what was seen in reading them.

    Attributes:
        dataset: the columns ``prompt``, ``chosen`` and ``rejected``, all strings or all lists of
            chat messages; with messages also ``tools`` (JSON text or None) and
            ``chat_template_kwargs`` (a dict); ``place`` says where each came from. Its fingerprint
            is that of the source's name and contents, the arguments, and this package's code.
        format: the name of the format that the rows had; of several, joined by ``", "``.
        unused: the names of fields that had no use, sorted.
        equal: how many pairs have the same text as chosen and rejected; they teach nothing.
    """

    dataset: datasets.Dataset
    format: str
    unused: tuple[str, ...]
    equal: int


def load_pairs(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    split: str = "train",
    config: str | None = None,
    progress: bool = True,
) -> Pairs:
    """Read, check and convert preference pairs.

    The result is kept under the cache of ``datasets`` (``HF_DATASETS_CACHE``) by its source's
    contents and these arguments, and taken from there the next time. Of several processes, the
    first converts and the others take what it wrote; all raise the same error. (There, make the
    training arguments before: whoever is first to connect the processes settles their device.)

    Args:
        source: a file (JSON Lines, a JSON array, CSV or TSV, which may be compressed by gzip, bzip2
            or xz; Parquet), a folder of such files, a folder of ``Dataset.save_to_disk``, or the
            name of a data set on the Hugging Face hub.
        columns: which of a row's fields to take for one that is read, such as
            ``{"prompt": "question"}``.
        chat: make messages of text pairs: the prompt the user's, completions the assistant's.
        split: which split of a folder or a data set.
        config: which configuration of a folder or a data set.
        progress: show a progress bar (of the first process, if there are several).

    Raises:
        ValueError: a row is malformed or of another kind than the first, or there is none; the
            message begins with file and line (or row) and names the field.
        OSError: a file cannot be read or written.
    """
    result: Pairs | Exception
    with _first_process_first() as is_first:
        # An error must not keep the first process from the barrier at which others wait.
        try:
            opened = open_source(source, split=split, config=config)
            result = _loaded(opened, dict(columns or {}), chat, progress and is_first)
        except (ValueError, OSError) as error:
            result = error
    if isinstance(result, Exception):
        raise result
    return result


def convert_row(
    row: Mapping[str, Any],
    index: int,
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    features: datasets.Features | None = None,
) -> dict[str, Any]:
    """Check and convert one row of a stream, as :func:`load_pairs` does those of a file.

    For ``IterableDataset.map`` with ``with_indices=True`` and with ``remove_columns`` of all of the
    stream's columns.

    Args:
        row: the row.
        index: its number, from 0.
        source: the stream's name for messages and for ``place``.
        columns: as for :func:`load_pairs`.
        chat: as for :func:`load_pairs`.
        features: the stream's, if known: tells nulls that Arrow filled in from those of the data.

    Returns:
        The columns of :attr:`Pairs.dataset`.

    Raises:
        ValueError: the row is malformed.
    """
    fields = {k: without_filling(v, features[k] if features else None) for k, v in row.items()}
    place = f"{source} row {index + 1}"
    return {**_converted(Row(place, fields, 0), columns, chat).fields, "place": place}


def _converted(row: Row, columns: Mapping[str, str] | None, chat: bool) -> Pair:
    try:
        return convert(row.fields, columns=columns, chat=chat)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from None


@contextlib.contextmanager
def _first_process_first() -> Iterator[bool]:
    """Let the first process of all, then the first of each machine, go before the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # PartialState would settle the device here, before the options that choose it.
        yield True
        return
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    with state.main_process_first(), state.local_main_process_first():
        yield bool(state.is_main_process)


# ---------------------------------------------------------------------------------------- the disk's copy


def _loaded(source: Source, columns: dict[str, str], chat: bool, progress: bool) -> Pairs:
    key = _key(source, columns, chat)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "fastdpop" / key
    if not (folder / "seen.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        written = folder.with_name(f"{key}-{uuid.uuid4().hex}")
        try:
            written.mkdir()
            _write(written, source, columns, chat, progress)
            with contextlib.suppress(OSError):  # another process was faster
                written.rename(folder)
        finally:
            shutil.rmtree(written, ignore_errors=True)
    seen = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    table = MemoryMappedTable.from_file(str(folder / "pairs.arrow"))
    dataset = datasets.Dataset(table, fingerprint=key)
    return Pairs(dataset, seen["format"], tuple(seen["unused"]), seen["equal"])


def _key(source: Source, columns: dict[str, str], chat: bool) -> str:
    """A name for what conversion makes: of the data, the arguments, and the code that converts."""
    digest = hashlib.sha256(f"{fastdpop.__version__} {source.name} {source.digest}".encode())
    digest.update(json.dumps([columns, chat], sort_keys=True).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _write(
    folder: Path, source: Source, columns: dict[str, str], chat: bool, progress: bool
) -> None:
    rows = source.rows()
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source.name}: no pairs in this file")
    is_text = isinstance(_converted(first, columns, chat).fields["prompt"], str)
    formats: set[str] = set()
    unused: set[str] = set()
    equal = 0
    bar = tqdm(
        total=source.total,
        unit=source.unit,
        unit_scale=True,
        desc=f"Reading {source.name}",
        disable=not progress,
    )
    writer = ArrowWriter(features=_TEXT if is_text else _MESSAGES, path=str(folder / "pairs.arrow"))
    with bar, writer:
        for row in chain([first], rows):
            pair = _converted(row, columns, chat)
            if isinstance(pair.fields["prompt"], str) != is_text:
                kinds = ("text", "messages") if is_text else ("messages", "text")
                raise ValueError(
                    f"{row.place}: this pair is {kinds[1]}, while that at {first.place} is {kinds[0]}: "
                    "all of a source must be one kind (chat=True makes messages of text)"
                )
            writer.write({**_stored(pair.fields, row.place), "place": row.place})
            formats.add(pair.format)
            unused.update(pair.unused)
            equal += pair.fields["chosen"] == pair.fields["rejected"]
            bar.update(row.position - bar.n)
        bar.update(source.total - bar.n)
        writer.finalize()
    seen = {"format": ", ".join(sorted(formats)), "unused": sorted(unused), "equal": equal}
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


def _stored(fields: dict[str, Any], place: str) -> dict[str, Any]:
    """A pair as Arrow holds it: messages as JSON text of our own, since that of ``Json()`` rounds."""
    if isinstance(fields["prompt"], str):
        return fields
    stored = {
        name: [_json(message, name, place) for message in fields[name]]
        for name in ("prompt", "chosen", "rejected")
    }
    kwargs = _json(fields["chat_template_kwargs"], "chat_template_kwargs", place)
    return {**stored, "tools": fields["tools"], "chat_template_kwargs": kwargs}


def _json(value: dict[str, Any], name: str, place: str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if not all(isinstance(item, str) for item in value.values()):
        # What reads it back rounds some numbers (0.3 becomes 0.30000000000000004).
        try:
            same = datasets.Json().decode_example(text) == value
        except ValueError:  # too large, too deep, or NaN
            same = False
        if not same:
            raise ValueError(
                f"{place}: field '{name}' holds a number that datasets does not read back as it is written; "
                f"give it (or a call's arguments) as a string: {text:.200}"
            )
    return text
