"""`axolotl train` gives the losses, and the weights, of a loop of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastdpop
from fastdpop import losses
from tests.axolotl.runs import EXAMPLE, PAIRS, PLAIN, batch, run, store, trained
from tests.tiny_model import tiny_llama

DPOP = losses.get("dpop", beta=PLAIN["rl_beta"], lam=float(PLAIN["dpop_lambda"]))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of what Axolotl imports


def own_run(loss: Any, steps: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Losses, penalties and the last weights of the same training without Axolotl and TRL."""
    model = fastdpop.attach(tiny_llama(initializer_range=0.2)).train()
    pairs = batch()
    with torch.no_grad():
        ref_logps = model(**pairs, return_logps=True).logps
    optimizer = torch.optim.AdamW(model.parameters(), lr=PLAIN["learning_rate"], weight_decay=0.0)
    rows = []
    for _ in range(steps):
        out = model(**pairs, preference=loss, ref_logps=ref_logps)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        row = {"loss": out.loss, "penalty": out.penalty.mean(), "grad_norm": norm}
        rows.append({name: value.item() for name, value in row.items()})
    return rows, model.state_dict()


def assert_same_rows(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for row, own in zip(found, expected, strict=True):
        assert {name: row[name] for name in own} == pytest.approx(own, rel=1e-4, abs=1e-4)
    assert len({round(row["loss"], 3) for row in found}) == len(found)  # it moves


def test_dpop(tmp_path: Path) -> None:
    found = trained(tmp_path, PLAIN)
    expected, weights = own_run(DPOP, PLAIN["num_epochs"])
    assert_same_rows(found, expected)
    assert max(row["penalty"] for row in found) > 0.05  # lambda counts
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in stored.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4)


def test_a_mix_in_two_batches_a_step(tmp_path: Path) -> None:
    """Batches of other pairs have another mean, but their mean is that of all pairs."""
    changes = {
        "dpo_loss_type": ["dpop", "sigmoid"],
        "dpo_loss_weights": [0.75, 0.25],
        "micro_batch_size": len(PAIRS) // 2,
        "gradient_accumulation_steps": 2,
        "fastdpop_engine": "eager",
        "fastdpop_share_prefixes": True,
    }
    found = trained(tmp_path, {**PLAIN, **changes})
    loss = 0.75 * DPOP + 0.25 * losses.get("sigmoid", beta=PLAIN["rl_beta"])
    expected, _ = own_run(loss, PLAIN["num_epochs"])
    assert_same_rows(found, expected)


def test_the_example_with_lora(tmp_path: Path) -> None:
    """The example's loss, data and adapter, on a CPU: each step's loss is that of the adapter saved before it."""
    example = yaml.safe_load(EXAMPLE.read_text())
    smaller = ("sequence_len", "micro_batch_size", "gradient_accumulation_steps", "num_epochs")
    for_a_cpu = ("bf16", "attn_implementation", "optimizer", "logging_steps", "saves_per_epoch")
    changes = {
        **{key: PLAIN[key] for key in (*smaller, *for_a_cpu)},
        "tf32": False,
        "val_set_size": 0,
        "evals_per_epoch": None,
        "learning_rate": PLAIN["learning_rate"],
        "warmup_ratio": 0,
    }
    found = trained(tmp_path, {**example, **changes})
    assert found[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert max(row["penalty"] for row in found) > 1e-3

    from peft import PeftModel

    pairs = batch(before="<|user|>", after="<|end|>\n<|assistant|>")
    for row in found[1:]:
        folder = tmp_path / "out" / f"checkpoint-{row['step'] - 1}"
        model: Any = PeftModel.from_pretrained(tiny_llama(initializer_range=0.2), folder).eval()
        fastdpop.attach(model)
        with torch.no_grad():
            with model.disable_adapter():
                ref_logps = model(**pairs, return_logps=True).logps
            dpop = losses.get("dpop", beta=example["rl_beta"], lam=float(example["dpop_lambda"]))
            out = model(**pairs, preference=dpop, ref_logps=ref_logps)
        own = {"loss": out.loss.item(), "penalty": out.penalty.mean().item()}
        assert {name: row[name] for name in own} == pytest.approx(own, rel=1e-4, abs=1e-4)


def test_a_wrong_file_ends_before_anything_is_loaded(tmp_path: Path) -> None:
    store(tmp_path)
    done = run(tmp_path, {**PLAIN, "dpo_loss_type": ["dpopp"]})
    assert done.returncode != 0
    assert "dpo_loss_type contains 'dpopp', expected names among" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
