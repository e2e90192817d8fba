"""A step of TRL's ``DPOTrainer``: the reference's log-probs, one call of the attached model, TRL's metrics.

The reference comes first, so that the loss can be computed inside ``model.forward``, where DDP, FSDP and accelerate
expect it. No loss is computed here; the metrics are TRL's, by its definitions, from what the model returns.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from fastdpop.api import LOGGED
from fastdpop.integrations.trl.loss import preference
from fastdpop.rows import IGNORE, wide_dtype

Inputs = Mapping[str, Any]

_NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
_IMAGES = ("pixel", "image", "video")


def step(trainer: Any, model: nn.Module, inputs: Inputs, return_outputs: bool) -> Any:
    """``DPOTrainer._compute_loss``: the loss, with metrics noted in the trainer."""
    call, labels = _call(trainer, inputs)
    # Before the policy's pass: where a pair's loss is known at once, a trained head costs 3 matrix products, not 4.
    if trainer.precompute_ref_logps:
        ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    else:
        # Unrounded: both sides of a log-ratio stay float64 until the loss.
        options = {"dtype": wide_dtype(labels.device)}
        ref_logps = _reference(trainer, trainer.ref_model, call, labels, options)
    routes = bool(getattr(trainer, "aux_loss_enabled", False))
    outputs = model(
        **call,
        **({"output_router_logits": True} if routes else {}),
        labels=labels,
        preference=preference(trainer),
        ref_logps=ref_logps,
        preference_options={"statistics": LOGGED},
        router_loss_weight=float(trainer.router_aux_loss_coef) if routes else 0.0,
    )
    loss = outputs.loss
    with torch.no_grad():
        _log(trainer, inputs, outputs, ref_logps, routes)
        if return_outputs:  # the logits, of another pass, for those who ask for them
            outputs = model(**call)
    return (loss, outputs) if return_outputs else loss


def _call(trainer: Any, inputs: Inputs) -> tuple[dict[str, Any], Tensor]:
    """The model's arguments and labels, which are scored inside completions only."""
    for name in inputs:
        if name.startswith(_IMAGES):
            raise ValueError(
                f"the batch contains {name!r}, expected text only: train on images without fastdpop "
                "(trl.DPOTrainer, after fastdpop.unpatch_trl())"
            )
    call = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
    completion_mask = inputs["completion_mask"]
    if hasattr(trainer, "_truncate_inputs"):  # TRL 0.29: not yet the collator's work
        names = ("input_ids", "attention_mask")
        *kept, completion_mask = trainer._truncate_inputs(
            *(call[name] for name in names), completion_mask
        )
        call |= zip(names, kept, strict=True)
    return call | {"use_cache": False}, call["input_ids"].masked_fill(completion_mask == 0, IGNORE)


def _reference(
    trainer: Any,
    model: nn.Module | None,
    call: dict[str, Any],
    labels: Tensor,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """The reference's log-probs, ``(2B,)``: of the adapter "ref", of no adapter, or of `model`."""
    adapter: Any = contextlib.nullcontext()
    if trainer.ref_model is None and is_peft_model(trainer.model):
        policy = trainer.accelerator.unwrap_model(trainer.model)
        adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        model = trainer.model if model is None else model
    assert model is not None  # TRL keeps one where there is no adapter
    options = {**(options or {}), "ld_alpha": trainer.ld_alpha}
    checkpointing = disable_gradient_checkpointing(
        trainer.model, trainer.args.gradient_checkpointing_kwargs
    )
    with torch.no_grad(), checkpointing, adapter, trainer.accelerator.autocast():
        outputs = model(**call, labels=labels, return_logps=True, preference_options=options)
    return outputs.logps


def precomputed(trainer: Any, *model_and_inputs: Any) -> tuple[Tensor, Tensor]:
    """``DPOTrainer.compute_ref_log_probs``, which takes the model too since TRL 1.9."""
    *given, inputs = model_and_inputs
    # Not `or`: a compiled model has no truth value.
    own = trainer.model if trainer.ref_model is None else trainer.ref_model
    model = given[0] if given else own
    chosen, rejected = _reference(trainer, model, *_call(trainer, inputs)).chunk(2)
    return chosen, rejected


def with_own_cache(trainer: Any, dataset: Any) -> Any:
    """The data set under a fingerprint by which TRL does not find log-probs cached by another computation."""
    if isinstance(dataset, Dataset):
        args = trainer.args
        same = (args.max_length, args.truncation_mode, args.ld_alpha, args.bf16, args.fp16)
        dataset = copy.copy(dataset)
        dataset._fingerprint = Hasher.hash((dataset._fingerprint, "fastdpop", same))
    return dataset


def _log(trainer: Any, inputs: Inputs, outputs: Any, ref_logps: Tensor, routes: bool) -> None:
    """Everything that TRL logs, by its definitions, and the penalty."""
    mode = "train" if trainer.model.training else "eval"
    metrics = trainer._metrics[mode]
    lengths = outputs.lengths.to(outputs.entropy.dtype)
    halves = {
        name: (value * lengths).view(2, -1).sum(1)
        for name, value in {
            "entropy": outputs.entropy,
            "logits": outputs.mean_logits,
            "correct": outputs.token_accuracy,
            "tokens": torch.ones_like(lengths),
        }.items()
    }
    ref_chosen, ref_rejected = ref_logps.to(outputs.chosen_logps).chunk(2)
    chosen_rewards = trainer.beta * (outputs.chosen_logps - ref_chosen)
    rejected_rewards = trainer.beta * (outputs.rejected_logps - ref_rejected)
    by_pair = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": outputs.chosen_logps,
        "logps/rejected": outputs.rejected_logps,
        "penalty": outputs.penalty,
    }
    if routes:
        by_pair["aux_loss"] = outputs.aux_loss.to(chosen_rewards).expand_as(chosen_rewards)

    # Two exchanges between processes, whatever the number of metrics.
    gather = trainer.accelerator.gather
    sums = torch.stack([*halves.values(), inputs["attention_mask"].sum().to(lengths).expand(2)])
    totals = dict(zip([*halves, "seen"], gather(sums[None]).sum(0).tolist(), strict=True))
    means = gather(torch.stack(list(by_pair.values()), dim=1)).mean(0).tolist()

    def mean(total: float, count: float) -> float:
        return total / count if count > 0 else 0.0

    (chosen_tokens, rejected_tokens), logits = totals["tokens"], totals["logits"]
    if mode == "train":
        trainer._total_train_tokens += int(totals["seen"][0]) // getattr(trainer, "_tp_size", 1)
    metrics["num_tokens"] = [trainer._total_train_tokens]
    for name, value in {
        "entropy": mean(sum(totals["entropy"]), chosen_tokens + rejected_tokens),
        "logits/chosen": mean(logits[0], chosen_tokens),
        "logits/rejected": mean(logits[1], rejected_tokens),
        "mean_token_accuracy": mean(totals["correct"][0], chosen_tokens),
        **dict(zip(by_pair, means, strict=True)),
    }.items():
        metrics[name].append(value)
