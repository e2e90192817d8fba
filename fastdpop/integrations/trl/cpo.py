"""The step of TRL's experimental ``CPOTrainer`` (CPO, SimPO and their relatives) on fastdpop's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop import checks, losses
from fastdpop.integrations.trl import first_batch
from fastdpop.losses.base import PreferenceLoss
from fastdpop.unrounded import exact


def serves(trainer: Any) -> bool:
    """AlphaPO's rewards and encoder-decoders are left to TRL."""
    return trainer.alpha == 0.0 and not trainer.is_encoder_decoder


def preference(trainer: Any) -> PreferenceLoss:
    """The loss that a ``CPOTrainer``'s settings ask for, as fastdpop's; where it reads a reference, that is to be 0.

    Raises:
        ValueError: there is no such loss type, or an option is out of its range.
    """
    beta, smoothing = trainer.beta, trainer.label_smoothing
    if trainer.loss_type == "sigmoid":
        loss = losses.get("cpo", beta=beta, label_smoothing=smoothing, nll_weight=0.0)
    elif trainer.loss_type == "simpo":
        gamma = trainer.simpo_gamma
        loss = losses.get("simpo", beta=beta, gamma=gamma, label_smoothing=smoothing)
    else:
        checks.choice("loss_type", trainer.loss_type, ("sigmoid", "hinge", "ipo", "simpo"))
        loss = losses.get(trainer.loss_type, beta=beta)
    return loss + trainer.cpo_alpha * losses.get("sft")


def step(
    trainer: Any, model: nn.Module, batch: Mapping[str, Any], train_eval: str
) -> tuple[Tensor, dict[str, float]]:
    """``CPOTrainer.get_batch_loss_metrics``: the loss, TRL's metrics, and of the monitor what has a meaning without a
    reference.

    Mean logits are those of completions; TRL's count prompts and padding too.
    """
    joined = trainer.concatenated_inputs(
        batch, padding_value=trainer.pad_token_id, device=trainer.accelerator.device
    )
    labels = joined["concatenated_labels"]
    loss = preference(trainer)
    zeros = torch.zeros(len(labels), device=labels.device)
    routes = bool(trainer.aux_loss_enabled)
    out = model(
        input_ids=joined["concatenated_input_ids"],
        attention_mask=joined["concatenated_attention_mask"],
        use_cache=False,
        **({"output_router_logits": True} if routes else {}),
        labels=labels,
        preference=loss,
        # No reference: log-ratios are log-probs.
        ref_logps=exact(zeros) if loss.traits.needs_reference else None,
        preference_options={
            "statistics": ("mean_logits", "displacement"),
            "share_prefixes": trainer._fastdpop.share_prefixes,
        },
        router_loss_weight=float(trainer.aux_loss_coef) if routes else 0.0,
    )
    if train_eval == "train":
        call = {name: joined[f"concatenated_{name}"] for name in ("input_ids", "attention_mask")}
        first_batch.look(trainer, call, labels, out.logps, None)
    with torch.no_grad():
        means = trainer.loss_type in ("ipo", "simpo")
        lengths = out.lengths.to(out.chosen_logps)
        scale = 1.0 / lengths.clamp_min(1) if means else torch.ones_like(lengths)
        chosen, rejected = (torch.cat([out.chosen_logps, out.rejected_logps]) * scale).chunk(2)
        chosen_rewards, rejected_rewards = trainer.beta * chosen, trainer.beta * rejected
        logits, tokens = (out.mean_logits * lengths).view(2, -1).sum(1), lengths.view(2, -1).sum(1)
        logits = logits / tokens.clamp_min(1)
        nll = -out.chosen_logps.sum() / tokens[0].clamp_min(1) if trainer.cpo_alpha else 0.0
        by_pair = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/rejected": rejected,
            "logps/chosen": chosen,
            "logits/rejected": logits[1].expand_as(chosen),
            "logits/chosen": logits[0].expand_as(chosen),
            "nll_loss": torch.as_tensor(nll, device=chosen.device).expand_as(chosen).to(chosen),
            "ches": out.ches,
            "ches_normalised": out.ches_normalised,
            # 0 where a pair does not differ, or has nothing behind the difference: counted by the last two.
            "logps/first_difference": out.first_logps,
            "logps/after_difference": out.after_logps,
            "differs": out.differs.to(chosen),
            "goes on": (out.after_logps != 0).to(chosen),
        }
        gathered = trainer.accelerator.gather_for_metrics(torch.stack([*by_pair.values()], dim=1))
    values = dict(zip(by_pair, gathered.mean(0).tolist(), strict=True))
    for name, counted in (("first", "differs"), ("after", "goes on")):
        mean, share = values.pop(f"logps/{name}_difference"), values.pop(counted)
        if share:
            values[f"logps/{name}_difference"] = mean / share
    prefix = "eval_" if train_eval == "eval" else ""
    return out.loss, {f"{prefix}{n}": v for n, v in values.items()}
