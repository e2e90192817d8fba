"""As test_losses.py, of what needs transformers, PEFT and TRL."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

import fastdpop
from fastdpop import naive
from fastdpop.hf.sharing_check import Verdict, verdict_of
from tests.tiny_model import tiny_llama, tiny_tokenizer
from tests.train.files import WARNINGS, Files, rows

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

BETA, LAMBDA = 0.5, 5.0


def batch() -> dict[str, Tensor]:
    """Two pairs, chosen first, whose prompts and first completion tokens are shared."""
    ids = torch.randint(3, 250, (4, 12))
    ids[2:, :6] = ids[:2, :6]
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, -2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def naive_loss(model: Any, inputs: dict[str, Tensor], ref_logps: Tensor) -> Tensor:
    hidden = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    logps = naive.sequence_logps(hidden, model.lm_head.weight, inputs["labels"])
    return naive.dpop_loss(logps, ref_logps)


@pytest.mark.parametrize("share", [False, True])
def test_attached(share: bool) -> None:
    model, inputs, ref_logps = tiny_llama(initializer_range=0.2), batch(), -60 + torch.randn(4)
    naive_loss(model, inputs, ref_logps).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = naive_loss(model, inputs, ref_logps).detach()
    model.zero_grad()
    out = fastdpop.attach(model)(
        **inputs,
        preference=fastdpop.losses.get("dpop", beta=0.3, lam=50.0),
        ref_logps=ref_logps,
        preference_options={"share_prefixes": share},
    )
    out.loss.backward()
    assert (verdict_of(model) is not None) == share
    assert verdict_of(model) in (None, Verdict("shared"))
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=2e-5 * largest)


def test_lora() -> None:
    """Only adapters are trained, and the model without them is the reference."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False
    )
    model = fastdpop.attach(get_peft_model(tiny_llama(initializer_range=0.2), config))
    inputs = batch()
    with torch.no_grad(), model.disable_adapter():
        ref_logps = model(**inputs, return_logps=True).logps
    out = model(**inputs, preference="dpop", ref_logps=ref_logps)
    out.loss.backward()
    assert out.loss.item() != pytest.approx(math.log(2), abs=1e-4)  # that of the reference itself
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def run(folder: Path, **options: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Two steps of TRL's trainer: what it logs, and the weights that it leaves."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "beta": BETA,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
    }
    reference = tiny_llama(seed=1, initializer_range=0.2)
    trainer = DPOTrainer(
        tiny_llama(initializer_range=0.2),
        ref_model=reference,
        args=DPOConfig(**settings, **options),
        train_dataset=Dataset.from_list(rows(4)),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    return logged, {name: p.detach() for name, p in trainer.model.named_parameters()}


def test_trl(tmp_path: Path) -> None:
    """Patched, `sigmoid` is TRL's own; `dpop` is its formula of the log-ratios that TRL's own run logs."""
    stock, stock_weights = run(tmp_path / "stock", loss_type="sigmoid")
    fastdpop.patch_trl()
    try:
        same, weights = run(tmp_path / "sigmoid", loss_type="sigmoid")
        dpop, _ = run(tmp_path / "dpop", loss_type="dpop", dpop_lambda=LAMBDA)
    finally:
        fastdpop.unpatch_trl()
    assert len(stock) == len(same) == len(dpop) == 2
    assert [line["loss"] for line in same] == pytest.approx(
        [line["loss"] for line in stock], rel=1e-4
    )
    for name, weight in weights.items():
        torch.testing.assert_close(weight, stock_weights[name], rtol=1e-4, atol=1e-5)
    chosen, rejected = (stock[0][f"rewards/{name}"] / BETA for name in ("chosen", "rejected"))
    z = BETA * (chosen - rejected - LAMBDA * max(0.0, -chosen))
    assert dpop[0]["loss"] == pytest.approx(math.log1p(math.exp(-z)), rel=1e-4)


def test_train(tmp_path: Path) -> None:
    files = Files.make(tmp_path / "files", train=4)
    assert files.run("--loss", "dpop") == 0
    losses = files.losses()
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the reference
    assert losses[1] != losses[0]
