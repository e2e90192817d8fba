"""Chat messages: those of every convention as ``{"role", "content"}``, checked."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's names of roles, which also stand where templates expect their own."""
_UNUSABLE = ("image", "images", "video", "videos", "audio", "audios", "function_call")
"""Keys of a message that have a meaning and no use; of others, the template decides."""
_FROM = (*_ROLES, "system", "user", "assistant", "tool")


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
        raise ValueError(f"field '{field}' is {value!r:.80}, expected a list of chat messages")
    return [_message(item, f"field '{field}': message {i}") for i, item in enumerate(items, 1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {value!r:.80}, expected an object with 'role' and 'content'")
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "role" not in message:
        if message["from"] not in _FROM:
            raise ValueError(f"{place}: 'from' is {message['from']!r:.80}, expected one of {_FROM}")
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    for key in _UNUSABLE:
        if message.get(key):
            use = "give 'tool_calls'" if key == "function_call" else "leave such rows out"
            raise ValueError(f"{place} has '{key}', which cannot be used in training: {use}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{place} has no string 'role': {value!r:.80}")
    message["role"] = role = _ROLES.get(role, role)
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{place}: 'tool_calls' is not a list of objects: {calls!r:.80}")
    if "content" in message:
        message["content"] = _text(message["content"], place)
    elif role != "assistant" or not calls:
        raise ValueError(f"{place} has no string 'content': {value!r:.80}")
    return message


def _text(content: Any, place: str) -> str:
    """A message's text. Parts are joined: not every template of a text model knows of parts."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        known = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        text = known.pop("text", None)
        if known != {"type": "text"} or not isinstance(text, str):
            raise ValueError(
                f"{place}: 'content' is not text, as a text model expects it, but {part!r:.80}"
            )
        texts.append(text)
    return "".join(texts)


def check_pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> None:
    """Check that both completions answer the prompt.

    Raises:
        ValueError: the message names the field.
    """
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            "the prompt ends with an assistant message; the completion belongs in 'chosen' and 'rejected'"
        )
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        roles = [message["role"] for message in messages]
        if {*roles[:1], *roles[-1:]} != {"assistant"}:
            raise ValueError(
                f"field '{field}' has messages of {roles}, expected the first and the last to be of "
                "'assistant'"
            )
