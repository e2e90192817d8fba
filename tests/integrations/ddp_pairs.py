"""Evaluates and trains on five pairs, also under torchrun: python ddp_pairs.py FOLDER PROCESSES."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer
from fastdpop.integrations.trl.process import end_process
from tests.integrations.test_trl import lora
from tests.integrations.trl_setup import pairs, trainer

folder, processes = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(3)
of = trainer(
    FastDPOTrainer,
    folder / "run",
    config=FastDPOConfig,
    reference=None,
    data=pairs(5, 20),
    given={"peft_config": lora(), "eval_dataset": pairs(5, 20)},
    loss_type="dpop",
    precompute_ref_log_probs=True,
    precompute_ref_batch_size=2,
    learning_rate=0.0,
    max_steps=-1,
    num_train_epochs=1,
    logging_strategy="epoch",
    per_device_train_batch_size=4 // processes,
    per_device_eval_batch_size=4 // processes,
    gradient_accumulation_steps=2,
)
found = of.evaluate()
of.train()
if of.accelerator.is_main_process:
    torch.save((found, of.state.log_history), folder / f"pairs-{processes}.pt")
of.accelerator.wait_for_everyone()
end_process(0)
