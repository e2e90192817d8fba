"""Mistakes in masks, prompts and completions, made in real batches; and what is near them and right."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpop.batch_check import check_batch
from tests.batch_check.batches import Made, made
from tests.batch_check.real import END, Pair, Recorded, Tokenizer, load, patch

LONG = [pair for pair in load() if pair.kind != "number"]


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch)


def samples(least: int = 1, count: int = 50) -> list[Made]:
    chance = random.Random(5)
    return [made(chance.sample(LONG, chance.randint(least, 6))) for _ in range(count)]


def found(batch: dict[str, Any], known: list[Pair], ref_logps: Any = None) -> Any:
    return check_batch(Recorded(known), batch, ref_logps, tokenizer=Tokenizer(), verbose=False)


def alone(batch: dict[str, Any], **options: Any) -> tuple[str, ...]:
    """Without a model."""
    return check_batch(None, batch, tokenizer=Tokenizer(), verbose=False, **options).codes


def changed(pair: Pair, **parts: list[int]) -> Pair:
    kept = {name: getattr(pair, name) for name in ("kind", "prompt", "chosen", "rejected", "logps")}
    return Pair(**{**kept, **parts})


def split(pair: Pair, at: int = 1) -> Pair:
    """The same text, whose prompt ends earlier."""
    rest = pair.prompt[at:]
    return changed(
        pair, prompt=pair.prompt[:at], chosen=rest + pair.chosen, rejected=rest + pair.rejected
    )


# ---- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["of the completions", "inverse", "additive", "zeros"])
def test_a_mask_that_hides_the_text(kind: str) -> None:
    for sample in samples(count=20):
        mask = sample.batch["attention_mask"]
        wrong = {
            "of the completions": (sample.batch["labels"] != -100).long(),
            "inverse": 1 - mask,
            "additive": (mask.float() - 1) * 1e9,
            "zeros": 0 * mask,
        }[kind]
        report = found({**sample.batch, "attention_mask": wrong}, sample.pairs)
        assert report.codes == ("text-masked",)
        assert (
            f"in {len(wrong)} of {len(wrong)} sequences, first in 0" in report.findings[0].message
        )


def test_two_end_tokens_are_no_padding() -> None:
    """A chat template's and the tokenizer's, which is the padding token too."""
    twice = [
        changed(p, chosen=[*p.chosen, END, END], rejected=[*p.rejected, END, END]) for p in LONG[:4]
    ]
    assert alone(made(twice).batch) == ()
    unmasked = made(twice).batch
    del unmasked["attention_mask"]
    assert alone(unmasked) == ()


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16])
def test_labels_of_another_type(dtype: torch.dtype) -> None:
    """Which the loss refuses, rounded or not."""
    sample = made(LONG[:3])
    report = found({**sample.batch, "labels": sample.batch["labels"].to(dtype)}, sample.pairs)
    assert report.codes == ("labels-dtype",)
    assert str(dtype) in report.findings[0].message
    labels = sample.batch["labels"].int()
    assert found({**sample.batch, "labels": labels}, sample.pairs).ok


def test_labels_that_begin_apart() -> None:
    for sample in samples():
        labels = sample.batch["labels"].clone()
        for row, pair in enumerate(sample.pairs):  # a token of the prompt is scored on one side
            labels[row, len(pair.prompt) - 1] = pair.prompt[-1]
        report = found({**sample.batch, "labels": labels}, sample.pairs)
        assert report.codes == ("labels-begin-apart",)


def test_a_prompt_of_one_token_is_not_scored() -> None:
    """Though completions may begin alike; where the token is scored, they are the text's."""
    pairs = [split(pair) for pair in LONG[:3]]
    batch = made(pairs).batch
    assert alone(batch) == ()
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    assert alone(batch) == ("prompt-scored",)


def test_a_reference_of_a_prompt_of_one_token() -> None:
    """Of which the policy's log-prob is the same with its prompt and without."""
    sample = made([split(pair) for pair in LONG[:3]])
    assert found(sample.batch, sample.pairs, sample.references()).ok


# ---- pairs --------------------------------------------------------------------------------------


def again(pair: Pair, begin: int = 0) -> Pair:
    prompt = pair.prompt[begin:]
    return changed(pair, chosen=prompt + pair.chosen, rejected=prompt + pair.rejected)


@pytest.mark.parametrize("begin", [0, 1])
def test_prompts_that_completions_repeat(begin: int) -> None:
    """With and without a first token, such as BOS."""
    for sample in samples(count=20):
        assert alone(made([again(pair, begin) for pair in sample.pairs]).batch) == (
            "prompt-repeated",
        )
    one_of_four = [again(LONG[0]), *LONG[1:4]]
    assert alone(made(one_of_four).batch) == ()
    one_side = [changed(p, chosen=p.prompt + p.chosen) for p in LONG[:3]]
    assert alone(made(one_side).batch) == ()


def test_pairs_that_contradict() -> None:
    for sample in samples(count=20):
        first = sample.pairs[0]
        against = changed(first, chosen=first.rejected, rejected=first.chosen)
        known = [*sample.pairs, first, against]
        batch = made([*sample.pairs, against]).batch
        report = found(batch, known[: len(sample.pairs)])
        assert report.codes == ("pairs-contradict",)
        assert f"in pairs 0 and {len(sample.pairs)} " in report.findings[0].message


def test_pairs_that_are_there_twice() -> None:
    for sample in samples(count=20):
        again = made([*sample.pairs, sample.pairs[-1]])
        report = found(again.batch, sample.pairs)
        assert report.codes == ("pairs-repeated",)
        count = len(sample.pairs)
        assert f"pair {count} is pair {count - 1}" in report.findings[0].message
    # Several rejected completions of one chosen one are other pairs.
    other = changed(LONG[0], rejected=LONG[0].rejected[:-2])
    assert alone(made([LONG[0], other]).batch) == ()


def test_completions_of_nothing_but_an_end() -> None:
    for sample in samples(count=20):
        first = changed(sample.pairs[0], rejected=[END])
        report = alone(made([first, *sample.pairs[1:]]).batch)
        assert report == ("completion-empty",)


def test_completions_of_blanks() -> None:
    class Blank(Tokenizer):
        def decode(self, ids: list[int], **_: Any) -> str:
            return "\n" if ids == [28] else super().decode(ids)

    batch = made([changed(LONG[0], rejected=[END, 28]), LONG[1]]).batch
    report = check_batch(None, batch, tokenizer=Blank(), verbose=False)
    assert report.codes == ("completion-empty",)
    assert "1 of 4 completions" in report.findings[0].message
    assert "that of sequence 2" in report.findings[0].message
    assert alone(batch) == ()  # no blank to this tokenizer


# ---- layouts, words -----------------------------------------------------------------------------


def test_bounds_and_pairs_in_the_batch() -> None:
    sample = made(LONG[:3], "packed")
    assert found({**sample.batch, **sample.options}, sample.pairs).ok
    sample = made(LONG[:3], "pairs")
    assert found({**sample.batch, **sample.options}, sample.pairs).ok


def text(batch: dict[str, Tensor], **options: Any) -> str:
    return str(check_batch(None, batch, tokenizer=Tokenizer(), verbose=False, **options))


def test_numbers_agree_with_their_nouns() -> None:
    one = made(LONG[:1], "wide").batch
    assert "2 sequences in 1 pair, padded: " in text(one)
    both = {**one, "labels": one["input_ids"]}
    attended, padding = int(one["attention_mask"].sum()), int((one["attention_mask"] == 0).sum())
    assert f"{attended - 2} of {attended} tokens are scored, and {padding} of padding" in text(both)
    half = {name: value[:1] for name, value in one.items()}
    assert "1 sequence, no pairs, padded" in text(half)
    assert "the batch holds 1 sequence, an odd number" in text(half)
