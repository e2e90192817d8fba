"""Prefixes that are computed once in TRL's trainers: who turns it on, equal results, pairs of one prompt together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import HfArgumentParser, TrainerCallback

import fastdpop
from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer, models
from tests.integrations.test_trl import lora
from tests.integrations.trl_setup import (
    WARNINGS,
    DPOConfig,
    DPOTrainer,
    arguments,
    logged,
    model,
    trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

PROMPTS, EACH = 4, 3
NAMES = (
    "loss",
    "grad_norm",
    "rewards/margins",
    "penalty",
    "logits/chosen",
    "entropy",
    "num_tokens",
)


def data() -> Dataset:
    """Three pairs for each of four prompts, no two of one prompt beside each other."""
    return Dataset.from_list(
        [
            {
                "prompt": f"What is {n} + {n}? Answer: ",
                "chosen": f"That is easily said: {2 * n}",
                "rejected": f"That is easily said: {2 * n + wrong}" + "!" * wrong,
            }
            for wrong in range(1, EACH + 1)
            for n in range(11, 11 + PROMPTS)
        ]
    )


def made(
    folder: Path, share: bool | None = True, kind: Any = FastDPOTrainer, **options: Any
) -> Any:
    """A trainer whose policy has the reference's weights."""
    defaults: dict[str, Any] = {"config": FastDPOConfig, "loss_type": "dpop", "dpop_lambda": 5.0}
    defaults |= {"reference": model(), "data": data()}
    return trainer(kind, folder, **{**defaults, "share_prefixes": share, **options})


def shares(of: Any) -> bool:
    """What it computes with; everything that has to agree does."""
    settings = [models._taken[each][0].settings for each in (of.model, of.ref_model)]
    (one,) = {of._fastdpop.share_prefixes, *(each["share_prefixes"] for each in settings)}
    return bool(one)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of an embedding computes."""
    counted: list[int] = []
    own = torch.nn.Embedding.forward

    def forward(self: Any, ids: Tensor) -> Tensor:
        counted.append(ids.numel())
        return own(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    return counted


# ---- the same training --------------------------------------------------------------------------


CASES: dict[str, Any] = {
    "live": lambda: {},
    "precomputed": lambda: {"precompute_ref_log_probs": True},
    "adapter": lambda: {"reference": None, "given": {"peft_config": lora(init_lora_weights=True)}},
    "checkpointing": lambda: {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same(case: str, tmp_path: Path, tokens: list[int]) -> None:
    """On batches of all pairs, whose order has no effect."""
    runs, computed = [], []
    for share in (False, True):
        torch.manual_seed(3)
        of = made(tmp_path, share, per_device_train_batch_size=12, **CASES[case]())
        start = {n: p.detach().clone() for n, p in of.model.named_parameters()}
        of.train()
        computed.append(tokens[-1])
        tokens.clear()
        runs.append((logged(of, *NAMES), {n: p.detach() for n, p in of.model.named_parameters()}))
        first = of.state.log_history[0]
        assert first["logratios/chosen"] == first["logratios/rejected"] == first["penalty"] == 0.0
    assert computed[1] < 0.4 * computed[0]
    (rows, weights), (shared_rows, shared_weights) = runs
    assert len(rows) == 3
    for row, shared in zip(rows, shared_rows, strict=True):
        assert shared == pytest.approx(row, rel=1e-4, abs=1e-5)
    assert any(not torch.equal(weight, start[name]) for name, weight in weights.items())
    for name, weight in weights.items():
        torch.testing.assert_close(shared_weights[name], weight, rtol=1e-3, atol=5e-5)


def test_a_patched_trainer_is_fast_trainer(tmp_path: Path) -> None:
    ours = made(tmp_path)
    ours.train()
    fastdpop.patch_trl(share_prefixes=True)
    try:
        theirs = made(tmp_path, None, kind=DPOTrainer, config=DPOConfig)
        assert shares(theirs)
        theirs.train()
    finally:
        fastdpop.unpatch_trl()
    assert logged(ours, *NAMES) == logged(theirs, *NAMES)


def test_evaluation(tmp_path: Path) -> None:
    found = []
    for share in (False, True):
        of = made(tmp_path, share, reference=model(noise=0.02), given={"eval_dataset": data()})
        found.append({n: v for n, v in of.evaluate().items() if not n.endswith(("time", "second"))})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


# ---- who turns it on ----------------------------------------------------------------------------


@pytest.fixture
def patched() -> Iterator[None]:
    fastdpop.patch_trl(share_prefixes=True)
    yield
    fastdpop.unpatch_trl()


def test_without_a_word_nothing_is_shared(tmp_path: Path) -> None:
    assert not shares(made(tmp_path, None))
    assert not shares(made(tmp_path, False))
    assert shares(made(tmp_path, True))


def test_the_arguments_say_more_than_the_patch(tmp_path: Path, patched: None) -> None:
    plain = {"kind": DPOTrainer, "config": DPOConfig}
    assert shares(made(tmp_path, None, **plain))
    assert not shares(made(tmp_path, False, **plain))
    fastdpop.patch_trl()
    assert shares(made(tmp_path, True, **plain))
    assert not shares(made(tmp_path, None, **plain))


def test_arguments_that_were_made_before_the_patch(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for told in (True, False):
        fastdpop.patch_trl(share_prefixes=told)
        try:
            of = made(tmp_path, None, kind=DPOTrainer, config=lambda **_: args)
            assert shares(of) is told
        finally:
            fastdpop.unpatch_trl()


@pytest.mark.parametrize("share", [None, True])
def test_padding_free(share: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TRL says that it does nothing, which is not so here."""
    caplog.set_level("WARNING", logger="trl.trainer.dpo_trainer")
    of = made(tmp_path, share, padding_free=True)
    assert shares(of)
    assert "padding_free" not in caplog.text
    trainer(DPOTrainer, tmp_path, padding_free=True)
    assert "padding_free" in caplog.text


def test_what_does_not_go_together(tmp_path: Path) -> None:
    message = "share_prefixes is False beside padding_free=True, expected True or None"
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, FastDPOConfig, share_prefixes=False, padding_free=True)
    fastdpop.patch_trl()
    try:
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, share_prefixes=False, padding_free=True)
        with pytest.raises(TypeError, match="share_prefixes is 'yes', expected True or False"):
            arguments(tmp_path, share_prefixes="yes")
    finally:
        fastdpop.unpatch_trl()
    with pytest.raises(TypeError, match="share_prefixes is 1, expected True or False"):
        arguments(tmp_path, FastDPOConfig, share_prefixes=1)
    with pytest.raises(TypeError, match="share_prefixes is None, expected True or False"):
        fastdpop.patch_trl(share_prefixes=None)  # type: ignore[arg-type]
    assert "share_prefixes" not in {field.name for field in dataclasses.fields(DPOConfig)}


def test_a_model_that_its_owner_attached(tmp_path: Path) -> None:
    """It computes as it was told; the trainer follows, or says why it cannot."""

    def attached(share: bool) -> dict[str, Any]:
        policy, reference = (fastdpop.attach(model(), share_prefixes=share) for _ in range(2))
        return {"policy": policy, "reference": reference}

    assert shares(made(tmp_path, None, **attached(True)))
    mixed = made(tmp_path, None, policy=fastdpop.attach(model(), share_prefixes=True))
    assert shares(mixed)
    for asked in (True, False):
        with pytest.raises(ValueError, match=f"share_prefixes is {asked}, expected {not asked}"):
            made(tmp_path, asked, **attached(not asked))


def test_the_latest_trainer_decides(tmp_path: Path) -> None:
    both = {"policy": model(), "reference": model()}
    for share in (False, True, False):
        assert shares(made(tmp_path, share, **both)) is share


def test_each_trainer_of_a_model_computes_as_it_was_told(tmp_path: Path, tokens: list[int]) -> None:
    both = {"policy": model(), "reference": model()}
    first, second = (made(tmp_path, share, max_steps=1, **both) for share in (False, True))
    counts = []
    for of in (first, second, first):
        batch = of._prepare_inputs(next(iter(of.get_train_dataloader())))
        tokens.clear()
        of.compute_loss(of.model, batch)
        counts.append(tokens[-1] == batch["input_ids"].numel())
    assert counts == [True, False, True]


@pytest.mark.parametrize(
    ("more", "expected"),
    [([], None), (["--share_prefixes"], True), (["--share_prefixes", "false"], False)],
)
@pytest.mark.parametrize("kind", [DPOConfig, FastDPOConfig])
def test_command_line(
    kind: Any, more: list[str], expected: bool | None, tmp_path: Path, patched: None
) -> None:
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--report_to", "none"]
    (config,) = HfArgumentParser(kind).parse_args_into_dataclasses([*line, *more])
    assert config.share_prefixes is config.to_dict()["share_prefixes"] is expected


# ---- the order of the data ----------------------------------------------------------------------


def groups(order: list[int]) -> list[int]:
    """The prompt of each stretch of pairs with one prompt."""
    return [prompt for prompt, _ in groupby(order, lambda i: i % PROMPTS)]


def test_pairs_of_one_prompt_stand_side_by_side(tmp_path: Path) -> None:
    of = made(tmp_path)
    sampler = of.get_train_dataloader().batch_sampler.sampler
    orders = []
    for epoch in (0.0, 1.0, 1.5):
        of.state.epoch = epoch
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(PROMPTS * EACH))
        assert len(sampler) == PROMPTS * EACH
        assert len(groups(orders[-1])) == PROMPTS
    assert orders[0] != orders[1] == orders[2]
    other = made(tmp_path, seed=7).get_train_dataloader().batch_sampler.sampler
    assert list(other) != orders[0]
    same = made(tmp_path, seed=7, data_seed=of.args.seed).get_train_dataloader()
    assert list(same.batch_sampler.sampler) == orders[0]


def test_two_processes_get_whole_batches_of_it(tmp_path: Path) -> None:
    of = made(tmp_path)
    batches = BatchSampler(of._get_train_sampler(), 3, drop_last=False)
    parts = [list(BatchSamplerShard(batches, 2, rank)) for rank in range(2)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(12))
    assert all(len({i % PROMPTS for i in batch}) == 1 for part in parts for batch in part)


def test_an_order_that_was_asked_for_stays(tmp_path: Path) -> None:
    unshared = made(tmp_path, False).get_train_dataloader().batch_sampler.sampler
    assert len(groups(list(unshared))) > PROMPTS
    if not hasattr(DPOConfig, "train_sampling_strategy"):
        pytest.skip("this version has no such setting")
    of = made(tmp_path, train_sampling_strategy="sequential")
    assert isinstance(of._get_train_sampler(of.train_dataset), SequentialSampler)


def test_a_stream_has_its_own_order(tmp_path: Path) -> None:
    of = made(tmp_path, data=data().to_iterable_dataset())
    assert shares(of)
    of.train()
    assert of.state.log_history[0]["logratios/chosen"] == 0.0


class Stops(TrainerCallback):
    """After a step of the second epoch."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_save = state.global_step == 4


def test_a_run_goes_on_with_the_pairs_that_are_left(tmp_path: Path) -> None:
    options = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 100}
    whole = made(tmp_path / "whole", **options)
    whole.train()
    made(tmp_path, **options, given={"callbacks": [Stops()]}).train()
    rest = made(tmp_path, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    rows = logged(whole, "loss", "rewards/margins")
    assert len(set(rows)) == 6
    assert logged(rest, "loss", "rewards/margins") == rows
