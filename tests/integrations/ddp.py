"""Trains for two steps, also under torchrun, for test_trl_ddp.py: python ddp.py FOLDER PAIRS_A_PROCESS [share]."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer
from fastdpop.integrations.trl.process import end_process
from tests.integrations.trl_setup import logged, trainer

folder, each = Path(sys.argv[1]), int(sys.argv[2])
of = trainer(
    FastDPOTrainer,
    folder / "run",
    config=FastDPOConfig,
    loss_type=["dpop", "sigmoid"],
    dpop_lambda=2.0,
    max_steps=2,
    per_device_train_batch_size=each,
    share_prefixes=sys.argv[3:] == ["share"],
)
of.train()
if of.accelerator.is_main_process:
    names = ("loss", "num_tokens", "entropy", "rewards/margins", "penalty", "logits/rejected")
    weights = {n: p.detach() for n, p in of.model.named_parameters()}
    torch.save((logged(of, *names), weights), folder / f"{each}.pt")
of.accelerator.wait_for_everyone()
end_process(0)
