"""A step of TRL's ``DPOTrainer``: the reference's log-probs, one call of the attached model, and what is logged.

The reference comes first, so that the loss can be computed inside ``model.forward``, where DDP, FSDP and accelerate
expect it. No loss is computed here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from fastdpop.api import LOGGED
from fastdpop.integrations.trl import batch, first_batch, metrics
from fastdpop.integrations.trl.loss import logged_beta, preference
from fastdpop.rows import IGNORE, wide_dtype
from fastdpop.unrounded import exact

Inputs = Mapping[str, Any]

_NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", batch.KEY}
_IMAGES = ("pixel", "image", "video")


def step(trainer: Any, model: nn.Module, inputs: Inputs, return_outputs: bool) -> Any:
    """``DPOTrainer._compute_loss``: the loss; what is logged is noted in the trainer."""
    part = batch.part(trainer, inputs)
    call, labels = _call(trainer, part.inputs)
    # Before the policy's pass: where a pair's loss is known at once, a trained head costs 3 matrix products, not 4.
    if trainer.precompute_ref_logps:
        ref_logps = torch.cat([part.inputs[f"ref_{side}_logps"] for side in ("chosen", "rejected")])
    else:
        # Unrounded: both sides of a log-ratio stay float64 until the loss.
        options = {"dtype": wide_dtype(labels.device)}
        ref_logps = _reference(trainer, trainer.ref_model, call, labels, options)
    routes = bool(getattr(trainer, "aux_loss_enabled", False))
    loss = preference(trainer)
    outputs = model(
        **call,
        **({"output_router_logits": True} if routes else {}),
        labels=labels,
        preference=loss,
        # That of a loss without one is for what is logged.
        ref_logps=exact(ref_logps) if loss.traits.may_read_reference else None,
        preference_options={
            "statistics": (*LOGGED, "displacement"),
            "share_prefixes": _shares(trainer),
            **part.options,
        },
        router_loss_weight=float(trainer.router_aux_loss_coef) if routes else 0.0,
    )
    total = outputs.loss
    if part.options.get("pairs") is None:  # else it has none of its own
        first_batch.look(trainer, call, labels, outputs.logps, ref_logps)
    with torch.no_grad():
        metrics.note(trainer, inputs, outputs, ref_logps, logged_beta(trainer))
        if return_outputs:  # the logits, of another pass, for those who ask for them
            outputs = model(**_call(trainer, inputs)[0])
    return (total, outputs) if return_outputs else total


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
    options = {
        **(options or {}),
        "ld_alpha": preference(trainer).traits.ld_alpha,
        "share_prefixes": _shares(trainer),
    }
    checkpointing = disable_gradient_checkpointing(
        trainer.model, trainer.args.gradient_checkpointing_kwargs
    )
    with torch.no_grad(), checkpointing, adapter, trainer.accelerator.autocast():
        outputs = model(**call, labels=labels, return_logps=True, preference_options=options)
    return outputs.logps


def _shares(trainer: Any) -> bool:
    """Said in every call: a later trainer of the same model may have attached it otherwise."""
    shares: bool = trainer._fastdpop.share_prefixes
    return shares


def precomputed(trainer: Any, *model_and_inputs: Any) -> tuple[Tensor, Tensor]:
    """``DPOTrainer.compute_ref_log_probs``, which takes the model too since TRL 1.9."""
    *given, inputs = model_and_inputs
    # Not `or`: a compiled model has no truth value.
    own = trainer.model if trainer.ref_model is None else trainer.ref_model
    model = given[0] if given else own
    chosen, rejected = _reference(trainer, model, *_call(trainer, inputs)).chunk(2)
    return chosen, rejected
