"""JSON as people mean it: a key twice in one object is refused, not resolved in silence."""

from __future__ import annotations

import datetime
import json
from typing import Any


def kind(value: object) -> str:
    """What a value is, in JSON's words, for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        datetime.datetime: "a date",
    }
    return "null" if value is None else names.get(type(value), f"a value of {type(value)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key '{twice}' stands twice in one object")
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""Decodes JSON; raises ValueError for a key twice in one object, at any depth."""


def why_invalid(error: ValueError | RecursionError) -> str:
    """What :data:`DECODER` found wrong, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON at column {error.colno} ({error.msg})"
    if isinstance(error, RecursionError):
        return "invalid JSON (nested too deeply)"
    return str(error)


def check_text(value: Any, name: str) -> None:
    """Raise ValueError, which begins with the field, for half a surrogate pair anywhere in a value.

    JSON can escape what is no character (``"\\ud83d"`` alone); no tokenizer takes it.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"field '{name}' has half a surrogate pair, {value[error.start]!r}, at character "
                    f"{error.start + 1}"
                ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, name)
            check_text(item, name)
    elif isinstance(value, list):
        for item in value:
            check_text(item, name)
