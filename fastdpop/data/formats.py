"""One row of any known format of preference data as a prompt with two completions.

The formats: TRL's (text or messages, the prompt given or implicit), UltraFeedback-binarized, Orca,
Alpaca, HH-RLHF and ShareGPT. What has a meaning is used or refused by name; the names of all other
fields are returned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastdpop.data.extras import with_extras
from fastdpop.data.json_text import DECODER, check_text, kind
from fastdpop.data.messages import Message, assistant, check_pair, messages_from, user

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "system",
    "history",
    "tools",
    "chat_template_kwargs",
    "conversations",
    "instruction",
    "input",
    "question",
)
"""The names of fields that are read."""

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Pair(NamedTuple):
    """A converted row.

    Attributes:
        fields: ``prompt``, ``chosen`` and ``rejected``: three strings, or three lists of messages.
            With messages also ``tools`` (JSON text or None) and ``chat_template_kwargs`` (a dict).
        format: the name of the format that the row had.
        unused: the names of the row's fields that had no use.
    """

    fields: dict[str, Any]
    format: str
    unused: tuple[str, ...]


class _Draft(NamedTuple):
    """A recognised row: either side text or messages, and the fields that they came from."""

    format: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    used: tuple[str, ...] = ()


def convert(
    row: Mapping[str, Any], *, columns: Mapping[str, str] | None = None, chat: bool = False
) -> Pair:
    """Recognise a row's format and convert the row.

    Args:
        row: a row's fields. JSON text of a list of messages counts as that list.
        columns: which of the row's fields to take for one of :data:`FIELDS`.
        chat: make messages of a text pair: the prompt the user's, the completions the assistant's.

    Raises:
        ValueError: the row is of no known format, or not well-formed; the message names the field,
            what was found and what was expected.
    """
    columns = columns or {}
    fields = _mapped(row, columns)
    for name, value in fields.items():
        check_text(value, name)
    for name in _MEDIA:
        if not _is_blank(fields.get(name)):
            raise ValueError(
                f"field '{name}' is not empty, but only text can be trained on: leave such rows out"
            )
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise ValueError(_why_no_pair(fields, name))
    draft = _recognised({name: _cell(name, value) for name, value in fields.items()}, chat)
    pair = _finished(draft, fields, chat)
    used = {"chosen", "rejected", "system", "history", "tools", "chat_template_kwargs"}
    used |= {*draft.used, *(name for name in _MEDIA if name in fields)}
    unused = [name for name in fields if name not in used]
    # What stood in the place of a field that `columns` puts there has gone from `fields`.
    unused += [name for name in columns if name in row and name not in columns.values()]
    return Pair(pair, draft.format, tuple(unused))


def _mapped(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for name, source in columns.items():
        if name not in FIELDS:
            raise ValueError(f"columns gives a field '{name}', expected one of {list(FIELDS)}")
        if source not in row:
            raise ValueError(
                f"columns takes '{name}' from '{source}', which is missing (fields here: {sorted(row)})"
            )
    taken = set(columns.values())
    rest = {name: value for name, value in row.items() if name not in taken}
    return rest | {name: row[source] for name, source in columns.items()}


def _is_blank(value: object) -> bool:
    """Whether a value is nothing in any of the ways that JSON, Arrow and CSV have for it."""
    if isinstance(value, list):
        return all(map(_is_blank, value))
    return value in (None, "", {}, "[]", "{}")


def _why_no_pair(fields: Mapping[str, Any], name: str) -> str:
    missing = f"field '{name}' is missing (fields here: {sorted(fields)})"
    if "chosen" in fields or "rejected" in fields:
        return missing
    if "kto_tag" in fields or {"completion", "label"} <= set(fields):
        return f"{missing}: these are single completions with a label, and a pair is needed"
    if "messages" in fields or "conversations" in fields:
        return f"{missing}: this is a single conversation, and a pair of completions is needed"
    return missing


# ------------------------------------------------------------------------------------------- JSON text

_LIST_OF_MESSAGES = re.compile(
    r"""\s*\[\s*\{\s*(["'])(?:role|content|from|value|tool_calls)\1\s*:"""
)
_OBJECT_OF_SHAREGPT = re.compile(r'\s*\{\s*"(?:from|value)"\s*:')


def _cell(name: str, value: Any) -> Any:
    """The messages that a cell of a table holds as JSON text, or the value as it is."""
    if not isinstance(value, str):
        return value
    if name in ("prompt", "chosen", "rejected", "conversations"):
        if match := _LIST_OF_MESSAGES.match(value):
            return _parsed(name, value, python=match.group(1) == "'")
        if _OBJECT_OF_SHAREGPT.match(value):
            try:
                parsed = DECODER.decode(value)
            except (ValueError, RecursionError):
                return value  # text that begins like that
            return (
                parsed if isinstance(parsed, dict) and {"from", "value"} <= set(parsed) else value
            )
    return value


def _parsed(name: str, value: str, *, python: bool) -> Any:
    try:
        parsed = DECODER.decode(value)
    except (ValueError, RecursionError):
        why = "a list as Python prints it" if python else "not valid JSON"
        raise ValueError(
            f"field '{name}' looks like a list of messages, but is {why}: write it as JSON: {value!r:.80}"
        ) from None
    check_text(parsed, name)
    return parsed


# ----------------------------------------------------------------------------------------- recognition


def _recognised(fields: Mapping[str, Any], chat: bool) -> _Draft:
    sides = fields["chosen"], fields["rejected"]
    for name in ("chosen", "rejected"):
        if not isinstance(fields[name], (str, list, dict)):
            raise ValueError(
                f"field '{name}' is {kind(fields[name])}, expected a string or a list of chat messages"
            )
    if "prompt" in fields:
        return _explicit(fields)
    if "conversations" in fields:
        prompt = messages_from(fields["conversations"], "conversations")
        completions = _completions(prompt, fields)
        return _Draft("ShareGPT", prompt, *completions, used=("conversations",))
    if all(isinstance(side, str) and _TRANSCRIPT.match(side) for side in sides):
        return _transcripts(*sides, chat)
    if not all(isinstance(side, str) for side in sides):
        return _implicit_messages(fields)
    if "instruction" in fields:
        asked = _string(fields, "instruction")
        if not _is_blank(fields.get("input")):
            asked += "\n" + _string(fields, "input")
        return _Draft("Alpaca", [user(asked)], *sides, used=("instruction", "input"))
    for name in ("question", "input"):
        if name in fields:
            return _Draft("Orca", [user(_string(fields, name))], *sides, used=(name,))
    return _implicit_text(*sides, chat)


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"field '{name}' is {kind(value)}, expected a string")
    if not value:
        raise ValueError(f"field '{name}' is empty")
    return value


def _explicit(fields: Mapping[str, Any]) -> _Draft:
    used = ("prompt",)
    if isinstance(fields["prompt"], (list, dict)):
        prompt = messages_from(fields["prompt"], "prompt")
        return _Draft("chat messages", prompt, *_completions(prompt, fields), used=used)
    if not isinstance(fields["prompt"], str):
        raise ValueError(
            f"field 'prompt' is {kind(fields['prompt'])}, expected a string or a list of chat messages"
        )
    text = _string(fields, "prompt")
    sides = fields["chosen"], fields["rejected"]
    if all(isinstance(side, str) for side in sides):
        return _Draft("text", text, *sides, used=used)
    chosen, rejected = _both_messages(fields)
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return _Draft("chat messages", [user(text)], chosen, rejected, used=used)
    draft = _implicit_messages(fields)
    shared = chosen[: len(draft.prompt)]
    asked = [message["content"].strip() for message in shared if message["role"] == "user"]
    if text.strip() not in asked:
        raise ValueError(
            f"field 'prompt' is none of the user's messages that 'chosen' and 'rejected' share: {text!r:.80}"
        )
    return draft._replace(format="UltraFeedback", used=used)


def _completions(
    prompt: list[Message], fields: Mapping[str, Any]
) -> tuple[list[Message], list[Message]]:
    """The completions as messages, without the prompt where both repeat it."""
    chosen, rejected = (
        [assistant(fields[name])]
        if isinstance(fields[name], str)
        else messages_from(fields[name], name)
        for name in ("chosen", "rejected")
    )
    n = len(prompt)
    if n and chosen[:n] == rejected[:n] == prompt:
        return chosen[n:], rejected[n:]
    return chosen, rejected


def _both_messages(fields: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    chosen, rejected = fields["chosen"], fields["rejected"]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(
            f"field 'chosen' is {kind(chosen)} and field 'rejected' is {kind(rejected)}, expected both "
            "to be strings or both to be lists of chat messages"
        )
    for name in ("chosen", "rejected"):
        if not fields[name]:
            raise ValueError(f"field '{name}' is empty, expected an assistant message")
    return messages_from(chosen, "chosen"), messages_from(rejected, "rejected")


def _implicit_messages(fields: Mapping[str, Any]) -> _Draft:
    chosen, rejected = _both_messages(fields)
    if chosen[0] != rejected[0]:
        raise ValueError(
            "'chosen' and 'rejected' share no messages at the beginning to take for the prompt (fields "
            f"here: {sorted(fields)})"
        )
    return _split("implicit prompt, messages", chosen, rejected)


def _implicit_text(chosen: str, rejected: str, chat: bool) -> _Draft:
    if not chosen or chosen[:1] != rejected[:1]:
        raise ValueError(
            "field 'prompt' is missing, and 'chosen' and 'rejected' share no beginning to take for it"
        )
    if chat:
        raise ValueError(
            "field 'prompt' is missing: what 'chosen' and 'rejected' share cannot be told to be the user's "
            "text, so no messages can be made of them"
        )
    return _split("implicit prompt, text", chosen, rejected)


def _split(name: str, chosen: Any, rejected: Any) -> _Draft:
    from trl.data_utils import extract_prompt  # takes seconds, and most formats do without

    shared: dict[str, Any] = extract_prompt({"chosen": chosen, "rejected": rejected})
    return _Draft(name, shared["prompt"], shared["chosen"], shared["rejected"])


# -------------------------------------------------------------------------------------------- HH-RLHF

_TRANSCRIPT = re.compile(r"\n\nHuman:.*\n\nAssistant:", re.DOTALL)
_TURN = re.compile(r"\n\n(Human|Assistant):((?:(?!\n\n(?:Human|Assistant):).)*)", re.DOTALL)


def _transcripts(chosen: str, rejected: str, chat: bool) -> _Draft:
    """HH-RLHF: conversations as text, with all turns in common but the last."""
    ours, theirs = list(_TURN.finditer(chosen)), list(_TURN.finditer(rejected))
    for name, turns in (("chosen", ours), ("rejected", theirs)):
        if turns[-1].group(1) != "Assistant":
            raise ValueError(f"field '{name}': the conversation ends with a turn of 'Human'")
    at = 0
    while at < min(len(ours), len(theirs)) - 1 and ours[at].group() == theirs[at].group():
        at += 1
    if not ours[at].group(1) == theirs[at].group(1) == "Assistant":
        raise ValueError(
            f"'chosen' and 'rejected' differ in turn {at + 1}, which is not the assistant's in both: "
            "they do not answer one prompt"
        )
    if chat:
        return _Draft("HH-RLHF", _turns(ours[:at]), _turns(ours[at:]), _turns(theirs[at:]))
    if at + 1 < max(len(ours), len(theirs)):
        raise ValueError(
            f"'chosen' and 'rejected' differ from turn {at + 1} on, before their last answers: make "
            "messages of them with chat=True, so that these are known to be turns"
        )
    start = ours[at].start(2)
    return _Draft("HH-RLHF", chosen[:start], chosen[start:], rejected[start:])


def _turns(turns: list[re.Match[str]]) -> list[Message]:
    messages = []
    for turn in turns:
        text = turn.group(2).removeprefix(" ")  # the space is the mark's
        messages.append(user(text) if turn.group(1) == "Human" else assistant(text))
    return messages


# ------------------------------------------------------------------------------------------- finishing


def _finished(draft: _Draft, fields: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """The pair as text or as messages, with what stands beside it."""
    prompt, chosen, rejected = draft.prompt, draft.chosen, draft.rejected
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("field 'prompt' is empty")
        if not chat:
            for name in ("system", "history", "tools", "chat_template_kwargs"):
                if not _is_blank(fields.get(name)):
                    raise ValueError(
                        f"field '{name}' has no place in a text prompt: make messages of the pair with "
                        "chat=True, or leave the field out"
                    )
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        prompt = [user(prompt)]
    sides = [[assistant(side)] if isinstance(side, str) else side for side in (chosen, rejected)]
    extended, beside = with_extras(prompt, fields)
    check_pair(extended, *sides)
    return {"prompt": extended, "chosen": sides[0], "rejected": sides[1], **beside}
