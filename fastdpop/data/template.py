"""What a chat template makes of a conversation, and what of it the template leaves out."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from fastdpop.data.messages import Message, assistant, user

# Options of a rendering that are not the template's: two of them would cut or change the ids.
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
_RESERVED -= {"documents", "kwargs"}
_THINKING = ("reasoning_content", "reasoning", "thinking")
_SWITCHES = re.compile(r"/(?:no_)?think\b")  # some templates read these in a text and take them out
_ANYWHERE = ("system", "developer")  # a template may move these; all else it shows in order
_QUESTION, _ANSWER, _THANKS = "fastdpop-question", "fastdpop-answer", "fastdpop-thanks"


class Turn(NamedTuple):
    """What a template writes after an answer: the special token, and the next generation prompt."""

    end: str
    header: str


class Conversation(NamedTuple):
    """A prompt's renderings: alone with the generation prompt, and whole with each completion."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def left_out(self) -> str:
        """The end of the prompt alone that the whole conversations do not have in its place."""
        return self.prompt[common_prefix([*self]) :]


def common_prefix(sequences: list[Any]) -> int:
    """How many characters, or token ids, all of the sequences begin with."""
    return len(os.path.commonprefix(sequences))  # noqa: RUF071


def turn_of(tokenizer: Any) -> Turn:
    """How the tokenizer's chat template ends an answer, found with a stand-in conversation."""
    turns = [user(_QUESTION), assistant(_ANSWER), user(_THANKS)]

    def render(count: int, generate: bool) -> str:
        options = {"tokenize": False, "add_generation_prompt": generate}
        return str(tokenizer.apply_chat_template(turns[:count], **options))

    try:
        plain, asked, thanked = render(2, False), render(2, True), render(3, False)
    except Exception:  # a template may raise anything; a real conversation may please it
        return Turn("", "")
    before, _, after = plain.rpartition(_ANSWER)
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
    found = special and re.search("|".join(map(re.escape, sorted(special, key=len)[::-1])), after)
    end = found.group() if found else ""
    header = (after[found.end() :] if found else after).lstrip()
    always = (
        plain == asked
        and before.rpartition(_QUESTION)[2].strip().endswith(header.strip())
        and _ANSWER + after not in thanked  # or it only sets turns apart
    )
    return Turn(end, header if always else "")


def render_pair(tokenizer: Any, turn: Turn, row: dict[str, Any], place: str) -> Conversation:
    """A pair's three renderings, without a generation prompt after a finished answer.

    Raises:
        ValueError: the template refuses the conversation or ignores its tools, or an option among
            ``chat_template_kwargs`` is not a template's; the message starts with the place.
    """
    tools = tools_of(row)
    options = row.get("chat_template_kwargs") or {}
    if reserved := sorted({*options} & _RESERVED):
        raise ValueError(
            f"{place}: field 'chat_template_kwargs': '{reserved[0]}' is not an option of a chat template"
        )

    def render(field: str, messages: list[Message], generate: bool, tools: Any = tools) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate, **options
            )
        except Exception as error:  # a template may raise anything
            line = (
                f" (in its line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
            )
            raise ValueError(
                f"{place}: field '{field}': the chat template refuses this conversation: {error}{line}"
            ) from None

    prompt = render("prompt", row["prompt"], True)
    try:
        ignored = bool(tools) and prompt == render("prompt", row["prompt"], True, None)
    except ValueError:
        ignored = False  # a template for tools alone
    if ignored:
        raise ValueError(f"{place}: field 'tools': the chat template does not show tools")
    chosen, rejected = (
        render(field, row["prompt"] + row[field], False).removesuffix(turn.header)
        for field in ("chosen", "rejected")
    )
    return Conversation(prompt, chosen, rejected)


def tools_of(row: dict[str, Any]) -> Any:
    """The tools of a row, read from JSON."""
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def unused_options(tokenizer: Any, row: dict[str, Any]) -> str:
    """The names among a row's ``chat_template_kwargs`` that the template never mentions."""
    template = tokenizer.get_chat_template(tools=tools_of(row))
    return ", ".join(name for name in row.get("chat_template_kwargs") or {} if name not in template)


def find_loss(row: dict[str, Any], texts: Conversation, place: str) -> bool:
    """Look for everything a user wrote in the renderings, white space aside.

    Returns:
        Whether the template drops the thinking of earlier turns, which many do by design.

    Raises:
        ValueError: anything else is not shown; the message starts with the place and the field.
    """
    prompt, *wholes = map(_squeeze, texts)
    dropped, start = _find_all(row["prompt"], prompt, f"{place}: field 'prompt'")
    for field, whole in zip(("chosen", "rejected"), wholes, strict=True):
        if texts.left_out:  # what the prompt shows alone may be gone now
            dropped, start = _find_all(row["prompt"], whole, f"{place}: field 'prompt'")
        # From the end of the prompt's own text on: a <think> may stand in the generation prompt.
        _find_all(row[field], whole, f"{place}: field '{field}'", start)
    return dropped


def _find_all(messages: list[Message], shown: str, where: str, start: int = 0) -> tuple[bool, int]:
    """Whether ``shown`` has all but the thinking of a prompt, in order from ``start``; its end."""
    dropped = False
    for i, message in enumerate(messages):
        role, begin = message.get("role"), start
        for kind, text in _parts(message):
            here = 0 if role in _ANYWHERE else start if kind == "content" else begin
            at, stop = _find(text, shown, here, as_json=role == "tool")
            earlier = where.endswith("'prompt'") and role == "assistant" and kind != "tool_calls"
            if at < 0 and earlier:
                answer = "" if kind in _THINKING else text.rpartition("</think>")[2]
                at, stop = _find(answer, shown, here)
                dropped |= at >= 0
            if at < 0:
                hint = " (it may cut what stands before </think>)" if "</think>" in text else ""
                raise ValueError(
                    f"{where}: the chat template does not show '{kind}' of message {i} (role "
                    f"'{role}'){hint}: {text!r:.80}"
                )
            if kind == "content" and role not in _ANYWHERE:
                start = stop
    return dropped, start


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """The texts that a user wrote in a message, each with its key."""
    for key in _THINKING:
        if isinstance(message.get(key), str):
            yield key, message[key]
    content = message.get("content")
    for block in content if isinstance(content, list) else [content]:
        text = block.get("text") if isinstance(block, dict) else block
        if isinstance(text, str):
            yield "content", text
    for call in message.get("tool_calls") or []:
        function = call.get("function")
        name = (function if isinstance(function, dict) else call).get("name")
        if isinstance(name, str):
            yield "tool_calls", name


def _find(text: str, shown: str, start: int, *, as_json: bool = False) -> tuple[int, int]:
    """Where ``text`` begins and stops in ``shown``, which has no white space; (-1, ...) if nowhere."""
    forms = [text, _SWITCHES.sub("", text)]
    if as_json:
        quoted = (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))
        forms += [form[1:-1] for form in quoted]
    for form in forms:
        squeezed = _squeeze(form)
        at = shown.find(squeezed, start)
        if at >= 0:
            return at, at + len(squeezed)
    return -1, -1


def _squeeze(text: str) -> str:
    return "".join(text.split())
