"""JSON as people mean it: a key twice in one object is refused, not resolved in silence."""

from __future__ import annotations

import json
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key '{key}' stands twice in one object: {dict(pairs)!r:.80}")
        fields[key] = value
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
