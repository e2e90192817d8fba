"""What stands beside a chat prompt: the system's message, earlier turns, tools, template options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastdpop.data.json_text import DECODER, check_text, kind, why_invalid
from fastdpop.data.messages import Message, assistant, user


def with_extras(
    prompt: list[Message], fields: Mapping[str, Any]
) -> tuple[list[Message], dict[str, Any]]:
    """A prompt with a row's ``history`` and ``system`` in front, and the fields beside it.

    Args:
        prompt: chat messages.
        fields: the row.

    Returns:
        The messages, and ``tools`` (JSON text or None) and ``chat_template_kwargs`` (a dict).

    Raises:
        ValueError: a field is malformed, or says otherwise than the prompt.
    """
    earlier = _history(fields.get("history"))
    if earlier and [message["role"] for message in prompt] != ["user"]:
        raise ValueError("field 'history' stands beside a prompt that has its own earlier turns")
    system = fields.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"field 'system' is {kind(system)}, expected a string")
    messages = [*earlier, *prompt]
    if system and messages[:1] and messages[0]["role"] == "system":
        if messages[0].get("content") != system:
            raise ValueError("field 'system' differs from the system message of the prompt")
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    tools = _tools(fields.get("tools"), wrap="conversations" in fields)
    kwargs = _parsed("chat_template_kwargs", fields.get("chat_template_kwargs")) or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"field 'chat_template_kwargs' is {kind(kwargs)}, expected an object")
    return messages, {"tools": tools, "chat_template_kwargs": kwargs}


def _parsed(name: str, value: Any) -> Any:
    if not isinstance(value, str) or not value:
        return value
    try:
        parsed = DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"field '{name}': {why_invalid(error)}: {value!r:.80}") from None
    check_text(parsed, name)
    return parsed


def _history(value: Any) -> list[Message]:
    turns = _parsed("history", value) or []
    messages = []
    for i, turn in enumerate(turns if isinstance(turns, list) else [turns], 1):
        if not (
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
        ):
            raise ValueError(
                f"field 'history': item {i} is {turn!r:.80}, expected a list of the user's text and the answer"
            )
        messages += [user(turn[0]), assistant(turn[1])]
    return messages


def _tools(value: Any, *, wrap: bool) -> str | None:
    tools = _parsed("tools", value)
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"field 'tools' is not a list of objects: {tools!r:.80}")
    if wrap:  # ShareGPT has the functions alone, templates expect them in objects with their type
        tools = [
            tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
        ]
    elif isinstance(value, str):
        return value
    return json.dumps(tools, ensure_ascii=False)
