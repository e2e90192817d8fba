"""HellaSwag (Zellers et al., "Can a Machine Really Finish Your Sentence?", arXiv:1905.07830)."""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastdpop.data.build.common import Choice, LeftOut, name_of, text_of, texts_of, without
from fastdpop.data.read import Row

TEXT = (".txt", ".txt.bz2")
"""How the names of files end in which a task is six lines."""
_LINES = 6
_HEADING = " [title]"
_MARK = re.compile(r"\[[^\]]*\]")


def read(fields: Mapping[str, Any]) -> Choice:
    """A beginning with its wrong endings, written as the lm-evaluation-harness does.

    Rows are those of the original files and of ``Rowan/hellaswag`` (``activity_label``, ``ctx_a``, ``ctx_b``,
    ``endings``, ``label``), or have ``ctx`` instead of its two parts.

    Raises:
        ValueError: the row is of no such form.
        LeftOut: an ending has nothing but marks.
    """
    activity = text_of(fields, "activity_label")
    if isinstance(fields.get("ctx_a"), str) and isinstance(fields.get("ctx_b"), str):
        context = f"{fields['ctx_a']} {fields['ctx_b'].capitalize()}"
    else:
        context = text_of(fields, "ctx")
    endings = [without_marks(text) for text in texts_of(fields.get("endings"), "field 'endings'")]
    label = str(fields.get("label"))
    expected = [str(i) for i in range(len(endings))]
    if label not in expected:
        raise ValueError(
            f"field 'label' is {fields.get('label')!r:.80}, expected a number from 0 to {expected[-1]} (the "
            "test split has none)"
        )
    if not all(endings):
        raise LeftOut("an ending that has nothing but marks such as [header]")
    prompt = without_marks(f"{activity}: {context}")
    return Choice(
        asked=prompt,
        prompt=prompt,
        right=endings[int(label)],
        origin=prompt,
        source=name_of(fields, "ind"),
        wrong=without(endings, int(label)),
    )


def without_marks(text: str) -> str:
    """A text without the marks of WikiHow's articles, such as [header] and [step]."""
    text = _MARK.sub("", text.strip().replace(_HEADING, ". "))
    return text.replace("  ", " ").strip()


def rows_of_text(path: Path) -> Iterator[Row]:
    """The tasks of a text file, six lines each: activity and beginning, label, four endings.

    Raises:
        ValueError: a task is not of six lines, or a line is no text.
        OSError: the file cannot be read.
    """
    number, lines = 0, list[str]()
    try:
        with bz2.open(path) if path.suffix.lower() == ".bz2" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if lines or text.strip():  # blank lines may stand between tasks
                    lines.append(text)
                if len(lines) == _LINES:
                    yield _row(f"{path}:{number - _LINES + 1}", lines)
                    lines = []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
    except (EOFError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's, not the data's
        raise ValueError(
            f"{path}:{number + 1}: the compressed data are damaged or cut off ({error})"
        ) from None
    if lines:
        yield _row(f"{path}:{number - len(lines) + 1}", lines)


def _row(place: str, lines: list[str]) -> Row:
    activity, colon, context = lines[0].partition(": ")
    if len(lines) < _LINES or not colon:
        raise ValueError(
            f"{place}: {lines[0]!r:.80} and {len(lines) - 1} more lines, expected 'activity: beginning', a "
            "label and four endings"
        )
    fields = {"activity_label": activity, "ctx": context, "endings": lines[2:], "label": lines[1]}
    return Row(place, fields)
