"""Columns of the data whose numbers go to the loss with each pair, in every way that a trainer makes its batches."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from torch import Tensor

import fastdpop
from fastdpop import losses
from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer, batch, values
from fastdpop.integrations.trl.values import WithValues
from fastdpop.unrounded import opened
from tests.integrations.trl_setup import (
    WARNINGS,
    DPOConfig,
    DPOTrainer,
    gradients,
    logged,
    pairs,
    step,
    trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

WEIGHTS = [0.0, 0.1, 0.3, 1.0, 1.7, 2.0, 3.3, 5.0]
"""Most of them are no 16-bit and no 32-bit numbers."""


def weighted(count: int = 8, **columns: list[Any]) -> Dataset:
    data = pairs(count)
    for name, column in ({"weight": WEIGHTS[:count]} | columns).items():
        data = data.add_column(name, column[:count])
    return data


def fast(folder: Path, data: Any = None, **options: Any) -> Any:
    options = {"config": FastDPOConfig, "loss_type": "dpop", "pair_values": ["weight"], **options}
    return trainer(FastDPOTrainer, folder, data=weighted() if data is None else data, **options)


class Seen:
    """What the model is given in its calls with a loss: token ids and values, side by side."""

    def __init__(self, of: Any) -> None:
        self.calls: list[tuple[list[int], dict[str, Tensor]]] = []
        of.model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if "preference" in kwargs:
            given = kwargs["preference_options"].get(batch.KEY)
            ids = kwargs["input_ids"]
            self.calls.append((ids[: len(ids) // 2].tolist(), opened(given)))


def check_sides(seen: Seen, of: Any, data: Dataset, name: str = "weight") -> None:
    """Every pair came with its own number, to the last bit."""
    tokenizer = of.processing_class
    texts = [row["prompt"] + row["chosen"] for row in data]
    expected = dict(zip(texts, data[name][:], strict=True))
    assert len(expected) == len(data)
    found = []
    for ids, given in seen.calls:
        assert given[name].dtype == torch.float64
        for row, value in zip(ids, given[name].tolist(), strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            assert value == expected[text]
            found.append(value)
    assert found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"remove_unused_columns": False},
        {"share_prefixes": True},
        {"padding_free": True},
        {"precompute_ref_log_probs": True},
        {"dataloader_num_workers": 1},
        {"pair_values": ["weight", "margin"], "loss_type": "sigmoid", "beta": 1.0},
        {"bf16": True},
    ],
    ids=str,
)
def test_every_pair_comes_with_its_own(options: dict[str, Any], tmp_path: Path) -> None:
    """Through shuffling, and in an evaluation."""
    data = weighted(margin=[x / 7 for x in range(8)])
    given: dict[str, Any] = {"eval_dataset": data}
    if "pair_values" in options:
        given["loss"] = losses.pairwise(lambda p: p.rejected - p.chosen + p.values["margin"])
    of = fast(tmp_path, data, given=given, **options)
    seen = Seen(of)
    of.train()
    assert len(seen.calls) == 3
    of.evaluate()
    assert len(seen.calls) == 5
    for name in of.args.pair_values:
        check_sides(seen, of, data, name)


@pytest.fixture
def patched() -> Iterator[None]:
    fastdpop.patch_trl()
    yield
    fastdpop.unpatch_trl()


def test_a_patched_trainer_does_the_same(tmp_path: Path, patched: None) -> None:
    options = {"loss_type": "dpop", "pair_values": ["weight"]}
    ours = trainer(DPOTrainer, tmp_path, data=weighted(), **options)
    theirs = fast(tmp_path)
    seen = Seen(ours)
    for of in (ours, theirs):
        of.train()
    check_sides(seen, ours, weighted())
    names = ("loss", "grad_norm", "logratios/chosen")
    assert logged(ours, *names) == logged(theirs, *names)
    plain = trainer(DPOTrainer, tmp_path, data=weighted(), loss_type="dpop")
    plain.train()
    assert logged(plain, "loss") != logged(ours, "loss")


def test_unpatched_classes_and_stock_trainers_know_nothing(tmp_path: Path) -> None:
    stock = trainer(DPOTrainer, tmp_path)
    fastdpop.patch_trl()
    assert type(stock.data_collator).__name__ == "DataCollatorForPreference"
    assert "penalty" not in step(stock)[2]
    fastdpop.unpatch_trl()
    assert "data_collator" not in vars(DPOTrainer)


def test_a_weighted_loss_is_that_of_its_pairs(tmp_path: Path) -> None:
    """The mean over pairs of weight times loss, and its gradient."""
    of = fast(tmp_path, per_device_train_batch_size=8, train_sampling_strategy="sequential")
    plain = fast(
        tmp_path,
        pair_values=None,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
    )
    loss, gradient, _ = step(of)
    total: Any = 0.0
    plain.model.zero_grad()
    for weight, inputs in zip(WEIGHTS, plain.get_train_dataloader(), strict=True):
        own = plain.compute_loss(plain.model, plain._prepare_inputs(inputs))
        total = total + weight / 8 * own
    total.backward()
    torch.testing.assert_close(loss, total.detach(), rtol=1e-5, atol=1e-7)
    expected = gradients(plain.model)
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5 * largest)


def test_a_stream(tmp_path: Path) -> None:
    data = weighted()
    stream: IterableDataset = data.to_iterable_dataset()
    of = fast(tmp_path, stream, max_steps=2)
    seen = Seen(of)
    of.train()
    check_sides(seen, of, data)
    texts = weighted(weight=["1.5"] * 8).to_iterable_dataset()
    with pytest.raises(
        ValueError, match=r"field 'weight' is '1\.5', expected a finite number >= 0"
    ):
        fast(tmp_path, texts).train()
    broken = weighted(weight=[1.0, float("nan"), *WEIGHTS[2:]]).to_iterable_dataset()
    with pytest.raises(ValueError, match="field 'weight' is nan, expected a finite number >= 0"):
        fast(tmp_path, broken).train()


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    """Reads any name."""
    given = []

    def own(logps: losses.PairLogps) -> Tensor:
        given.append(logps.values["quality"].tolist())
        return logps.values["quality"] * (logps.rejected - logps.chosen)

    data = pairs().add_column("quality", WEIGHTS)
    of = fast(
        tmp_path,
        data,
        loss_type="sigmoid",
        beta=1.0,
        pair_values=["quality"],
        train_sampling_strategy="sequential",
        given={"loss": losses.as_loss(own)},
    )
    step(of)
    assert given[-1] == WEIGHTS[:4]


def test_a_collator_can_be_sent_and_seen_through() -> None:
    def inner(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": torch.zeros(2 * len(examples), 3)}

    made = WithValues(inner, ["weight"])
    found = made([{"weight": 0.1}, {"weight": 2}])
    assert opened(found[batch.KEY])["weight"].tolist() == [0.1, 2.0]
    assert values.without(made) is inner
    copied = pickle.loads(pickle.dumps(WithValues(str.upper, ["weight"])))
    assert (copied.inner, copied.names) == (str.upper, ("weight",))
    assert copied.__doc__ is not None
    with pytest.raises(AttributeError, match="tokenizer"):
        copied.tokenizer  # noqa: B018


def test_cached_log_probs_do_not_depend_on_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for names in (None, ["weight"]):
        fast(tmp_path, pair_values=names, precompute_ref_log_probs=True)
    said = capsys.readouterr().err
    assert (said.count("computed, and kept"), said.count("found in")) == (1, 1)


# ---- errors, all before the first step ----------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ([1.0, 2.0, None, *WEIGHTS[3:]], "row 3 of the train dataset: field 'weight' is None"),
        ([1.0, float("nan"), *WEIGHTS[2:]], "row 2 of the train dataset: field 'weight' is nan"),
        ([*WEIGHTS[:7], float("inf")], "row 8 of the train dataset: field 'weight' is inf"),
        (
            [-0.1, *WEIGHTS[1:]],
            "row 1 of the train dataset: field 'weight' is -0.1, expected a finite",
        ),
        (["1"] * 8, "column 'weight' of the train dataset is Value"),
        ([True] * 8, "column 'weight' of the train dataset is Value"),
        ([[1.0]] * 8, "column 'weight' of the train dataset is List"),
    ],
)
def test_what_is_no_number(column: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight") as error:
        fast(tmp_path, pairs().add_column("weight", column))
    assert said in str(error.value)


def test_integers_are_numbers(tmp_path: Path) -> None:
    seen = Seen(of := fast(tmp_path, weighted(weight=[*range(8)])))
    of.train()
    check_sides(seen, of, weighted(weight=[float(x) for x in range(8)]))


def test_columns_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the train dataset has no column 'weight', which pair_va"):
        fast(tmp_path, pairs())
    with pytest.raises(ValueError, match="the eval dataset has no column 'weight', which pair_va"):
        fast(tmp_path, given={"eval_dataset": pairs()})


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        ("weight", TypeError, "pair_values is 'weight', expected a list"),
        ([1], TypeError, r"pair_values is \[1\], expected a list"),
        (["weight", "weight"], ValueError, "contains 'weight' twice"),
        (["prompt"], ValueError, "contains 'prompt', expected columns of numbers"),
        (["list"], ValueError, "contains 'list', which a trainer cannot give"),
    ],
)
def test_what_are_no_names(
    names: Any, error: type[Exception], said: str, tmp_path: Path, patched: None
) -> None:
    for config in (FastDPOConfig, DPOConfig):
        with pytest.raises(error, match=said):
            config(str(tmp_path), pair_values=names, use_cpu=True, bf16=False)


def test_values_that_the_loss_does_not_read(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"pair_values contains 'margin', which .*SFT.* does not read"
    ):
        fast(tmp_path, weighted(margin=WEIGHTS), loss_type="sft", pair_values=["margin"])


def test_standard_columns_that_nobody_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = weighted(margin=WEIGHTS, offset=["a"] * 8, other=WEIGHTS)
    with caplog.at_level(logging.WARNING, "fastdpop"):
        fast(tmp_path, data, given={"eval_dataset": weighted()})
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("fastdpop")]
    assert "the loss does not get margin of the train dataset, expected pair_values=" in said
    assert "pair_values=['weight', 'margin']" in said


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "pair_values=['weight', 'margin'] if"),
        ({"pair_values": None}, "pair_values=['weight', 'margin'] if"),
        ({"pair_values": None, "loss_type": "sft"}, "pair_values=['weight'] if"),
        ({"loss_type": "sft"}, None),
        ({"pair_values": ["chosen_score", "rejected_score"], "given": {"loss": losses.get("rpo_sq", beta=0.5)}},
         "pair_values=['chosen_score', 'rejected_score', 'weight'] if"),
    ],
)  # fmt: skip
def test_only_what_the_loss_reads_and_can_be_given(
    options: dict[str, Any], advice: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = [*WEIGHTS[:7], None]
    scores = {"chosen_score": WEIGHTS, "rejected_score": WEIGHTS}
    data = weighted(margin=WEIGHTS, offset=missing, **scores)
    if "given" in options:
        options = {**options, "loss_type": "sigmoid"}
    with caplog.at_level(logging.WARNING, "fastdpop"):
        fast(tmp_path, data, **options)
    said = [r.getMessage() for r in caplog.records if "does not get" in r.getMessage()]
    assert len(said) == (advice is not None)
    if advice is not None:
        assert advice in said[0]
