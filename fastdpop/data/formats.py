"""One row of any known format of preference data as a prompt with two completions.

The formats: TRL's (text or messages, the prompt given or implicit), UltraFeedback-binarized, Orca,
Alpaca, HH-RLHF and ShareGPT. What has a meaning is used or refused by name; the names of all other
fields are returned.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from fastdpop.data.json_text import decode
from fastdpop.data.messages import Message, assistant, check_pair, messages_from, user
from fastdpop.names import near

_SIDES = ("prompt", "chosen", "rejected")
_BESIDE = ("system", "tools", "chat_template_kwargs")
FIELDS = (*_SIDES, *_BESIDE, "conversations", "instruction", "input", "question")
"""The names of fields that are read."""
_MAY_BE_THE_PROMPT = (
    *("query", "question", "instruction", "input", "messages", "conversation", "context", "user"),
    *("request", "problem", "post", "text", "user_input", "user_prompt"),
)
"""Names beside which what two answers share is not taken for the prompt."""
PAIR_VALUES = ("weight", "margin", "offset", "chosen_score", "rejected_score")
"""The names of numbers that a loss of the family may read with a pair; see :func:`fastdpop.fused_preference_loss`."""
_UNUSABLE = ("image", "images", "video", "videos", "audio", "audios", "history")
"""The names of fields that have a meaning and no use."""


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Pair(NamedTuple):
    """A converted row.

    Attributes:
        fields: ``prompt``, ``chosen`` and ``rejected``: three strings, or three lists of messages.
            With messages also ``tools`` (JSON text or None) and ``chat_template_kwargs`` (a dict).
            Under the names that `values` gave, floats.
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
    row: Mapping[str, Any],
    *,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
    values: Sequence[str] = (),
    untyped: bool = False,
) -> Pair:
    """Recognise a row's format and convert the row.

    Args:
        row: a row's fields.
        columns: which of the row's fields to take for one of :data:`FIELDS`, or of `values`.
        chat: make messages of a text pair: the prompt the user's, the completions the assistant's.
        values: fields that are numbers, to go to the loss with the pair.
        untyped: the row comes from where all is text, as in CSV, numbers too.

    Raises:
        ValueError: the row is of no known format, or not well-formed; the message names the field,
            what was found and what was expected.
    """
    columns = columns or {}
    mapped = _mapped(row, columns, values)
    for name in values:
        if name not in mapped:
            raise ValueError(_missing(name, row))
    numbers = {name: number(name, mapped, untyped) for name in values}
    fields = {name: _cell(name, value) for name, value in mapped.items() if name not in numbers}
    for name, value in fields.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:  # JSON can escape it, and no tokenizer takes it
            raise ValueError(
                f"field '{name}' has half a surrogate pair, {error.object[error.start]!r}"
            ) from None
    for name in _UNUSABLE:
        if not _is_blank(fields.get(name)):
            raise ValueError(
                f"field '{name}' is not empty, but cannot be used in training: leave such rows out"
            )
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise ValueError(_missing(name, fields))
        if not isinstance(fields[name], (str, list, dict)):
            raise ValueError(
                f"field '{name}' is {fields[name]!r:.80}, expected a string or a list of chat messages"
            )
    draft = _recognised(fields, chat)
    used = {"chosen", "rejected", *_BESIDE, *_UNUSABLE, *draft.used}
    unused = [name for name in fields if name not in used]
    # What stood in the place of a field that `columns` puts there has gone from `fields`.
    unused += [name for name in columns if name in row and name not in columns.values()]
    return Pair({**_finished(draft, fields, chat), **numbers}, draft.format, tuple(unused))


def _missing(name: str, fields: Mapping[str, Any]) -> str:
    """That a field is missing, and what may be the matter."""
    said = f"field '{name}' is missing (fields here: {sorted(fields)}"
    inner = next((key for key, value in fields.items() if _holds_rows(value)), None)
    if inner is not None:
        return f"{said}): pairs may be those of the list '{inner}'; expected that list by itself"
    only = next(iter(fields), "")
    separator = next((mark for mark in ";|\t" if len(fields) == 1 and mark in only), None)
    if separator is not None:
        return f"{said}): cells may be separated by {separator!r}, expected commas, or tabs in a file .tsv"
    like = near(name, fields)
    return f"{said}; --columns {name}={like[0] if like else '...'} says what it is called)"


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(v, dict) and "chosen" in v for v in value)


def offered(
    row: Mapping[str, Any], columns: Mapping[str, str], values: Sequence[str], untyped: bool
) -> tuple[str, ...]:
    """Which of :data:`PAIR_VALUES` `values` of :func:`convert` could name as well: those that are numbers."""
    taken = {*values, *columns.values()}
    return tuple(n for n in PAIR_VALUES if n not in taken and _is_number(n, row, untyped))


def number(name: str, fields: Mapping[str, Any], untyped: bool = False) -> float:
    """The number of a field; only if `untyped` it may be text.

    Raises:
        ValueError: it is missing, no finite number, or a negative weight.
    """
    if name not in fields:
        raise ValueError(f"field '{name}' is missing (fields here: {sorted(fields)})")
    value = fields[name]
    text = untyped and isinstance(value, str) and _NUMBER.fullmatch(value.strip())
    if text or (isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)):
        found = _float(value)
        if math.isfinite(found) and (found >= 0 or name != "weight"):
            return found
    expected = "a finite number" + (" >= 0" if name == "weight" else "")
    raise ValueError(f"field '{name}' is {value!r:.80}, expected {expected}")


def _is_number(name: str, fields: Mapping[str, Any], untyped: bool) -> bool:
    try:
        number(name, fields, untyped)
    except ValueError:
        return False
    return True


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _mapped(
    row: Mapping[str, Any], columns: Mapping[str, str], values: Sequence[str]
) -> dict[str, Any]:
    for name, source in columns.items():
        if name not in (*FIELDS, *values):
            hint = f" (--pair-values {name} gives it to the loss)" if name in PAIR_VALUES else ""
            raise ValueError(
                f"columns gives a field '{name}', expected one of {[*FIELDS, *values]}{hint}"
            )
        if source not in row:
            raise ValueError(
                f"columns takes '{name}' from '{source}', which is missing (fields here: {sorted(row)})"
            )
    taken = set(columns.values())
    rest = {name: value for name, value in row.items() if name not in taken}
    return rest | {name: row[source] for name, source in columns.items()}


def _cell(name: str, value: Any) -> Any:
    """The value of a field that may be JSON text, or any other field's as it is."""
    if name not in ("tools", "chat_template_kwargs") or not isinstance(value, str) or not value:
        return value
    try:
        return decode(value)
    except ValueError as error:
        raise ValueError(f"field '{name}' is not valid JSON ({error}): {value!r:.80}") from None


def _is_blank(value: object) -> bool:
    """Whether a value is nothing in any of the ways that JSON, Arrow and CSV have for it."""
    if isinstance(value, list):
        return all(map(_is_blank, value))
    return value in (None, "", {}, "[]", "{}") or value != value  # NaN


# ----------------------------------------------------------------------------------------- recognition


def _recognised(fields: Mapping[str, Any], chat: bool) -> _Draft:
    chosen, rejected = fields["chosen"], fields["rejected"]
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if "prompt" in fields:
        if isinstance(fields["prompt"], (list, dict)):
            return _messages("chat messages", "prompt", fields)
        text = _string(fields, "prompt")
        if texts:
            return _Draft("text", text, chosen, rejected, ("prompt",))
        return _with_text_prompt(text, *_both_messages(fields), fields)
    if "conversations" in fields:
        return _messages("ShareGPT", "conversations", fields)
    if texts and _TRANSCRIPT.match(chosen) and _TRANSCRIPT.match(rejected):
        return _transcripts(chosen, rejected, chat)
    if not texts:
        return _implicit("implicit prompt, messages", *_both_messages(fields), fields)
    if "instruction" in fields:
        asked = _string(fields, "instruction")
        if not _is_blank(fields.get("input")):
            asked += "\n" + _string(fields, "input")
        return _Draft("Alpaca", [user(asked)], chosen, rejected, ("instruction", "input"))
    for name in ("question", "input"):
        if name in fields:
            return _Draft("Orca", [user(_string(fields, name))], chosen, rejected, (name,))
    draft = _implicit("implicit prompt, text", chosen, rejected, fields)
    if chat:
        raise ValueError(
            "field 'prompt' is missing: what 'chosen' and 'rejected' share cannot be told to be the user's "
            "text, so no messages can be made of them"
        )
    return draft


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f"field '{name}' is {value!r:.80}, expected a text that is not empty")
    return value


def _messages(form: str, name: str, fields: Mapping[str, Any]) -> _Draft:
    """A prompt of messages; both completions may repeat it, and may be text."""
    prompt = messages_from(fields[name], name)
    chosen, rejected = (
        [assistant(fields[side])]
        if isinstance(fields[side], str)
        else messages_from(fields[side], side)
        for side in ("chosen", "rejected")
    )
    n = len(prompt)
    if chosen[:n] == rejected[:n] == prompt:
        chosen, rejected = chosen[n:], rejected[n:]
    return _Draft(form, prompt, chosen, rejected, (name,))


def _both_messages(fields: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    return messages_from(fields["chosen"], "chosen"), messages_from(fields["rejected"], "rejected")


def _with_text_prompt(
    text: str, chosen: list[Message], rejected: list[Message], fields: Mapping[str, Any]
) -> _Draft:
    if all(side and side[0]["role"] == "assistant" for side in (chosen, rejected)):
        return _Draft("chat messages", [user(text)], chosen, rejected, ("prompt",))
    draft = _implicit("UltraFeedback", chosen, rejected, fields)
    shared = chosen[: len(draft.prompt)]
    asked = [message["content"].strip() for message in shared if message["role"] == "user"]
    if text.strip() not in asked:
        raise ValueError(
            f"field 'prompt' is none of the user's messages that 'chosen' and 'rejected' share: {text!r:.80}"
        )
    return draft._replace(used=("prompt",))


def _implicit(form: str, chosen: Any, rejected: Any, fields: Mapping[str, Any]) -> _Draft:
    from trl.data_utils import extract_prompt  # takes seconds, and most formats do without

    beside = [name for name in _MAY_BE_THE_PROMPT if not _is_blank(fields.get(name))]
    if beside and "prompt" not in fields:
        raise ValueError(
            f"field 'prompt' is missing, and '{beside[0]}' may be what it is called here: call it 'prompt' "
            f"(--columns prompt={beside[0]}), or leave that field out"
        )
    if not chosen or chosen[:1] != rejected[:1]:
        raise ValueError(
            "field 'prompt' is missing, and 'chosen' and 'rejected' share no beginning to take for it (fields here: "
            f"{sorted(fields)})"
        )
    shared: dict[str, Any] = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not isinstance(chosen, str) and "user" not in {m["role"] for m in shared["prompt"]}:
        raise ValueError(
            "'chosen' and 'rejected' share no message of 'user' to take for the prompt"
        )
    return _Draft(form, shared["prompt"], shared["chosen"], shared["rejected"])


# -------------------------------------------------------------------------------------------- HH-RLHF

_ANSWER = "\n\nAssistant:"
_TRANSCRIPT = re.compile(r"\n\nHuman:.*\n\nAssistant:", re.DOTALL)
_TURN = re.compile(r"\n\n(Human|Assistant): ?((?:(?!\n\n(?:Human|Assistant):).)*)", re.DOTALL)


def _transcripts(chosen: str, rejected: str, chat: bool) -> _Draft:
    """HH-RLHF: conversations as text, with all turns in common but the last."""
    start = os.path.commonprefix([chosen, rejected]).rfind(_ANSWER)  # noqa: RUF071
    ours, theirs = _turns(chosen[start:]), _turns(rejected[start:])
    if start < 0 or (ours[0] == theirs[0] and min(len(ours), len(theirs)) > 1):
        raise ValueError("'chosen' and 'rejected' differ in a turn of 'Human'")
    for name, turns in (("chosen", ours), ("rejected", theirs)):
        if turns[-1]["role"] != "assistant":
            raise ValueError(f"field '{name}': the conversation ends with a turn of 'Human'")
    if chat:
        return _Draft("HH-RLHF", _turns(chosen[:start]), ours, theirs)
    if max(len(ours), len(theirs)) > 1:
        raise ValueError(
            "'chosen' and 'rejected' differ before their last answers: make messages of them with "
            "--chat (chat=True), so that these are known to be turns"
        )
    start += len(_ANSWER)
    return _Draft("HH-RLHF", chosen[:start], chosen[start:], rejected[start:])


def _turns(text: str) -> list[Message]:
    return [user(said) if who == "Human" else assistant(said) for who, said in _TURN.findall(text)]


def _finished(draft: _Draft, fields: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """The pair as text or as messages, with what stands beside it."""
    prompt, chosen, rejected = draft.prompt, draft.chosen, draft.rejected
    if not prompt:
        raise ValueError("field 'prompt' is empty")
    if isinstance(prompt, str):
        if not chat:
            for name in _BESIDE:
                if not _is_blank(fields.get(name)):
                    raise ValueError(
                        f"field '{name}' has no place in a text prompt: make messages of the pair with "
                        "--chat (chat=True), or leave the field out"
                    )
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        prompt = [user(prompt)]
    sides = [[assistant(side)] if isinstance(side, str) else side for side in (chosen, rejected)]
    check_pair(prompt, *sides)
    options = fields.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(f"field 'chat_template_kwargs' is {options!r:.80}, expected an object")
    return {
        "prompt": _with_system(prompt, fields.get("system")),
        "chosen": sides[0],
        "rejected": sides[1],
        "tools": _tools(fields),
        "chat_template_kwargs": options,
    }


def _with_system(prompt: list[Message], system: Any) -> list[Message]:
    if not system:
        return prompt
    if not isinstance(system, str):
        raise ValueError(f"field 'system' is {system!r:.80}, expected a string")
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise ValueError("field 'system' differs from the system message of the prompt")
    return prompt


def _tools(fields: Mapping[str, Any]) -> str | None:
    tools = fields.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"field 'tools' is not a list of objects: {tools!r:.80}")
    if "conversations" in fields:  # ShareGPT has the functions alone, without their type
        tools = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    return json.dumps(tools, ensure_ascii=False)
