"""JSON as people mean it: a key twice in one object is refused, not resolved in silence."""

from __future__ import annotations

import json
import re
from typing import Any


def decode(text: str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: it is no JSON, or one of its objects has a key twice.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("invalid JSON (nested too deeply)") from None


def cell(text: str) -> Any:
    """What a cell of a CSV file holds: JSON of a list of objects, such as messages, or the text.

    Raises:
        ValueError: it looks like messages, and is no JSON.
    """
    if not _LIST_OF_OBJECTS.match(text):
        return text
    try:
        return decode(text)
    except ValueError as error:
        if not _MESSAGE.search(text):
            return text
        raise ValueError(
            f"a cell looks like a list of messages, but is not valid JSON ({error}): {text!r:.80}"
        ) from None


_LIST_OF_OBJECTS = re.compile(r"""\s*\[\s*\{\s*["']""")
_MESSAGE = re.compile(r"""["'](?:role|from)["']\s*:""")  # also as Python prints it


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key '{key}' stands twice in one object: {dict(pairs)!r:.80}")
        fields[key] = value
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
