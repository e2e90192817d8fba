"""Loading preference pairs into a ``datasets.Dataset`` that is kept on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, Json, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

import fastdpop
from fastdpop.data.formats import FIELDS, Pair, convert, offered
from fastdpop.data.read import Row, Source, open_source

_SIDES = ("prompt", "chosen", "rejected")
_TEXT = Features({name: Value("string") for name in (*_SIDES, "place")})
_MESSAGES = Features(
    {name: List(Json()) for name in _SIDES}
    | {"tools": Value("string"), "chat_template_kwargs": Json(), "place": Value("string")}
)
_SEEN = Features(
    {name: Value("string") for name in ("format", "unused", "offered")} | {"equal": Value("bool")}
)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs, and what was seen in reading them.

    Attributes:
        dataset: the columns ``prompt``, ``chosen`` and ``rejected``, all strings or all lists of
            chat messages; with messages also ``tools`` (JSON text or None) and
            ``chat_template_kwargs`` (a dict); ``place`` says where each came from. What `values`
            named are float64.
        format: the name of the format that the rows had; of several, joined by ``", "``.
        unused: the names of fields that had no use, sorted.
        offered: the names of those fields that every row has a number in, to be named in `values`;
            of :data:`fastdpop.data.formats.PAIR_VALUES`, in that order.
        equal: how many pairs have the same text as chosen and rejected; they teach nothing.
    """

    dataset: datasets.Dataset
    format: str
    unused: tuple[str, ...]
    offered: tuple[str, ...]
    equal: int


def load_pairs(
    source: str | Path | datasets.Dataset,
    *,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    split: str = "train",
    config: str | None = None,
    values: Sequence[str] = (),
    progress: bool = True,
) -> Pairs:
    """Read, check and convert preference pairs.

    The result is kept in the cache of ``datasets`` by its source's contents and these arguments,
    and taken from there the next time. Of several processes, one converts and the others wait.

    Args:
        source: a file (JSON Lines, a JSON array, CSV or TSV, which may be compressed by gzip;
            Parquet), a folder of such files, a folder of ``Dataset.save_to_disk``, the name of a
            data set on the Hugging Face hub, or a ``datasets.Dataset``. What exists here is taken
            from here.
        columns: which of a row's fields to take for one that is read, such as
            ``{"prompt": "question"}``, or ``{"weight": "quality"}`` for one of `values`.
        chat: make messages of text pairs: the prompt the user's, completions the assistant's.
        split: which split of a folder or a data set that is named.
        config: which configuration of it.
        values: fields that every row has a number in, to go to the loss with the pair.
        progress: show a progress bar.

    Raises:
        ValueError: a row is malformed or of another kind than the first, or there is none; the
            message begins with file and line (or row) and names the field.
        OSError: a file cannot be read or written.
    """
    columns = dict(columns or {})
    for name in values:
        if name in (*FIELDS, *_SEEN, "place"):
            raise ValueError(f"values contains '{name}', which stands for something else in a row")
    convert_row = partial(_converted, columns=columns, chat=chat, values=values)
    offer = partial(offered, columns=columns, values=values)
    with progress_bars(progress):
        opened = open_source(source, split=split, config=config)
        first = next(opened.rows(), None)
        if first is None:
            raise ValueError(f"{opened.name}: no pairs")
        is_text = isinstance(convert_row(first).fields["prompt"], str)
        numbers = Features({name: Value("float64") for name in values})
        features = {**(_TEXT if is_text else _MESSAGES), **numbers}
        code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
        parts = [fastdpop.__version__, code, opened.name, opened.digest, columns, chat, [*values]]
        try:
            dataset = datasets.Dataset.from_generator(
                lambda: _rows(opened, first.place, is_text, convert_row, offer),
                features=Features({**features, **_SEEN}),
                fingerprint=Hasher.hash(parts),
            )
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, (ValueError, OSError)):
                raise error.__cause__ from None
            raise
    unused = {name for names in dataset.unique("unused") for name in json.loads(names)}
    offers = [json.loads(names) for names in dataset.unique("offered")]
    return Pairs(
        dataset.select_columns([*features]),
        ", ".join(sorted(dataset.unique("format"))),
        tuple(sorted(unused)),
        tuple(name for name in offers[0] if all(name in names for names in offers)),
        sum(dataset["equal"]),
    )


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Without the bars of ``datasets``, unless they are to be shown and are not turned off."""
    hide = not (shown or datasets.are_progress_bars_disabled())
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _converted(row: Row, **options: Any) -> Pair:
    try:
        return convert(row.fields, untyped=row.untyped, **options)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from None


def _rows(
    source: Source,
    first: str,
    is_text: bool,
    convert_row: Callable[[Row], Pair],
    offer: Callable[..., tuple[str, ...]],
) -> Iterator[dict[str, Any]]:
    for row in source.rows():
        fields, form, unused = convert_row(row)
        if isinstance(fields["prompt"], str) != is_text:
            kinds = ("text", "messages") if is_text else ("messages", "text")
            raise ValueError(
                f"{row.place}: this pair is {kinds[1]}, while that at {first} is {kinds[0]}: "
                "all of a source must be one kind (--chat, chat=True, makes messages of text)"
            )
        if not is_text:
            _check_numbers(fields, row.place)
        equal = fields["chosen"] == fields["rejected"]
        offers = offer(row.fields, untyped=row.untyped)
        names = {"unused": json.dumps(unused), "offered": json.dumps(offers)}
        seen = {"format": form, **names, "equal": equal}
        yield {**fields, "place": row.place, **seen}


def _check_numbers(fields: Mapping[str, Any], place: str) -> None:
    """Refuse what ``Json()`` changes: it reads 0.3 as 0.30000000000000004, and NaN as null."""
    for name in (*_SIDES, "chat_template_kwargs"):
        try:
            same = Json().decode_example(Json().encode_example(fields[name])) == fields[name]
        except (ValueError, OverflowError):  # too large, or too deep
            same = False
        if not same:
            raise ValueError(
                f"{place}: field '{name}' holds a number that datasets does not read back as it is written: "
                f"{fields[name]!r:.200}"
            )
