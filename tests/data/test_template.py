"""What a chat template refuses, and what of a conversation it leaves out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fastdpop.data.template import Turn, turn_of
from tests.data.tokenization import TOOL, WARNINGS, answer, dataset, pair, texts, tokens, user
from tests.data.tokenizers import (
    ALWAYS_ASKS,
    CHATML,
    GEMMA,
    HARMONY,
    LLAMA2,
    MISTRAL,
    QWEN3,
    R1,
    TOOLS,
    byte_level,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]

CHAT = [user("2+2?")]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "type": "function",
    "function": {"name": "add", "arguments": {"x": [2, 0.5], "said": 'it\'s "two"\n'}},
}
CALLS = (
    "{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.name }}(ARGUMENTS)"
    "{% endfor %}{{ m.content }}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "end", "header"),
    [
        (CHATML, "<|im_end|>", ""),
        (ALWAYS_ASKS, "<|im_end|>", "<|im_start|>assistant\n"),
        (QWEN3, "<|im_end|>", ""),
        (HARMONY, "<|return|>", ""),
        (LLAMA2, "</s>", ""),
        (MISTRAL, "</s>", ""),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "", ""),
        ("{% for m in messages %}{{ m.content }}\n---\n{% endfor %}", "", ""),  # sets turns apart
        (
            "{% for m in messages %}{{ 'Answer: ' if m.role == 'assistant' }}{{ m.content }}\n"
            "{% endfor %}Answer:",
            "",
            "Answer:",
        ),
        # The same end after a user's turn and an answer, and EOS after it: no header.
        (CHATML + "{{ eos_token }}", "<|im_end|>", ""),
        ("{{ raise_exception('no') }}", "", ""),
    ],
)
def test_the_end_of_a_turn_is_found(template: str, end: str, header: str) -> None:
    tokenizer = byte_level(template, eos="</s>", bos="<s>")
    assert turn_of(tokenizer) == Turn(end, header)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (GEMMA, pair([SYSTEM, *CHAT]), "System role not supported"),
        (GEMMA, pair([*CHAT, *CHAT]), "Conversation roles must alternate"),
        ("{{ messages | nonsense }}", pair(CHAT), ".*nonsense.* line 1"),
        ("\n{% if %}", pair(CHAT), "Expected an expression.* line 2"),
        ("{{ messages[0].content + 1 }}", pair(CHAT), "can only concatenate str"),
        ("{{ messages[0].name.first }}", pair(CHAT), "has no attribute 'name'"),
        ("{{ 1 / 0 }}", pair(CHAT), "division"),
    ],
)
def test_what_a_template_refuses_is_named(template: str, row: dict[str, Any], message: str) -> None:
    refusal = "^pairs.jsonl:1: field 'prompt': the chat template refuses this conversation: "
    with pytest.raises(ValueError, match=refusal + ".*" + message):
        tokens(row, byte_level(template))


def test_the_place_is_that_of_the_row() -> None:
    rows = dataset(pair(CHAT), pair(CHAT), pair(CHAT, "4", [*answer("5"), *answer("6")]))
    with pytest.raises(ValueError, match=r"^pairs.jsonl:3: field 'rejected': the chat template re"):
        tokens(rows, byte_level(GEMMA))


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            R1,
            pair(CHAT, "<think>\nsum\n</think>\n\n4"),
            "field 'chosen': the chat template does not show 'content' of message 0 (role "
            "'assistant') (it may cut what stands before </think>): '<think>\\nsum\\n</think>\\n\\n4'",
        ),
        (
            QWEN3,
            pair(CHAT, "4", "Well. <think>sum</think>5"),
            "field 'rejected': the chat template does not show 'content' of message 0",
        ),
        (
            MISTRAL,
            pair([SYSTEM, *CHAT]),
            "field 'prompt': the chat template does not show 'content' of message 0 (role 'system')"
            ": 'Be brief.'",
        ),
        (
            CHATML,
            pair(CHAT, answer("4", reasoning_content="A sum.")),
            "field 'chosen': the chat template does not show 'reasoning_content' of message 0",
        ),
        (
            CHATML,
            pair(CHAT, answer("4", tool_calls=[CALL])),
            "field 'chosen': the chat template does not show 'tool_calls' of message 0 (role "
            "'assistant'): 'add'",
        ),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content[:3] }}"),
            pair([user("abcdef")]),
            "field 'prompt': the chat template does not show 'content' of message 0 (role 'user'): "
            "'abcdef'",
        ),
        (CHATML, pair(CHAT, tools=[TOOL]), "field 'tools': the chat template does not show tools"),
        (
            CHATML,
            pair(CHAT, chat_template_kwargs={"truncation": True, "max_length": 3}),
            "field 'chat_template_kwargs': 'max_length' is not an option of a chat template",
        ),
        (CHATML, pair(CHAT, []), "field 'chosen' has no messages"),
        (  # the whole conversation shows less of the prompt than the prompt alone
            "{% for m in (messages if add_generation_prompt else messages[-1:]) %}{{ m.content }}"
            "<|im_end|>{% endfor %}",
            pair(CHAT),
            "field 'prompt': the chat template does not show 'content' of message 0 (role 'user')",
        ),
    ],
)
def test_nothing_that_a_user_wrote_is_lost(
    template: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape("pairs.jsonl:1: " + message)):
        tokens(row, byte_level(template, bos="<s>"))


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (QWEN3, pair(CHAT, "<think>\nsum\n</think>\n\n4")),
        (QWEN3, pair(CHAT, answer("4", reasoning_content="A sum."))),
        (HARMONY, pair(CHAT, answer("4", thinking="A sum."))),
        (GEMMA, pair([user(" 2 +\n2? ")], "\n4 ")),  # trimmed
        (LLAMA2, pair([SYSTEM, *CHAT])),
        (TOOLS, pair([SYSTEM, *CHAT], tools=[TOOL])),
        (
            CALLS.replace("ARGUMENTS", "{{ call.function.arguments }}"),
            pair(CHAT, answer("", tool_calls=[CALL])),
        ),
        (
            CALLS.replace("ARGUMENTS", "{{ call.function.arguments | tojson }}"),
            pair(CHAT, answer("4", tool_calls=[CALL])),
        ),
        (  # a result of a tool is shown as JSON; the system message comes last
            "{% for m in messages[1:] %}{{ m.content | tojson if m.role == 'tool' else m.content }}"
            "{% if loop.first %}{{ messages[0].content }}{% endif %}<|im_end|>{% endfor %}",
            pair([SYSTEM, *CHAT, *answer("Hm."), {"role": "tool", "content": '{"sum": "é\n"}'}]),
        ),
        (  # arguments that are JSON text, shown in another way
            CALLS.replace("ARGUMENTS", "{{ call.function.arguments | replace('\"', '`') }}"),
            pair(
                CHAT,
                answer("", tool_calls=[{"function": {"name": "f", "arguments": '{"a": "b"}'}}]),
            ),
        ),
        (  # system messages all come first
            "{% for m in messages if m.role == 'system' %}{{ m.content }}\n{% endfor %}"
            "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}",
            pair([*CHAT, SYSTEM, user("Now?")]),
        ),
        (  # a switch that the template reads
            CHATML.replace("{{ m.content }}", "{{ m.content.replace('/no_think', '') }}"),
            pair([{"role": "system", "content": "Be brief. /no_think"}, *CHAT]),
        ),
        (
            CHATML.replace(
                "{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"
            ),
            pair(
                [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}],
                answer([{"type": "text", "text": "4"}]),
                answer([{"type": "text", "text": "5"}]),
            ),
        ),
    ],
)
def test_what_is_shown_in_another_form_is_not_lost(template: str, row: dict[str, Any]) -> None:
    tokenizer = byte_level(template, bos="<s>", eos="</s>")
    prompt, chosen, _ = texts(row, tokenizer)
    tools = row.get("tools")
    whole = tokenizer.apply_chat_template(
        row["prompt"] + row["chosen"], tools=tools, tokenize=False
    )
    assert prompt + chosen == whole


@pytest.mark.parametrize(
    "earlier",
    [answer("<think>\nhm\n</think>\n\nFour."), answer("Four.", reasoning_content="hm")],
)
def test_thinking_of_earlier_turns_may_go(earlier: list[dict[str, Any]]) -> None:
    row = pair([*CHAT, *earlier, user("Sure?")], "<think>\nsure\n</think>\n\nYes")
    with pytest.warns(
        UserWarning, match=r"^pairs.jsonl:1: the chat template drops the thinking of"
    ):
        prompt, chosen, _ = texts(row, byte_level(QWEN3))
    assert "hm" not in prompt
    assert "Four." in prompt
    assert chosen == "<think>\nsure\n</think>\n\nYes<|im_end|>\n"


def test_options_that_a_template_does_not_know_are_reported() -> None:
    options = {"enable_thinking": False}
    row = pair(CHAT, chat_template_kwargs=options)
    with pytest.warns(UserWarning, match="'chat_template_kwargs': enable_thinking$"):
        tokens(dataset(row, row), byte_level(CHATML))
    tokens(row, byte_level(QWEN3))


def test_a_template_that_ends_no_turn() -> None:
    endless = byte_level(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    )
    with pytest.warns(
        UserWarning, match=r"^pairs.jsonl:1: the chat template writes nothing after an"
    ):
        tokens(pair(CHAT), endless)
    tokens(pair(CHAT), byte_level(CHATML))  # and no warning where it does


def test_a_template_for_tools_alone() -> None:
    """Which fails without them, so that what it shows cannot be compared."""
    template = "{{ tools[0].function.name }}" + CHATML
    assert "add" in texts(pair(CHAT, tools=[TOOL]), byte_level(template))[0]
