"""docs/metrics.md says what every metric means: each that a trainer logs, and none that no trainer logs."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from transformers import MixtralConfig, MixtralForCausalLM

import fastdpop
from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer
from tests.integrations.trl_setup import RELEASE, WARNINGS, arguments, model, pairs, trainer
from tests.tiny_model import tiny_tokenizer

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def explained() -> set[str]:
    """The names in the first columns of the tables of metrics."""
    tables = PAGE.split("## In a loop of your own")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", tables, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def without_mode(name: str) -> str:
    """The page has one name for a metric of training, of an evaluation and of the end of a run."""
    whole = name in ("train_loss", "total_flos")
    return name if whole else name.removeprefix("eval_").removeprefix("train_")


def experts() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=258,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=2,
                output_router_logits=True,
            )
        )


def logged(folder: Path) -> set[str]:
    """By a run of ``DPOTrainer`` with an evaluation, of a mixture of experts, and by ``CPOTrainer``."""
    dpo = trainer(
        FastDPOTrainer,
        folder,
        policy=experts(),
        reference=experts(),
        config=FastDPOConfig,
        given={"eval_dataset": pairs(4, 20)},
        loss_type="dpop",
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
    )
    dpo.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl_cpo: Any = importlib.import_module("trl.experimental.cpo")
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|end|>"  # TRL asks for one
    fastdpop.patch_trl()
    try:
        cpo = trl_cpo.CPOTrainer(
            model(),
            args=arguments(folder, trl_cpo.CPOConfig, max_length=64, max_steps=1),
            train_dataset=pairs(),
            processing_class=tokenizer,
        )
        cpo.train()
    finally:
        fastdpop.unpatch_trl()
    rows = [*dpo.state.log_history, *cpo.state.log_history]
    return {without_mode(name) for row in rows for name in row}


@pytest.mark.skipif(RELEASE < (1, 14), reason="this TRL asks for a router loss coefficient")
def test_every_logged_metric_is_explained_and_no_other(tmp_path: Path) -> None:
    assert explained() == logged(tmp_path)


def test_every_field_is_explained() -> None:
    """Of what a loss returns; the rejected side of the first difference stands in the API alone."""
    fields = set(fastdpop.PreferenceOutput.__dataclass_fields__) - {"rejected_first_logps"}
    assert fields <= set(re.findall(r"`out\.(\w+)`", PAGE))


def test_what_an_output_reports_is_explained() -> None:
    torch.manual_seed(0)
    out = fastdpop.fused_dpop_loss(
        torch.randn(4, 9, 16),
        torch.randn(37, 16),
        torch.randint(37, (4, 9)),
        ref_logps=torch.full((4,), -30.0),
        statistics=["entropy", "mean_logits", "token_accuracy", "displacement"],
    )
    found = set(out.metrics())
    assert {"loss", "rewards/chosen", "hinge_on", "entropy", "ches"} <= found <= explained()
