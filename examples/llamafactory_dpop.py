"""DPOP in LLaMA-Factory, without full logits: its command line, with one class exchanged.

    python examples/llamafactory_dpop.py config.yaml      # instead of: llamafactory-cli train config.yaml

The configuration is one for `stage: dpo` with `pref_loss: sigmoid`. `pref_beta` is DPOP's beta, and `DPOP_LAMBDA` in
the environment its lambda (50).
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from llamafactory.train.dpo import trainer
from llamafactory.train.tuner import run_exp
from torch import Tensor

import fastdpop
from fastdpop import losses
from fastdpop.integrations.displacement import Watch


class FusedDPOPTrainer(trainer.CustomDPOTrainer):
    def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, **kwargs: Any) -> None:
        for name, expected in {
            "pref_loss": "sigmoid",
            "pref_ftx": 0.0,
            "pref_bco_weight": 0.0,
            "ld_alpha": None,
        }.items():
            if (given := getattr(finetuning_args, name)) != expected:
                raise ValueError(f"{name} is {given!r}, expected {expected!r}: the loss is DPOP")
        fastdpop.attach(model)
        if ref_model is not None:
            fastdpop.attach(ref_model)
        self.dpop = losses.get(
            "dpop",
            beta=finetuning_args.pref_beta,
            lam=float(os.environ.get("DPOP_LAMBDA", losses.DPOP().lam)),
            label_smoothing=finetuning_args.dpo_label_smoothing,
        )
        self.watch = Watch()
        super().__init__(model, ref_model, finetuning_args, **kwargs)

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Tensor], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        reference, switched_off = self.ref_model, contextlib.nullcontext()
        if reference is None:  # LoRA
            reference, switched_off = model, self.accelerator.unwrap_model(model).disable_adapter()
        with torch.no_grad(), switched_off:
            ref_logps = reference(**batch, return_logps=True).logps
        out = model(
            **batch,
            preference=self.dpop,
            ref_logps=fastdpop.exact(ref_logps),
            preference_options={"statistics": ("displacement",)},
        )
        values = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/accuracies": out.accuracy,
            "rewards/margins": out.margins,
            "logps/chosen": out.chosen_logps,
            "logps/rejected": out.rejected_logps,
            "penalty": out.penalty,
            "hinge_on": out.penalty > 0,
            "ches": out.ches,
        }
        for name, logps in (("first", out.first_logps), ("after", out.after_logps)):
            if logps.any():  # 0 where a pair has no such token
                values[f"logps/{name}_difference"] = logps[logps != 0]
        if train_eval == "train":
            logratios = (out.chosen_logps - ref_logps.chunk(2)[0]).double()
            around = (logratios - logratios.mean()).square().sum().item()
            hits = (out.accuracy * len(logratios)).item()
            found = self.watch.add(len(logratios), logratios.mean().item(), around, hits)
            if found is not None and self.is_world_process_zero():
                print(found.message(self.state.global_step))
        prefix = "eval_" if train_eval == "eval" else ""
        return out.loss, {prefix + k: v.float().mean().item() for k, v in values.items()}


def main() -> None:
    # The workflow imports the name when it runs.
    trainer.CustomDPOTrainer = FusedDPOPTrainer
    run_exp()


if __name__ == "__main__":
    main()
