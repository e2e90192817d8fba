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
CALLED = "(fields here: ['chosen', 'prompt']; --columns rejected=... says what it is called)"
IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}
SIDE = "expected a string or a list of chat messages"
SHAREGPT = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, f"field 'rejected' is missing {CALLED}"),
        (
            {"Prompt": "p", "Chosen": "c", "Rejected": "r"},
            "field 'chosen' is missing (fields here: ['Chosen', 'Prompt', 'Rejected']; --columns chosen=Chosen "
            "says what it is called)",
        ),
        (
            {"prompt;chosen;rejected": "p;c;r"},
            "field 'chosen' is missing (fields here: ['prompt;chosen;rejected']): cells may be separated by "
            "';', expected commas, or tabs in a file .tsv",
        ),
        (
            {"data": [{"prompt": "p", "chosen": "c", "rejected": "r"}]},
            "field 'chosen' is missing (fields here: ['data']): pairs may be those of "
            "the list 'data'; expected that list by itself",
        ),
        ({**TEXT, "chosen": 3}, f"field 'chosen' is 3, {SIDE}"),
        ({**TEXT, "chosen": None}, f"field 'chosen' is None, {SIDE}"),
        ({**TEXT, "rejected": float("nan")}, f"field 'rejected' is nan, {SIDE}"),
        ({**TEXT, "prompt": True}, "field 'prompt' is True, expected a text that is not empty"),
        ({**TEXT, "prompt": ""}, "field 'prompt' is '', expected a text that is not empty"),
        ({**TEXT, "prompt": []}, "field 'prompt' is empty"),
        (
            {**TEXT, "rejected": [GREEN]},
            "field 'chosen' is ' blue.', expected a list of chat messages",
        ),
        (
            {**MESSAGES, "prompt": ["hello"]},
            "field 'prompt': message 1 is 'hello', expected an object with 'role' and 'content'",
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
            "field 'chosen': message 1: 'content' is not text, as a text model expects it, but 3",
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
            "field 'prompt': message 1: 'content' is not text, as a text model expects it, but "
            f"{IMAGE!r}",
        ),
        (
            {**MESSAGES, "prompt": [{"role": "user", "content": ["hi"]}]},
            "field 'prompt': message 1: 'content' is not text, as a text model expects it, but 'hi'",
        ),
        (
            {**MESSAGES, "prompt": [ASK, BLUE]},
            "the prompt ends with an assistant message; the completion belongs in 'chosen' and 'rejected'",
        ),
        (
            {**MESSAGES, "chosen": []},
            "field 'chosen' has messages of [], expected the first and the last to be of 'assistant'",
        ),
        (
            {**MESSAGES, "chosen": [ASK, BLUE]},
            "field 'chosen' has messages of ['user', 'assistant'], expected the first and the last to be of "
            "'assistant'",
        ),
        (
            {**MESSAGES, "rejected": [GREEN, ASK]},
            "field 'rejected' has messages of ['assistant', 'user'], expected the first and the last to be "
            "of 'assistant'",
        ),
        (
            {"chosen": [ASK, BLUE], "rejected": [SYSTEM, ASK, GREEN]},
            "field 'prompt' is missing, and 'chosen' and 'rejected' share no beginning to take for it "
            "(fields here: ['chosen', 'rejected'])",
        ),
        (
            {"chosen": "blue", "rejected": "green", "messages": []},
            "field 'prompt' is missing, and 'chosen' and 'rejected' share no beginning to take for it "
            "(fields here: ['chosen', 'messages', 'rejected'])",
        ),
        (
            {"prompt": "Who?", "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
            "field 'prompt' is none of the user's messages that 'chosen' and 'rejected' share: 'Who?'",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "'chosen' and 'rejected' differ in a turn of 'Human'",
        ),
        (
            {
                "chosen": f"{TRANSCRIPT} a\n\nHuman: b\n\nAssistant: c",
                "rejected": f"{TRANSCRIPT} a\n\nHuman: d\n\nAssistant: c",
            },
            "'chosen' and 'rejected' differ in a turn of 'Human'",
        ),
        (
            {"chosen": f"{TRANSCRIPT} b\n\nHuman: c", "rejected": f"{TRANSCRIPT} d"},
            "field 'chosen': the conversation ends with a turn of 'Human'",
        ),
        (
            {**TEXT, "images": ["x.png"]},
            "field 'images' is not empty, but cannot be used in training: leave such rows out",
        ),
        (
            {**MESSAGES, "history": [["a", "b"]]},
            "field 'history' is not empty, but cannot be used in training: leave such rows out",
        ),
        (
            {**TEXT, "system": "Be brief."},
            "field 'system' has no place in a text prompt: make messages of the pair with --chat "
            "(chat=True), or "
            "leave the field out",
        ),
        ({**MESSAGES, "system": 3}, "field 'system' is 3, expected a string"),
        (
            {**MESSAGES, "prompt": [SYSTEM, ASK], "system": "Be long."},
            "field 'system' differs from the system message of the prompt",
        ),
        (
            {**MESSAGES, "tools": "{"},
            "field 'tools' is not valid JSON (Expecting property name enclosed in double quotes: line 1 "
            "column 2 (char 1)): '{'",
        ),
        (
            {**MESSAGES, "tools": {"name": "f"}},
            "field 'tools' is not a list of objects: {'name': 'f'}",
        ),
        (
            {**MESSAGES, "chat_template_kwargs": "[1]"},
            "field 'chat_template_kwargs' is [1], expected an object",
        ),
        (
            {**MESSAGES, "chat_template_kwargs": '{"a": 1, "a": 2}'},
            "field 'chat_template_kwargs' is not valid JSON (the key 'a' stands twice in one object: "
            "{'a': 2}): '{\"a\": 1, \"a\": 2}'",
        ),
        (
            {"conversations": [{"from": "human"}], **SHAREGPT},
            "field 'conversations': message 1: 'content' is not text, as a text model expects it, but None",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "{}"}], **SHAREGPT},
            "field 'conversations': message 1: 'from' is 'function_call', expected one of ('human', 'gpt', "
            "'observation', 'system', 'user', 'assistant', 'tool')",
        ),
        (
            {"question": 4, "chosen": "a", "rejected": "b"},
            "field 'question' is 4, expected a text that is not empty",
        ),
        (
            {**TEXT, "chosen": "a\ud83d"},
            "field 'chosen' has half a surrogate pair, '\\ud83d'",
        ),
        (
            {**MESSAGES, "chosen": [{**BLUE, "\udc00": 1}]},
            "field 'chosen' has half a surrogate pair, '\\udc00'",
        ),
        (
            {**TEXT, "a\udc00": 1},
            "field 'a\udc00' has half a surrogate pair, '\\udc00'",
        ),
        (
            {"query": "What color?", "chosen": "The sky is blue.", "rejected": "The sky is green."},
            "field 'prompt' is missing, and 'query' may be what it is called here: call it 'prompt' (--columns "
            "prompt=query), or leave that field out",
        ),
        (
            {"messages": [ASK], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
            "field 'prompt' is missing, and 'messages' may be what it is called here: call it 'prompt' (--columns "
            "prompt=messages), or leave that field out",
        ),
        (
            {"chosen": [BLUE, ASK, BLUE], "rejected": [BLUE, GREEN]},
            "'chosen' and 'rejected' share no message of 'user' to take for the prompt",
        ),
        (
            {**MESSAGES, "prompt": [{**ASK, "images": ["cat.png"]}]},
            "field 'prompt': message 1 has 'images', which cannot be used in training: leave such rows "
            "out",
        ),
        (
            {**MESSAGES, "chosen": [{**BLUE, "content": "", "function_call": {"name": "f"}}]},
            "field 'chosen': message 1 has 'function_call', which cannot be used in training: give "
            "'tool_calls'",
        ),
        (
            {**TEXT, "note": {"a": ["\udc00"]}},
            "field 'note' has half a surrogate pair, '\\udc00'",
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
