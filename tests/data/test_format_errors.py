"""What is wrong with one row of preference data: each error in full."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpop.data.formats import FIELDS, convert

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
TEXT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
TRANSCRIPT = "\n\nHuman: Hi!\n\nAssistant:"
MESSAGES = {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}
HERE = "(fields here: ['chosen', 'prompt'])"
IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, f"field 'rejected' is missing {HERE}"),
        (
            {"prompt": "p", "completion": "c", "label": True},
            "field 'chosen' is missing (fields here: ['completion', 'label', 'prompt']): these are single "
            "completions with a label, and a pair is needed",
        ),
        (
            {"messages": [ASK, BLUE]},
            "field 'chosen' is missing (fields here: ['messages']): this is a single conversation, and a "
            "pair of completions is needed",
        ),
        (
            {**TEXT, "chosen": 3},
            "field 'chosen' is a number, expected a string or a list of chat messages",
        ),
        (
            {**TEXT, "chosen": None},
            "field 'chosen' is null, expected a string or a list of chat messages",
        ),
        (
            {**TEXT, "rejected": float("nan")},
            "field 'rejected' is a number, expected a string or a list of chat messages",
        ),
        (
            {**TEXT, "prompt": True},
            "field 'prompt' is a boolean, expected a string or a list of chat messages",
        ),
        (
            {**TEXT, "prompt": None},
            "field 'prompt' is null, expected a string or a list of chat messages",
        ),
        ({**TEXT, "prompt": ""}, "field 'prompt' is empty"),
        ({**TEXT, "prompt": []}, "field 'prompt' is empty"),
        (
            {**TEXT, "rejected": [GREEN]},
            "field 'chosen' is a string and field 'rejected' is a list, expected both to be strings or both "
            "to be lists of chat messages",
        ),
        (
            {**MESSAGES, "prompt": ["hello"]},
            "field 'prompt': message 1 is a string, expected an object with 'role' and 'content'",
        ),
        (
            {**MESSAGES, "prompt": [SYSTEM, {"role": "user"}]},
            "field 'prompt': message 2 has no string 'content': {'role': 'user'}",
        ),
        (
            {**MESSAGES, "prompt": [{"content": "hi"}]},
            "field 'prompt': message 1 has no string 'role': {'content': 'hi'}",
        ),
        (
            {**MESSAGES, "chosen": [{"role": "assistant", "content": 3}]},
            "field 'chosen': message 1: 'content' is a number, expected a string",
        ),
        (
            {**MESSAGES, "chosen": [{"role": "assistant", "content": None}]},
            "field 'chosen': message 1 has no string 'content': {'role': 'assistant', 'content': None}",
        ),
        (
            {**MESSAGES, "chosen": [{"role": "assistant", "tool_calls": {"name": "f"}}]},
            "field 'chosen': message 1: 'tool_calls' is not a list of objects: {'name': 'f'}",
        ),
        (
            {**MESSAGES, "prompt": [{"role": "user", "content": [IMAGE]}]},
            "field 'prompt': message 1: 'content' has a part that is not text, which a text model cannot be "
            f"given: {IMAGE!r}",
        ),
        (
            {**MESSAGES, "prompt": [{"role": "user", "content": ["hi"]}]},
            "field 'prompt': message 1: 'content' has a part that is not text, which a text model cannot be "
            "given: 'hi'",
        ),
        (
            {**MESSAGES, "prompt": [ASK, BLUE]},
            "the prompt ends with an assistant message; the completion belongs in 'chosen' and 'rejected'",
        ),
        ({**MESSAGES, "chosen": []}, "field 'chosen' is empty, expected an assistant message"),
        (
            {**MESSAGES, "chosen": [ASK]},
            "field 'chosen': the completion begins with a message of 'user', expected one of 'assistant'",
        ),
        (
            {**MESSAGES, "rejected": [GREEN, ASK]},
            "field 'rejected': the completion ends with a message of 'user', expected one of 'assistant'",
        ),
        (
            {"chosen": [ASK, BLUE], "rejected": [SYSTEM, ASK, GREEN]},
            "'chosen' and 'rejected' share no messages at the beginning to take for the prompt (fields here: "
            "['chosen', 'rejected'])",
        ),
        (
            {"chosen": "blue", "rejected": "green"},
            "field 'prompt' is missing, and 'chosen' and 'rejected' share no beginning to take for it",
        ),
        (
            {"prompt": "Who?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
            "field 'prompt' is none of the user's messages that 'chosen' and 'rejected' share: 'Who?'",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "'chosen' and 'rejected' differ in turn 1, which is not the assistant's in both: they do not "
            "answer one prompt",
        ),
        (
            {"chosen": f"{TRANSCRIPT} b\n\nHuman: c", "rejected": f"{TRANSCRIPT} d"},
            "field 'chosen': the conversation ends with a turn of 'Human'",
        ),
        (
            {**TEXT, "images": ["x.png"]},
            "field 'images' is not empty, but only text can be trained on: leave such rows out",
        ),
        (
            {**TEXT, "system": "Be brief."},
            "field 'system' has no place in a text prompt: make messages of the pair with chat=True, or "
            "leave the field out",
        ),
        ({**MESSAGES, "system": 3}, "field 'system' is a number, expected a string"),
        (
            {**MESSAGES, "prompt": [SYSTEM, ASK], "system": "Be long."},
            "field 'system' differs from the system message of the prompt",
        ),
        (
            {**MESSAGES, "prompt": [ASK, BLUE, ASK], "history": [["a", "b"]]},
            "field 'history' stands beside a prompt that has its own earlier turns",
        ),
        (
            {**MESSAGES, "history": [["a"]]},
            "field 'history': item 1 is ['a'], expected a list of the user's text and the answer",
        ),
        (
            {**MESSAGES, "tools": "{"},
            "field 'tools': invalid JSON at column 2 (Expecting property name enclosed in double quotes): '{'",
        ),
        (
            {**MESSAGES, "tools": {"name": "f"}},
            "field 'tools' is not a list of objects: {'name': 'f'}",
        ),
        (
            {**MESSAGES, "chat_template_kwargs": "[1]"},
            "field 'chat_template_kwargs' is a list, expected an object",
        ),
        (
            {**MESSAGES, "chat_template_kwargs": '{"a": 1, "a": 2}'},
            "field 'chat_template_kwargs': the key 'a' stands twice in one object: '{\"a\": 1, \"a\": 2}'",
        ),
        (
            {**MESSAGES, "prompt": "[{'role': 'user', 'content': 'hi'}]"},
            "field 'prompt' looks like a list of messages, but is a list as Python prints it: write it as "
            "JSON: \"[{'role': 'user', 'content': 'hi'}]\"",
        ),
        (
            {**MESSAGES, "prompt": '[{"role": "user"'},
            "field 'prompt' looks like a list of messages, but is not valid JSON: write it as JSON: "
            '\'[{"role": "user"\'',
        ),
        (
            {"conversations": [{"from": "human"}], "chosen": "a", "rejected": "b"},
            "field 'conversations': message 1: expected strings 'from' and 'value', got a string and null",
        ),
        (
            {
                "conversations": [{"from": "function_call", "value": "f()"}],
                "chosen": "a",
                "rejected": "b",
            },
            "field 'conversations': message 1: a function call that is invalid JSON at column 1 (Expecting "
            "value)",
        ),
        (
            {
                "conversations": [{"from": "function_call", "value": "[1]"}],
                "chosen": "a",
                "rejected": "b",
            },
            "field 'conversations': message 1: a function call without a string 'name': 1",
        ),
        (
            {"question": 4, "chosen": "a", "rejected": "b"},
            "field 'question' is a number, expected a string",
        ),
        ({"question": "", "chosen": "a", "rejected": "b"}, "field 'question' is empty"),
        (
            {**TEXT, "chosen": "a\ud83d"},
            "field 'chosen' has half a surrogate pair, '\\ud83d', at character 2",
        ),
        (
            {**MESSAGES, "chosen": [{**BLUE, "\udc00": 1}]},
            "field 'chosen' has half a surrogate pair, '\\udc00', at character 1",
        ),
        (
            {**MESSAGES, "prompt": '[{"role": "user", "content": "\\ud83d"}]'},
            "field 'prompt' has half a surrogate pair, '\\ud83d', at character 1",
        ),
        (
            {**TEXT, "note": {"a": ["\udc00"]}},
            "field 'note' has half a surrogate pair, '\\udc00', at character 1",
        ),
    ],
)
def test_errors_say_what_was_found_and_expected(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        convert(row)


def test_errors_of_columns_and_chat() -> None:
    with pytest.raises(
        ValueError,
        match=r"columns takes 'prompt' from 'q', which is missing \(fields here: \['chosen', 'prompt', 'rejected'\]\)",
    ):
        convert(TEXT, columns={"prompt": "q"})
    with pytest.raises(
        ValueError, match=r"columns gives a field 'promt', expected one of \['prompt'"
    ):
        convert(TEXT, columns={"promt": "prompt"})
    with pytest.raises(ValueError, match="cannot be told to be the user's text"):
        convert({"chosen": "The sky is blue.", "rejected": "The sky is green."}, chat=True)


TEXTS = st.sampled_from(["", "x", "y", "[", "{}", '[{"role": "user", "content": "x"}]', TRANSCRIPT])
SCALARS = st.none() | st.booleans() | st.integers(0, 2) | st.just(float("nan")) | TEXTS
OBJECTS = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "tool_calls", "name", "type", "text"]),
    SCALARS | st.sampled_from(["user", "assistant", "gpt", "function_call"]),
)
VALUES = st.recursive(
    SCALARS | OBJECTS | st.sampled_from([ASK, BLUE, [ASK, BLUE], [ASK, GREEN]]),
    st.lists,
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*FIELDS, "images", "id"]), VALUES), st.booleans())
def test_any_row_is_a_pair_or_a_value_error(row: dict[str, Any], chat: bool) -> None:
    lists = {"chosen": [ASK, BLUE], "rejected": [ASK, GREEN]}
    for fields in (row, {**lists, **row}, {"chosen": "a", "rejected": "b", **row}):
        try:
            pair = convert(fields, chat=chat).fields
        except ValueError:
            continue
        kinds = {type(pair[name]) for name in ("prompt", "chosen", "rejected")}
        assert kinds in ([{str}, {list}] if not chat else [{list}])
        assert pair["prompt"]
        if kinds == {list}:
            assert pair["prompt"][-1]["role"] != "assistant"
            assert pair["chosen"][0]["role"] == pair["chosen"][-1]["role"] == "assistant"
