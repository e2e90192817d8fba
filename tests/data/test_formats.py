"""Recognising and converting one row: each format as its data sets have it, each error in full."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpop.data.formats import convert
from fastdpop.data.json_text import cell

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
NOTHING_BESIDE = {"tools": None, "chat_template_kwargs": {}}
CHAT = {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN], **NOTHING_BESIDE}
TEXT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}


# --------------------------------------------------------------------------------------- TRL's formats


def test_text_stays_text() -> None:
    assert convert({**TEXT, "rejected": "", "id": 7, "score_chosen": 0.5}) == (
        {**TEXT, "rejected": ""},
        "text",
        ("id", "score_chosen"),
    )


def test_text_becomes_messages_on_request() -> None:
    assert convert(TEXT, chat=True).fields == {
        "prompt": [{"role": "user", "content": "The sky is"}],
        "chosen": [{"role": "assistant", "content": " blue."}],
        "rejected": [{"role": "assistant", "content": " green."}],
        **NOTHING_BESIDE,
    }


@pytest.mark.parametrize("chat", [False, True])
def test_messages_stay_messages(chat: bool) -> None:
    row = {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}
    assert convert(row, chat=chat) == (CHAT, "chat messages", ())


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": "It is blue.", "rejected": "It is green."},
        {"prompt": [ASK], "chosen": [BLUE], "rejected": "It is green."},
        {"prompt": ASK, "chosen": BLUE, "rejected": GREEN},
        {
            "prompt": [{**ASK, "role": "human"}],
            "chosen": [{**BLUE, "role": "gpt"}],
            "rejected": [{"from": "assistant", "value": "It is green."}],
        },
        {"prompt": ASK["content"], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [ASK], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
        {
            "prompt": [{**ASK, "name": None}],
            "chosen": [{**BLUE, "tool_calls": None}],
            "rejected": [GREEN],
        },
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What color is "},
                        {"type": "text", "text": "the sky?"},
                    ],
                }
            ],
            "chosen": [BLUE],
            "rejected": [GREEN],
        },
    ],
)
def test_other_ways_to_write_messages(row: dict[str, Any]) -> None:
    assert convert(row) == (CHAT, "chat messages", ())


def test_text_that_is_json_is_text() -> None:
    """Only a cell of a CSV file has no other way to hold messages."""
    row = {"prompt": "Write JSON.", **{n: json.dumps(CHAT[n]) for n in ("chosen", "rejected")}}
    assert convert(row).fields == row
    assert cell(row["chosen"]) == CHAT["chosen"]
    assert cell("[{'a': 1}]") == "[{'a': 1}]"
    assert cell('[1, {"role": 2}]') == '[1, {"role": 2}]'
    with pytest.raises(ValueError, match="a cell looks like a list of messages, but is not valid"):
        cell("[{'role': 'user', 'content': 'hi'}]")


def test_what_is_no_image() -> None:
    assert convert({**TEXT, "images": float("nan"), "video": [None, ""]}).fields == TEXT


def test_implicit_prompt_of_messages() -> None:
    row = {"chosen": [SYSTEM, ASK, BLUE], "rejected": [SYSTEM, ASK, GREEN], "score_chosen": 9.0}
    expected = {**CHAT, "prompt": [SYSTEM, ASK]}
    assert convert(row) == (expected, "implicit prompt, messages", ("score_chosen",))


def test_implicit_prompt_of_text() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert convert(row) == (TEXT, "implicit prompt, text", ())


def test_extra_keys_of_messages_and_tools_pass_through() -> None:
    # As in TRL's documentation of tool calling.
    call = {
        "type": "function",
        "function": {"name": "lights", "arguments": {"room": "hall", "dim": None}},
    }
    chosen = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "lights", "content": "on"},
        {"role": "assistant", "content": "Done.", "reasoning_content": "They are on."},
    ]
    tool = {"type": "function", "function": {"name": "lights", "parameters": {"type": "object"}}}
    row = {"prompt": [ASK], "chosen": chosen, "rejected": [GREEN]}
    for tools in ([tool], json.dumps([tool])):
        for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
            pair = convert({**row, "tools": tools, "chat_template_kwargs": kwargs})
            assert pair.unused == ()
            assert pair.fields["chosen"] == chosen
            assert json.loads(pair.fields["tools"]) == [tool]
            assert pair.fields["chat_template_kwargs"] == {"enable_thinking": False}
    for nothing in (
        {"tools": [], "chat_template_kwargs": None},
        {"tools": "", "chat_template_kwargs": ""},
    ):
        assert convert({**row, **nothing}).fields == {**row, **NOTHING_BESIDE}


@pytest.mark.parametrize("row", [TEXT, CHAT], ids=["text", "messages"])
def test_trl_knows_the_kind(row: dict[str, Any]) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    fields = convert(row).fields
    assert data_utils.is_conversational(fields) == isinstance(fields["prompt"], list)


@given(st.text("ab ", min_size=1), st.text("ab "), st.text("ab "))
def test_implicit_text_is_split_as_by_trl(shared: str, chosen: str, rejected: str) -> None:
    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    row = {"chosen": shared + chosen, "rejected": shared + rejected}
    expected = extract_prompt(row)
    if expected["prompt"]:
        assert convert(row).fields == expected
    else:
        with pytest.raises(ValueError, match="field 'prompt' is empty"):
            convert(row)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_implicit_messages_are_split_as_by_trl(shared: int, chosen: int, rejected: int) -> None:
    extract_prompt = pytest.importorskip("trl.data_utils").extract_prompt
    turns = [ASK, BLUE] * 3
    start = turns[: 2 * shared - 1]
    row = {
        "chosen": start + [BLUE, ASK] * (chosen - 1) + [BLUE],
        "rejected": start + [GREEN, ASK] * (rejected - 1) + [BLUE],
    }
    assert convert(row).fields == {**extract_prompt(row), **NOTHING_BESIDE}


# ----------------------------------------------------------------------------------------- data sets'


def test_ultrafeedback_binarized() -> None:
    row = {
        "prompt": "What color is the sky?",
        "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
        "chosen": [ASK, BLUE],
        "rejected": [ASK, GREEN],
        "messages": [ASK, BLUE],
        "score_chosen": 8.5,
        "score_rejected": 8.5,
    }
    unused = ("prompt_id", "messages", "score_chosen", "score_rejected")
    assert convert(row) == (CHAT, "UltraFeedback", unused)
    assert convert({**row, "system": "Be brief."}).fields["prompt"] == [SYSTEM, ASK]


@pytest.mark.parametrize("asked", ["question", "input"])
def test_orca(asked: str) -> None:
    row = {
        "system": "",
        asked: ASK["content"],
        "chosen": BLUE["content"],
        "rejected": GREEN["content"],
    }
    assert convert(row) == (CHAT, "Orca", ())
    assert convert({**row, "system": None}).fields == CHAT
    assert convert({**row, "system": "Be brief."}).fields == {**CHAT, "prompt": [SYSTEM, ASK]}


def test_alpaca() -> None:
    row = {
        "instruction": "Translate to German.",
        "input": "the sky",
        "chosen": "der Himmel",
        "rejected": "die Himmel",
        "system": "Be brief.",
        "history": [],
    }
    expected = {
        "prompt": [SYSTEM, {"role": "user", "content": "Translate to German.\nthe sky"}],
        "chosen": [{"role": "assistant", "content": "der Himmel"}],
        "rejected": [{"role": "assistant", "content": "die Himmel"}],
        **NOTHING_BESIDE,
    }
    assert convert(row) == (expected, "Alpaca", ())
    plain = convert({**row, "input": "", "system": ""}).fields
    assert plain["prompt"] == [{"role": "user", "content": "Translate to German."}]


TRANSCRIPT = "\n\nHuman: Hi!\n\nAssistant: Hello?\n\nHuman: What color is the sky?\n\nAssistant:"


def test_hh_rlhf() -> None:
    row = {"chosen": f"{TRANSCRIPT} It is blue.", "rejected": f"{TRANSCRIPT} It is green."}
    text = {"prompt": TRANSCRIPT, "chosen": " It is blue.", "rejected": " It is green."}
    assert convert(row) == (text, "HH-RLHF", ())
    greeting = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello?"}]
    messages = {**CHAT, "prompt": [*greeting, ASK]}
    assert convert(row, chat=True) == (messages, "HH-RLHF", ())
    assert convert({**row, "system": "Be brief."}, chat=True).fields["prompt"][0] == SYSTEM
    same = {"chosen": row["chosen"], "rejected": row["chosen"]}
    assert convert(same).fields == {**text, "rejected": " It is blue."}
    assert convert({"chosen": TRANSCRIPT, "rejected": row["rejected"]}).fields["chosen"] == ""


def test_hh_rlhf_that_differs_before_the_last_answers() -> None:
    row = {
        "chosen": "\n\nHuman: Hi!\n\nAssistant: Hello?\n\nHuman: Bye.\n\nAssistant: Bye!",
        "rejected": "\n\nHuman: Hi!\n\nAssistant: What?",
    }
    assert convert(row, chat=True).fields == {
        "prompt": [{"role": "user", "content": "Hi!"}],
        "chosen": [
            {"role": "assistant", "content": "Hello?"},
            {"role": "user", "content": "Bye."},
            {"role": "assistant", "content": "Bye!"},
        ],
        "rejected": [{"role": "assistant", "content": "What?"}],
        **NOTHING_BESIDE,
    }
    with pytest.raises(ValueError, match=r"differ before their last.*chat=True"):
        convert(row)


@pytest.mark.parametrize("completion", ["object", "list", "text"])
def test_sharegpt(completion: str) -> None:
    def written(text: str) -> Any:
        message = {"from": "gpt", "value": text}
        return {"object": message, "list": [message], "text": text}[completion]

    row = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What color is the sky?"},
        ],
        "chosen": written("It is blue."),
        "rejected": written("It is green."),
    }
    assert convert(row) == ({**CHAT, "prompt": [SYSTEM, ASK]}, "ShareGPT", ())


def test_sharegpt_with_tools() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "What color is the sky?"},
            {"from": "gpt", "value": "Let me look."},
            {"from": "observation", "value": "blue"},
        ],
        "chosen": {"from": "gpt", "value": "It is blue."},
        "rejected": {"from": "gpt", "value": "It is green."},
        "tools": '[{"name": "sky", "description": "its color", "parameters": {}}]',
        "system": "Be brief.",
    }
    fields = convert(row).fields
    told = {"role": "tool", "content": "blue"}
    assert fields["prompt"] == [
        SYSTEM,
        ASK,
        {"role": "assistant", "content": "Let me look."},
        told,
    ]
    function = {"name": "sky", "description": "its color", "parameters": {}}
    assert json.loads(fields["tools"]) == [{"type": "function", "function": function}]


# ---------------------------------------------------------------------------------- columns, other fields


def test_columns_are_taken_first() -> None:
    row = {
        "q": "The sky is",
        "good": " blue.",
        "rejected": " green.",
        "prompt": "old",
        "chosen": "old",
    }
    columns = {"prompt": "q", "chosen": "good"}
    assert convert(row, columns=columns) == (TEXT, "text", ("prompt", "chosen"))
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert convert(TEXT, columns=swapped) == (
        {**TEXT, "chosen": " green.", "rejected": " blue."},
        "text",
        (),
    )


def test_a_given_prompt_goes_before_other_fields_that_could_be_one() -> None:
    row = {**TEXT, "question": "?", "conversations": [], "instruction": "!"}
    assert convert(row) == (TEXT, "text", ("question", "conversations", "instruction"))


@pytest.mark.parametrize("nothing", [None, "", [], [None], {}, "[]", "{}"])
def test_empty_fields_are_nothing(nothing: Any) -> None:
    names = ("images", "system", "history", "tools", "chat_template_kwargs")
    assert convert({**TEXT, **dict.fromkeys(names, nothing)}) == (TEXT, "text", ())


def test_text_that_looks_like_json_but_holds_no_messages_stays_text() -> None:
    for text in ('[{"a": 1}]', "[1] says so", '{"from": 3, "to": 4}', '{"from": "cut', "[{"):
        assert convert({**TEXT, "chosen": text}).fields["chosen"] == text


def test_a_system_message_of_the_prompt_may_stand_beside_it_too() -> None:
    row = {"prompt": [SYSTEM, ASK], "chosen": [BLUE], "rejected": [GREEN], "system": "Be brief."}
    assert convert(row).fields["prompt"] == [SYSTEM, ASK]
