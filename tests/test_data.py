"""Reading pairs, corrupting answers, tokenising and batching."""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpop.data import (
    Batches,
    Pair,
    TokenPair,
    batch_numbers,
    collate,
    corrupt,
    read_jsonl,
    read_pairs,
    tokenise,
    without_annotations,
)
from tests.tiny_model import CHATML, tiny_tokenizer

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ reading


def test_reads_text_and_chat_prompts(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "ü"}]
    path = write(tmp_path / "p.jsonl", {**GOOD, "score": 3}, "", {**GOOD, "prompt": chat})
    assert read_pairs(path) == [Pair("p", "c", "r"), Pair(chat, "c", "r")]


def test_empty_completion_is_legal(tmp_path: Path) -> None:
    assert read_pairs(write(tmp_path / "p.jsonl", {**GOOD, "chosen": ""}))[0].chosen == ""


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(read_pairs(path)) == 1


def test_equal_completions_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, {**GOOD, "rejected": "c"})
    with pytest.warns(UserWarning, match="chosen equals rejected in 1 of 2 pairs"):
        assert len(read_pairs(path)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "c"}, "field 'rejected' is missing"),
        ({**GOOD, "chosen": 3}, "field 'chosen' is a number, expected a string"),
        ({**GOOD, "chosen": None}, "field 'chosen' is null"),
        ({**GOOD, "rejected": ["r"]}, "field 'rejected' is a list"),
        ({**GOOD, "prompt": ""}, "field 'prompt' is empty"),
        ({**GOOD, "prompt": []}, "field 'prompt' is empty"),
        ({**GOOD, "prompt": True}, "field 'prompt' is a boolean"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "message 0 has no string 'content'"),
        ({**GOOD, "prompt": ["hello"]}, "message 0 has no string 'role'"),
        (
            {**GOOD, "prompt": [{"role": "assistant", "content": "x"}]},
            "field 'prompt' ends with an assistant message",
        ),
        ([1, 2], "expected an object, got a list"),
        ('{"prompt": "p",', "invalid JSON at column"),
    ],
)
def test_malformed_rows_name_file_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, row)
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: not UTF-8"):
        read_pairs(path)


def test_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        read_pairs(write(tmp_path / "p.jsonl", ""))


# --------------------------------------------------------------------------------------- corruption

ANSWER = "Each costs $25 + $22 = $<<25+22=47>>47.\nAll cost 16 * 47 = $<<16*47=752>>752.\n#### 752"


def test_corrupts_the_only_intermediate_result() -> None:
    clean = without_annotations(ANSWER)
    assert clean == "Each costs $25 + $22 = $47.\nAll cost 16 * 47 = $752.\n#### 752"
    for seed in range(20):
        wrong = corrupt(ANSWER, random.Random(seed))
        assert wrong is not None
        before, rest = wrong.split(" = $", 1)
        value, after = rest.split(".", 1)
        assert before == "Each costs $25 + $22"
        assert value != "47"
        assert int(value) > 0
        assert after == "\nAll cost 16 * 47 = $752.\n#### 752"


@pytest.mark.parametrize(
    "answer",
    [
        "No annotation.\n#### 3",
        "Only the last: <<1+2=3>>3\n#### 3",
        "Shown otherwise: <<1000*2=2000>>2,000 and <<2000+1=2001>>2001\n#### 2001",
        "Longer number: <<1+1=2>>20 and <<2+1=3>>3\n#### 3",
    ],
)
def test_answers_without_a_plain_intermediate_result(answer: str) -> None:
    assert corrupt(answer, random.Random(0)) is None


def test_decimals() -> None:
    wrong = corrupt("<<12/60=0.2>>0.2 then <<0.2*50=10>>10\n#### 10", random.Random(0))
    assert wrong in {f"{e}.2 then 10\n#### 10" for e in (1, 2, 3, 5, 10)}


@pytest.mark.parametrize(("split", "count"), [("train", 300), ("test", 60)])
def test_shipped_problems_can_all_be_corrupted(split: str, count: int) -> None:
    path = resources.files("fastdpop") / "assets" / f"gsm8k-{split}.jsonl"
    rows = [row for _, row in read_jsonl(str(path))]
    assert len({row["question"] for row in rows}) == count
    for row in rows:
        clean, wrong = without_annotations(row["answer"]), corrupt(row["answer"], random.Random(0))
        assert wrong is not None
        assert wrong != clean
        assert wrong.split("####")[1] == clean.split("####")[1]


def test_shipped_splits_are_disjoint() -> None:
    train, test = (
        {
            row["question"]
            for _, row in read_jsonl(
                str(resources.files("fastdpop") / "assets" / f"gsm8k-{split}.jsonl")
            )
        }
        for split in ("train", "test")
    )
    assert not train & test


# ------------------------------------------------------------------------------------- tokenisation


def decoded(tokenizer: Any, pair: TokenPair) -> tuple[str, str, str]:
    prompt, chosen, rejected = (
        tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)
    )
    return prompt, chosen, rejected


def test_plain_text_ends_with_eos() -> None:
    tokenizer = tiny_tokenizer()
    (ids,), dropped = tokenise([Pair("Q: ", "yes", "")], tokenizer)
    assert decoded(tokenizer, ids) == ("Q: ", "yes<|end|>", "<|end|>")
    assert dropped == 0


def test_chat_template_ends_with_its_turn_end() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    (text, turns), _ = tokenise([Pair("hi", " a ", "b"), Pair(chat, "a", "b")], tokenizer)
    assert decoded(tokenizer, text) == (
        "<|user|>hi<|end|>\n<|assistant|>",
        " a <|end|>",
        "b<|end|>",
    )
    assert decoded(tokenizer, turns)[0] == "<|system|>s<|end|>\n<|user|>hi<|end|>\n<|assistant|>"


def test_template_without_generation_prompt() -> None:
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
        "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    (ids,), _ = tokenise([Pair("hi", "a", "b")], tokenizer)
    assert decoded(tokenizer, ids) == ("[hi]", "a<|end|>", "b<|end|>")


def test_template_without_turn_end_takes_eos() -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    (ids,), _ = tokenise([Pair("hi", "a", "b")], tokenizer)
    assert decoded(tokenizer, ids) == ("hi\n", "a<|end|>", "b<|end|>")


def test_too_long_pairs_are_an_error_or_dropped_whole() -> None:
    tokenizer = tiny_tokenizer()
    pairs = [Pair("p", "c", "r"), Pair("p", "c", "r" * 20), Pair("p", "", "")]
    with pytest.raises(ValueError, match="pair 1 has 22 tokens, more than max_length = 10"):
        tokenise(pairs, tokenizer, max_length=10)
    kept, dropped = tokenise(pairs, tokenizer, max_length=10, too_long="drop")
    assert (len(kept), dropped) == (2, 1)
    with pytest.raises(ValueError, match="all 1 pairs"):
        tokenise(pairs[1:2], tokenizer, max_length=10, too_long="drop")


def test_bad_arguments() -> None:
    tokenizer = tiny_tokenizer()
    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="no chat template"):
        tokenise([Pair(chat, "c", "r")], tokenizer)
    with pytest.raises(ValueError, match="too_long is 'cut'"):
        tokenise([Pair("p", "c", "r")], tokenizer, too_long="cut")
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenise([Pair("p", "c", "r")], tokenizer, max_length=1)
    with pytest.raises(ValueError, match="pair 0 has no tokens"):
        tokenise([Pair("", "c", "r")], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        tokenise([Pair("p", "c", "r")], tokenizer)


# ----------------------------------------------------------------------------------------- batching


def test_collate_masks_prompt_and_padding() -> None:
    batch = collate([TokenPair((1, 2), (3,), (4, 5)), TokenPair((6,), (7,), (8,))], pad_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [6, 7, 0, 0], [1, 2, 4, 5], [6, 8, 0, 0]]
    x = -100
    assert batch["labels"].tolist() == [[x, x, 3, x], [x, 7, x, x], [x, x, 4, 5], [x, 8, x, x]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 4, 2]
    assert all(value.dtype == torch.int64 for value in batch.values())
    with pytest.raises(ValueError, match="pairs is empty"):
        collate([], pad_id=0)


def test_batches_keep_their_composition() -> None:
    pairs = [TokenPair((i,), (1,), (2,)) for i in range(10)]
    batches = Batches.shuffled(pairs, 4, 0, seed=3)
    assert len(batches) == 3
    assert sorted(batches.pairs, key=lambda p: p.prompt) == pairs
    assert batches[2]["input_ids"].shape == (4, 2)
    assert batches.digest() == Batches.shuffled(pairs, 4, 0, seed=3).digest()
    assert batches.digest() != Batches.shuffled(pairs, 4, 0, seed=4).digest()
    with pytest.raises(ValueError, match="size is 0"):
        Batches(pairs, 0, 0)


def test_every_epoch_meets_every_batch_once_in_its_own_order() -> None:
    numbers = [n for step in range(10) for n in batch_numbers(5, step, accumulate=2, seed=1)]
    epochs = [numbers[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
