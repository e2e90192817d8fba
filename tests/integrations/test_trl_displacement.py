"""The warning, in runs of a small model: said of DPO on near-duplicates, of nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from datasets import Dataset
from torch import Tensor

import fastdpop
from fastdpop import losses
from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer
from tests.integrations.trl_setup import WARNINGS, DPOConfig, DPOTrainer, model, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


def near_duplicates(count: int) -> Dataset:
    """Chosen and rejected completions that differ in one character of many, at its beginning."""
    return Dataset.from_list(
        [
            {
                "prompt": f"{n} + {n} = ",
                "chosen": f"{2 * n % 10}. So the sum of both of the numbers is found",
                "rejected": f"{(2 * n + 1) % 10}. So the sum of both of the numbers is found",
            }
            for n in range(count)
        ]
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A model that has learnt the chosen completions, but for the sums."""
    of = trainer(
        FastDPOTrainer,
        tmp_path_factory.mktemp("sft"),
        data=near_duplicates(64),
        config=FastDPOConfig,
        loss_type="sft",
        max_steps=80,
        learning_rate=1e-2,
    )
    of.train()
    return {name: value.clone() for name, value in of.model.state_dict().items()}


@pytest.fixture
def run(
    start: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[Any, list[str]]]:
    """Train from there; what was logged, and what was said of chosen completions that fall."""

    def trained(
        kind: Any = FastDPOTrainer, config: Any = FastDPOConfig, **options: Any
    ) -> tuple[list[dict[str, Any]], list[str]]:
        policy = model()
        policy.load_state_dict(start)
        options = {"max_steps": 32, "precompute_ref_log_probs": True, **options}
        data = near_duplicates(64)
        with caplog.at_level(logging.WARNING, "fastdpop"):
            of = trainer(
                kind, tmp_path, policy=policy, reference=None, data=data, config=config, **options
            )
            of.train()
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        rows = [row for row in of.state.log_history if "grad_norm" in row]
        return rows, [text for text in said if "chosen completions are becoming less" in text]

    return trained


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logging_steps": 32},
        {"share_prefixes": True},
        {"gradient_accumulation_steps": 2, "max_steps": 16},
    ],
    ids=str,
)
def test_dpo_on_near_duplicates(options: dict[str, Any], run: Callable[..., Any]) -> None:
    rows, (text,) = run(loss_type="sigmoid", **options)
    last = rows[-1]
    assert last["logratios/chosen"] < (-1.0 if "logging_steps" in options else -3.0)
    assert last["rewards/accuracies"] > 0.9
    assert 0.5 < last["hinge_on"] <= 1.0
    assert "although it tells them from rejected ones in" in text
    assert "dpop_lambda" in text


def test_dpop_is_healthy(run: Callable[..., Any]) -> None:
    rows, said = run(loss_type="dpop", dpop_lambda=50.0)
    assert said == []
    assert rows[-1]["logratios/chosen"] > 0.0
    assert rows[-1]["rewards/accuracies"] > 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"warn_displacement": False},
        {"max_steps": 20},  # no three blocks
        {"learning_rate": 0.0},
        {"given": {"loss": losses.get("simpo", beta=0.5)}},  # no reference
    ],
    ids=str,
)
def test_nothing_is_said(options: dict[str, Any], run: Callable[..., Any]) -> None:
    assert run(loss_type="sigmoid", **options)[1] == []


def test_an_evaluation_is_not_looked_at(run: Callable[..., Any]) -> None:
    """With 8 of its batches in each of 20 steps, of which two blocks are full."""
    eval_data = near_duplicates(64)
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    _, said = run(loss_type="sigmoid", max_steps=20, given={"eval_dataset": eval_data}, **options)
    assert said == []


def test_a_patched_trainer_says_it_too(run: Callable[..., Any]) -> None:
    fastdpop.patch_trl()
    try:
        rows, said = run(DPOTrainer, DPOConfig, loss_type="sigmoid")
        assert len(said) == 1
        assert rows[-1]["logratios/chosen"] < -5.0
        assert run(DPOTrainer, DPOConfig, loss_type="sigmoid", warn_displacement=False)[1] == []
    finally:
        fastdpop.unpatch_trl()


def test_what_is_no_switch(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="warn_displacement is 'no', expected True or False"):
        FastDPOConfig(str(tmp_path), warn_displacement="no", use_cpu=True, bf16=False)
