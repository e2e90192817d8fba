"""When a precomputed reference is the policy to the bit, and how far it is where it is not (docs/trl.md)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig

from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer
from tests.integrations.trl_setup import WARNINGS, gsm8k, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

PAIRS, BATCH, LONGEST = 12, 4, 160
SEQUENTIAL = {"train_sampling_strategy": "sequential"}


def wide() -> LlamaForCausalLM:
    """Wide enough for products that round otherwise in another batch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, **sizes, **heads)).eval()


def of_many_lengths(folder: Path) -> Dataset:
    rows = [
        {"prompt": row["prompt"][5 * i :], "chosen": row["chosen"][: 20 + 6 * i]}
        | {"rejected": row["rejected"][: 80 - 5 * i]}
        for i, row in enumerate(gsm8k(PAIRS))
    ]
    Dataset.from_list(rows).save_to_disk(folder)
    return load_from_disk(folder)


def differences(folder: Path, **options: Any) -> Tensor:
    """Of a policy's log-probs and those of a precomputed reference of equal weights, ``(2 * PAIRS,)``."""
    of = trainer(
        FastDPOTrainer,
        folder,
        policy=wide(),
        reference=wide(),
        data=of_many_lengths(folder / "data"),
        config=FastDPOConfig,
        loss_type="dpop",
        precompute_ref_log_probs=True,
        **{"per_device_train_batch_size": BATCH} | options,
    )
    logps: list[Tensor] = []
    of.model.register_forward_hook(lambda model, inputs, output: logps.append(output.logps))
    found = []
    for batch in of.get_train_dataloader():
        prepared = of._prepare_inputs(batch)
        with torch.no_grad(), of.accelerator.autocast():
            of.compute_loss(of.model, prepared)
        ref_logps = torch.cat([prepared["ref_chosen_logps"], prepared["ref_rejected_logps"]])
        found.append(logps[-1] - ref_logps)
    assert len(logps) == PAIRS / of.args.per_device_train_batch_size
    return torch.cat(found)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [SEQUENTIAL, {"per_device_train_batch_size": 1}, {"pad_to_multiple_of": LONGEST}],
    ids=["same batches", "one pair per batch", "one length"],
)
def test_exact(options: dict[str, Any], bf16: bool, tmp_path: Path) -> None:
    if not options.keys() <= {field.name for field in fields(DPOConfig)}:
        pytest.skip("this version has no such setting")
    assert not differences(tmp_path, bf16=bf16, **options).any()


@pytest.mark.parametrize("options", [SEQUENTIAL, {"per_device_train_batch_size": 1}])
def test_exact_where_prefixes_are_shared(options: dict[str, Any], tmp_path: Path) -> None:
    """Equal batches are equal trees."""
    if not options.keys() <= {field.name for field in fields(DPOConfig)}:
        pytest.skip("this version has no such setting")
    assert not differences(tmp_path, share_prefixes=True, **options).any()


@pytest.mark.parametrize(("bf16", "bound"), [(False, 2e-4), (True, 2e-2)], ids=["fp32", "bf16"])
def test_shuffled_agrees_to_rounding(bf16: bool, bound: float, tmp_path: Path) -> None:
    assert differences(tmp_path, bf16=bf16).abs().max() < bound
