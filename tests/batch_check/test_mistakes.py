"""Every mistake made on purpose, in 50 real batches each, and caught in all of them by its name."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpop.batch_check import check_batch
from tests.batch_check.batches import Made, good, made
from tests.batch_check.real import END, VOCABULARY, Recorded, Tokenizer, load, patch

PAIRS = load()
LONG = [pair for pair in PAIRS if pair.kind != "number"]


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch)


def samples(least: int = 1, count: int = 50) -> list[Made]:
    """Padded batches of completions of several tokens."""
    chance = random.Random(2)
    return [made(chance.sample(LONG, chance.randint(least, 6))) for _ in range(count)]


def found(batch: dict[str, Any], known: Any, ref_logps: Any = None, **options: Any) -> Any:
    return check_batch(
        Recorded(known), batch, ref_logps, tokenizer=Tokenizer(), verbose=False, **options
    )


# ---- labels -------------------------------------------------------------------------------------


def shifted(batch: dict[str, Tensor], by: int = 1) -> Tensor:
    fill = torch.full((len(batch["labels"]), by), -100)
    return torch.cat([batch["labels"][:, by:], fill], 1)


def unlabelled(batch: dict[str, Tensor], value: int) -> Tensor:
    return batch["labels"].masked_fill(batch["labels"] == -100, value)


LABELS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Tensor]]] = {
    "already shifted": ("labels-shifted", shifted),
    "shifted twice": ("labels-shifted", lambda b: shifted(b, 2)),
    "shifted the wrong way": ("labels-shifted", lambda b: b["labels"].roll(1, 1)),
    "a mask": ("labels-mask", lambda b: (b["labels"] != -100).long()),
    "a bool mask": ("labels-mask", lambda b: b["labels"] != -100),
    "a float mask": ("labels-mask", lambda b: (b["labels"] != -100).float()),
    "a mask with -100": ("labels-mask", lambda b: b["labels"].clamp(max=1)),
    "0 for not scored": ("labels-ignore-index", lambda b: unlabelled(b, 0)),
    "-1 for not scored": ("labels-ignore-index", lambda b: unlabelled(b, -1)),
    "of other sequences": ("labels-differ", lambda b: b["labels"].flip(0)),
    "none": ("nothing-scored", lambda b: torch.full_like(b["labels"], -100)),
    "padding too": ("padding-scored", lambda b: b["labels"].where(b["attention_mask"] == 1, END)),
    "prompts too": (
        "prompt-scored",
        lambda b: b["input_ids"].masked_fill(b["attention_mask"] == 0, -100),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    code, mistake = LABELS[name]
    caught = 0
    for sample in samples():
        if code == "padding-scored" and bool(sample.batch["attention_mask"].all()):
            continue
        if name == "of other sequences" and len(sample.pairs) < 2:
            sample = made(sample.pairs + LONG[:1])
        report = found({**sample.batch, "labels": mistake(sample.batch)}, sample.pairs)
        assert report.codes[:1] == (code,), str(report)
        caught += 1
    assert caught >= 40  # some have no padding


def test_padding_scored_without_a_mask() -> None:
    for sample in samples(least=2):
        batch = {n: v for n, v in sample.batch.items() if n != "attention_mask"}
        batch["labels"] = batch["labels"].where(sample.batch["attention_mask"] == 1, END)
        run = (sample.batch["attention_mask"] == 0).sum(1).max()
        codes = found(batch, sample.pairs).codes
        assert codes == (("padding-scored",) if run >= 1 else ()), int(run)


def test_prompt_and_padding_scored() -> None:
    sample = made(LONG[:3])
    report = found({**sample.batch, "labels": sample.batch["input_ids"]}, sample.pairs)
    assert set(report.codes) == {"padding-scored", "prompt-scored"}


def test_the_end_is_not_scored() -> None:
    """Labels masked by the padding token's id, which is the end token's."""
    for sample in samples():
        labels = sample.batch["labels"].masked_fill(sample.batch["input_ids"] == END, -100)
        assert found({**sample.batch, "labels": labels}, sample.pairs).codes == ("end-not-scored",)


def test_shifted_labels_that_are_said_to_be() -> None:
    sample = made(LONG[:3])
    batch = {**sample.batch, "labels": shifted(sample.batch)}
    assert found(batch, sample.pairs, shift_labels=False).ok
    assert found(sample.batch, sample.pairs, shift_labels=False).codes == ("labels-shifted",)


# ---- sequences ----------------------------------------------------------------------------------


def alternating(values: Tensor) -> Tensor:
    return torch.stack(values.chunk(2), 1).flatten(0, 1)


def test_interleaved() -> None:
    for sample in samples(least=2):
        batch = {name: alternating(value) for name, value in sample.batch.items()}
        assert found(batch, sample.pairs, alternating(sample.references())).codes == (
            "interleaved",
        )


def test_interleaved_with_prompts_scored() -> None:
    sample = made(LONG[:4])
    batch = {name: alternating(value) for name, value in sample.batch.items()}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert "interleaved" in found(batch, sample.pairs).codes


def test_other_prompts() -> None:
    for sample in samples(least=2):
        half = len(sample.pairs)
        order = [*range(half), *range(half + 1, 2 * half), half]
        batch = {name: value[order] for name, value in sample.batch.items()}
        assert found(batch, sample.pairs).codes == ("prompts-differ",)


def test_chosen_equals_rejected() -> None:
    for sample in samples():
        half = len(sample.pairs)
        batch = {name: value[:half].repeat(2, 1) for name, value in sample.batch.items()}
        report = found(batch, sample.pairs, sample.references()[:half].repeat(2))
        assert [(f.code, f.severity) for f in report.findings] == [
            ("chosen-equals-rejected", "error")
        ]
    sample = made(LONG[:3])
    batch = {name: value.clone() for name, value in sample.batch.items()}
    for value in batch.values():
        value[3] = value[0]
    (finding,) = found(batch, sample.pairs).findings
    assert (finding.code, finding.severity) == ("chosen-equals-rejected", "warning")
    assert "1 of 3 pairs, first in pair 0" in finding.message


def test_an_odd_number() -> None:
    sample = made(LONG[:2])
    batch = {name: value[:3] for name, value in sample.batch.items()}
    assert found(batch, sample.pairs).codes == ("odd-rows",)


def test_nothing_scored_in_one_sequence() -> None:
    sample = made(LONG[:2])
    sample.batch["labels"][1] = -100
    report = found(sample.batch, sample.pairs)
    assert report.codes == ("sequence-not-scored",)
    assert "1 of 4 sequences, first in 1" in report.findings[0].message


@pytest.mark.parametrize("wrong", [-100, VOCABULARY])
def test_ids_without_an_embedding(wrong: int) -> None:
    sample = made(LONG[:2])
    sample.batch["input_ids"][0, 0] = wrong
    report = found(sample.batch, sample.pairs)
    assert report.codes == ("ids-out-of-vocabulary",)


def test_two_beginnings() -> None:
    sample = made([pair for pair in LONG if pair.prompt[0] == 1][:2])
    batch = {n: torch.cat([v[:, :1], v], 1) for n, v in sample.batch.items()}
    assert check_batch(None, batch, tokenizer=Tokenizer(), verbose=False).codes == ("bos-twice",)


def test_padding_that_is_attended_to() -> None:
    sample = made(LONG[:3], "left")
    batch = {n: v for n, v in sample.batch.items() if n != "attention_mask"}
    assert check_batch(None, batch, tokenizer=Tokenizer(), verbose=False).codes == (
        "padding-attended",
    )


# ---- references ---------------------------------------------------------------------------------


def lengths(sample: Made) -> Tensor:
    return (sample.batch["labels"] != -100).sum(1)


def moved(sample: Made, values: Tensor) -> Tensor:
    """Each pair's to the next one."""
    return values.view(2, -1).roll(1, 1).flatten()


REFERENCES: dict[str, tuple[str, int, Callable[[Made, Tensor], Tensor]]] = {
    "swapped": ("ref-swapped", 2, lambda _, ref: ref.view(2, -1).flip(0).flatten()),
    "averaged": ("ref-averaged", 1, lambda s, ref: ref / lengths(s)),
    "times beta": ("ref-scaled", 2, lambda _, ref: 0.3 * ref),
    "to base 2": ("ref-scaled", 2, lambda _, ref: ref * 1.4427),
    "losses": ("ref-positive", 1, lambda _, ref: -ref),
    "prompts too": ("ref-whole-sequence", 1, lambda s, _: s.references(whole=True)),
    "of the pair before": ("ref-order", 2, moved),
    "alternating": ("ref-order", 3, lambda _, ref: alternating(ref)),
    "zeros": ("ref-zero", 1, lambda _, ref: 0 * ref),
    "not a number": ("ref-not-finite", 1, lambda _, ref: ref.index_fill(0, torch.tensor(1), torch.nan)),
    "another tokenizer's": ("ref-unlikely", 2, lambda s, _: s.references("foreign")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_references(name: str) -> None:
    code, least, mistake = REFERENCES[name]
    for sample in samples(least):
        report = found(sample.batch, sample.pairs, mistake(sample, sample.references()))
        assert report.codes == (code,), str(report)


@pytest.mark.parametrize("reference", ["policy", "other"])
def test_references_of_another_batch(reference: str) -> None:
    """Of problems of one kind, whose solutions are alike in length, in 3 of 4 batches; with `at_start` in all."""
    chance, caught = random.Random(3), 0
    for _ in range(50):
        drawn = chance.sample(LONG, 16)
        sample = made(drawn[:8])
        stale = made(drawn[8:]).references(reference)
        caught += not found(sample.batch, sample.pairs, stale).ok
        assert not found(sample.batch, sample.pairs, stale, at_start=True).ok
    assert caught >= 35


def test_stale_references() -> None:
    """Of other weights: whoever knows that they are to be the model's own is told."""
    for sample in samples():
        report = found(sample.batch, sample.pairs, sample.references("other"), at_start=True)
        assert report.codes == ("ref-stale",)
        assert found(sample.batch, sample.pairs, sample.references("other")).ok


def test_swapped_references_of_another_model() -> None:
    chance, caught = random.Random(4), 0
    for _ in range(50):
        sample = made(chance.sample(LONG, 6))
        other = sample.references("other").view(2, -1).flip(0).flatten()
        caught += found(sample.batch, sample.pairs, other).codes == ("ref-swapped",)
    assert caught >= 35


def test_good_batches_stay_good_whatever_else_is_checked() -> None:
    """The same batches as above, as they were before the mistakes."""
    for sample in samples():
        assert found(sample.batch, sample.pairs, sample.references(), at_start=True).ok
    assert all(found(m.batch, m.pairs, **m.options).ok for m in good(LONG, 10))
