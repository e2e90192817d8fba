"""Reading a model's output embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpop.hf import tensor_parallel
from fastdpop.hf.unfit import no_head


@torch.compiler.disable
def output_head(model: Any) -> Any:
    """The output embedding: a module with a weight, which may do more than multiply by it (an adapter, a scale).

    Raises:
        RuntimeError: there is none, or none that fastdpop can read; the message names what it is and what to do.
    """
    owner, head = type(model).__name__, model.get_output_embeddings()
    if head is None:
        raise RuntimeError(no_head(model))
    name = next((name for name, module in model.named_modules() if module is head), "the head")
    weight = getattr(head, "weight", None)
    if "forward" in vars(head) and tensor_parallel.replaced(head) is None:
        advice = "its forward is replaced (offloading?): keep it on one device, without hooks"
    elif hasattr(head, "_fsdp_wrapped_module"):
        advice = (
            "it is an FSDP unit of its own, whose weight is gone before the loss can read it: leave it in the root's "
            "(an auto_wrap_policy of the layers), or shard with FSDP2, fully_shard"
        )
    elif isinstance(weight, Tensor) and weight.dim() == 1:
        advice = "its weight is a piece of FSDP's flat parameter: attach before wrapping"
    elif not isinstance(weight, Tensor) or weight.dim() != 2:
        advice = (
            "expected a module with a weight (vocabulary, width), or call fastdpop.fused_preference_loss "
            "on the hidden states"
        )
    elif not weight.is_floating_point():
        advice = f"its weight is {weight.dtype}, expected floating-point: leave the head out of the quantisation"
    else:
        return head
    kind = type(head).__name__
    raise RuntimeError(f"{name} of {owner} is a {kind} that fastdpop cannot read: {advice}")


@torch.compiler.disable
def adapter_columns(head: Any) -> int:
    """Columns that the active LoRA adapters of a head add to its weight, also while they are disabled.

    A reference computed with the adapter disabled then adds in the same order as the policy, so that the two are equal
    to the bit before the first step.
    """
    ranks = getattr(head, "r", None)
    if not isinstance(ranks, dict) or getattr(head, "merged", False):
        return 0
    return sum(ranks[name] for name in head.active_adapters if name in ranks)
