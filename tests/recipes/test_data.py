"""Conversations for fine-tuning, and the format in which models see them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest

pytest.importorskip("datasets")

from transformers import AutoTokenizer

from recipes.smaug import conversations, stages

FIXTURES = stages.FIXTURES
TEMPLATE = (Path(stages.__file__).parent / "llama-2.jinja").read_text()
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1 + 1? "}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"query": "1 + 1?", "response": "2", "type": "GSM_FOBAR", "original_question": "1 + x = 2?"},
            ["user 1 + 1?", "assistant 2"],
        ),
        (
            {"instruction": "Be brief.", "conversation": [{"input": "1 + 1?", "output": "2"}]},
            ["system Be brief.", "user 1 + 1?", "assistant 2"],
        ),
        (
            {"instruction": "", "conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
            ["user a", "assistant b", "user c", "assistant d"],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            ["user a", "assistant b"],
        ),
        (  # a piece of a longer one: from the first question to the last answer
            {
                "conversations": [
                    {"from": "gpt", "value": "..."},
                    {"from": "human", "value": "a"},
                    {"from": "bing", "value": "b"},
                    {"from": "human", "value": "bye"},
                ]
            },
            ["user a", "assistant b"],
        ),
    ],
)  # fmt: skip
def test_rows_of_each_data_set(row: dict[str, Any], expected: list[str]) -> None:
    found = conversations.messages(row)
    assert [f"{message['role']} {message['content']}" for message in found] == expected
    assert conversations.takes_turns(found)


@pytest.mark.parametrize(
    ("roles", "takes"),
    [
        ("user assistant", True),
        ("system user assistant user assistant", True),
        ("", False),
        ("system", False),
        ("user user assistant", False),
        ("user assistant assistant", False),
        ("user system assistant", False),
    ],
)
def test_turns(roles: str, takes: bool) -> None:
    assert conversations.takes_turns([{"role": r, "content": "x"} for r in roles.split()]) is takes


def test_a_file_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    recipe = stages.read(Path(stages.__file__).parent / "34b.yaml")
    command = recipe.data["conversations"]
    monkeypatch.setattr(sys, "argv", [*command[1:], "--out", "all.jsonl"])
    conversations.main()
    said = capsys.readouterr().out
    assert "split.json: 2 conversations, 2 without turns left out" in said
    rows = [json.loads(line)["messages"] for line in Path("all.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert all(conversations.takes_turns(row) for row in rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"row 1: the fields are \['text'\], expected query and response, "),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            "row 1: field 'from' is 'robot', expected one of",
        ),
    ],
)
def test_rows_of_others(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        conversations.write([f"{tmp_path}:rows.jsonl"], Path(os.devnull))


@pytest.mark.parametrize(
    ("name", "bos", "eos"),
    [("jondurbin/bagel-34b-v0.2", "<s>", "</s>"), ("moreh/MoMo-72B-lora-1.8.7-DPO", "", "<|endoftext|>")],
)  # fmt: skip
def test_the_format(name: str, bos: str, eos: str) -> None:
    """Llama-2's; of a tokenizer without a BOS token, too."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / name)
    tokenizer.chat_template = TEMPLATE
    turns = [
        *ANSWERED,
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
    first = f"{bos}[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n1 + 1? [/INST]"
    expected = f"{first} 2 {eos}{bos}[INST] And 2 + 2? [/INST] 4 {eos}"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == expected
    assert tokenizer.apply_chat_template(ASKED, tokenize=False) == first
    assert (
        tokenizer.apply_chat_template(turns[1:3], tokenize=False)
        == f"{bos}[INST] 1 + 1? [/INST] 2 {eos}"
    )
    marked = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    answers = [
        i for i, of in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if of
    ]
    assert tokenizer.decode(answers) == f" 2 {eos} 4 {eos}"


@pytest.mark.parametrize("roles", ["assistant", "user user", "user system", "system system"])
def test_turns_that_the_format_has_no_place_for(roles: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "jondurbin/bagel-34b-v0.2")
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": role, "content": "x"} for role in roles.split()]
    with pytest.raises(jinja2.TemplateError, match="expected turns of user and assistant"):
        tokenizer.apply_chat_template(turns, tokenize=False)
