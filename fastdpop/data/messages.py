"""Chat messages: those of every convention as ``{"role", "content"}``, checked."""

from __future__ import annotations

from typing import Any

from fastdpop.data.json_text import DECODER, kind, why_invalid

Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""Other names of roles: ShareGPT's, which also stand where templates expect their own."""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def messages_from(value: Any, field: str) -> list[Message]:
    """The messages of a field, with nulls left out and text parts joined.

    Args:
        value: a message or a list of messages, ``{"role", "content"}`` or ShareGPT's
            ``{"from", "value"}``. Further keys are kept.
        field: its name for messages.

    Raises:
        ValueError: it is not that; it begins with the field.
    """
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise ValueError(f"field '{field}' is {kind(value)}, expected a list of chat messages")
    return [_message(item, f"field '{field}': message {i}") for i, item in enumerate(items, 1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {kind(value)}, expected an object with 'role' and 'content'")
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, place)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{place} has no string 'role': {value!r:.80}")
    message["role"] = role = _ROLES.get(role, role)
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_object, calls))):
        raise ValueError(f"{place}: 'tool_calls' is not a list of objects: {calls!r:.80}")
    if "content" in message:
        message["content"] = _text(message["content"], place)
    elif role != "assistant" or not calls:
        raise ValueError(f"{place} has no string 'content': {value!r:.80}")
    return message


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _text(content: Any, place: str) -> str:
    """A message's text. Parts are joined: not every template of a text model knows of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{place}: 'content' is {kind(content)}, expected a string")
    for part in content:
        known = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        if known.keys() != {"type", "text"} or known["type"] != "text":
            raise ValueError(
                f"{place}: 'content' has a part that is not text, which a text model cannot be given: {part!r:.80}"
            )
        if not isinstance(part["text"], str):
            raise ValueError(f"{place}: 'text' is {kind(part['text'])}, expected a string")
    return "".join(part["text"] for part in content)


def _from_sharegpt(message: Message, place: str) -> Message:
    role, text = message.pop("from"), message.pop("value", None)
    if not isinstance(role, str) or not isinstance(text, str):
        raise ValueError(
            f"{place}: expected strings 'from' and 'value', got {kind(role)} and {kind(text)}"
        )
    if role == "function_call":
        return {"role": "assistant", "tool_calls": _calls(text, place), **message}
    return {"role": role, "content": text, **message}


def _calls(text: str, place: str) -> list[dict[str, Any]]:
    """ShareGPT's text of a function call (or of a list of them) as ``tool_calls``."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: a function call that is {why_invalid(error)}") from None
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(f"{place}: a function call without a string 'name': {call!r:.80}")
    return [{"type": "function", "function": call} for call in calls]


def check_pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> None:
    """Check that both completions answer the prompt.

    Raises:
        ValueError: the message names the field.
    """
    if not prompt:
        raise ValueError("field 'prompt' is empty")
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            "the prompt ends with an assistant message; the completion belongs in 'chosen' and 'rejected'"
        )
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages:
            raise ValueError(f"field '{field}' is empty, expected an assistant message")
        for end, message in (("begins", messages[0]), ("ends", messages[-1])):
            if message["role"] != "assistant":
                raise ValueError(
                    f"field '{field}': the completion {end} with a message of '{message['role']}', "
                    "expected one of 'assistant'"
                )
