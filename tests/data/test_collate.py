"""``fastdpop.collate``: TRL's batch, with labels."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference

from fastdpop.data.collate import collate
from fastdpop.data.tokens import _TRL_SLICES
from tests.data.tokenization import TOOL, WARNINGS, answer, dataset, pair, tokens, user
from tests.data.tokenizers import CHATML, QWEN3, TOOLS, byte_level, sentencepiece

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]

SLICES = pytest.mark.skipif(_TRL_SLICES, reason="this TRL cuts by the prompt's length")
CHAT = [user("2+2?")]
IDS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [4]},
    {"prompt_ids": [3], "chosen_ids": [2], "rejected_ids": [2, 2]},
]


@pytest.mark.parametrize(
    ("tokenizer", "rows"),
    [
        (byte_level(), [pair("2+2=", "4", "5, no"), pair("a b", " c<|im_end|>", "")]),
        pytest.param(byte_level(merges=[("=", "4")]), [pair("2+2=", "4", "5")], marks=SLICES),
        (sentencepiece(adds="<s> $A </s>"), [pair("Q: a", " 4", "5</s>")]),
        (byte_level(CHATML), [pair([user("x"), *answer("y"), user("z")], "4<|im_end|>", "")]),
        (byte_level(TOOLS), [pair(CHAT, tools=[TOOL]), pair(CHAT, tools=None)]),
        (byte_level(QWEN3), [pair(CHAT, chat_template_kwargs={"enable_thinking": False})]),
    ],
    ids=["text", "merged", "added", "messages", "tools", "options"],
)
@pytest.mark.filterwarnings("ignore::UserWarning:tests|fastdpop")
def test_a_batch_is_that_of_trl(tokenizer: Any, rows: list[Any]) -> None:
    theirs = DataCollatorForPreference(pad_token_id=tokenizer.eos_token_id)(
        list(tokens(dataset(*rows), tokenizer)[0])
    )
    scored = theirs.pop("completion_mask")
    theirs["labels"] = theirs["input_ids"].masked_fill(scored == 0, -100)
    ours = collate(rows, tokenizer)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == torch.int64
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kind", [list, lambda ids: torch.tensor(ids).numpy(), torch.tensor])
def test_rows_of_ids(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)  # which they do without
    rows = [{name: kind(ids) for name, ids in row.items()} for row in IDS]
    for batch in (collate(rows, 0), *DataLoader(rows, 2, collate_fn=lambda rows: collate(rows, 0))):
        assert batch["input_ids"].tolist() == [
            [5, 6, 7, 8, 9],
            [3, 2, 0, 0, 0],
            [5, 6, 4, 0, 0],
            [3, 2, 2, 0, 0],
        ]
        assert batch["attention_mask"].tolist() == [
            [1, 1, 1, 1, 1],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
        ]
        assert batch["labels"].tolist() == [
            [-100, -100, 7, 8, 9],
            [-100, 2, -100, -100, -100],
            [-100, -100, 4, -100, -100],
            [-100, 2, 2, -100, -100],
        ]


def test_padding_that_is_a_token_is_not_scored() -> None:
    """Padding with EOS leaves the EOS of a completion scored, and no other."""
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id is None
    batch = collate([pair("2+2=", "4", "5, no")], tokenizer)
    ends = batch["input_ids"] == eos
    assert ends.sum(1).tolist() == [5, 1]  # "5, no" has four characters more
    assert (batch["labels"] == eos).sum(1).tolist() == [1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [6, 10]


def test_an_implicit_prompt() -> None:
    """As in trl-lib/ultrafeedback_binarized, with scores beside it: TRL takes what both begin with for the prompt."""
    asked = [user("x"), *answer("y"), user("2+2?")]
    chosen, rejected = answer("4"), answer("5")
    tokenizer = byte_level(CHATML)
    implicit = {"chosen": [*asked, *chosen], "rejected": [*asked, *rejected], "score_chosen": 8.0}
    text = {"chosen": "2+2 = 4", "rejected": "2+2 = 5"}
    for row, explicit in (
        (implicit, pair(asked, chosen, rejected)),
        (text, pair("2+2 =", " 4", " 5")),
    ):
        ours, known = (collate([one], tokenizer) for one in (row, explicit))
        for name in known:
            assert torch.equal(ours[name], known[name]), name
    with pytest.raises(ValueError, match=r"rows\[0\]: field 'prompt' is missing, and 'chosen' and"):
        collate([{"chosen": "a", "rejected": "b"}], tokenizer)


def test_padding_stands_on_the_right() -> None:
    tokenizer = byte_level()
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    batch = collate([pair("2+2=", "4", "5, no")], tokenizer)
    assert batch["input_ids"][0, 6:].tolist() == [tokenizer.pad_token_id] * 4


def test_an_empty_completion_of_ids_scores_nothing() -> None:
    batch = collate([{**IDS[0], "rejected_ids": []}], 0)
    assert (batch["labels"] != -100).sum(1).tolist() == [3, 0]


@SLICES
def test_a_warning_comes_once_and_not_with_every_batch() -> None:
    tokenizer = byte_level(merges=[("=", "4")])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            collate([pair("2+2=", "4", "5")], tokenizer)
    assert [str(warning.message)[:70] for warning in seen] == [
        "fastdpop.collate: the end of the prompt and the start of a completion "
    ]
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("rows", "tokenizer", "message"),
    [
        ([], 0, "rows is empty, expected at least one pair"),
        ({"prompt": ["a"]}, 0, "rows is {'prompt': .'a'.}, expected a list of pairs, .*select"),
        ("pairs.jsonl", 0, "rows is 'pairs.jsonl', expected a list of pairs"),
        (3, 0, "rows is 3, expected a list"),
        (["a"], 0, r"rows\[0\] is 'a', expected a dict with prompt, chosen, rejected"),
        (IDS, None, "tokenizer is None, expected a Hugging Face tokenizer or the id that pads"),
        (IDS, True, "the padding id is True, expected a token id"),
        (IDS, -100, "the padding id is -100, expected a token id"),
        (IDS, byte_level(eos=None), "no padding token and no EOS token to pad with: set pad_token"),
        (
            [*IDS, {"prompt_ids": [1], "chosen_ids": [2]}],
            0,
            r"rows\[2\]: field 'rejected_ids' is missing \(fields here: \['chosen_ids', 'prompt_ids'\]\)",
        ),
        ([{"prompt": "a", "chosen": "b"}], 0, r"rows\[0\]: field 'rejected' is missing"),
        ([{**IDS[0], "prompt_ids": []}], 0, r"rows\[0\]: field 'prompt_ids' is empty"),
        ([{**IDS[0], "chosen_ids": [-100]}], 0, r"rows\[0\]: field 'chosen_ids' holds -100, expected"),
        ([{**IDS[0], "chosen_ids": "4"}], 0, r"rows\[0\]: field 'chosen_ids' is '4', expected a seq"),
        ([pair("a")], 0, r"rows\[0\]: field 'chosen' is '.*', and tokenizer a padding id: pass the"),
        ([pair("a"), pair("")], byte_level(), r"rows\[1\]: field 'prompt' is '', expected a text"),
        ([pair("a", 4)], byte_level(), r"rows\[0\]: field 'chosen' is 4, expected a string"),
        ([pair("a", place="x:7", chosen=None)], byte_level(), "x:7: field 'chosen' is None"),
        ([pair(CHAT)], byte_level(), r"rows\[0\]: field 'prompt' is a list of chat messages, but"),
    ],
)  # fmt: skip
def test_what_cannot_be_collated(rows: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate(rows, tokenizer)
