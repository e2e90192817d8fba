"""What a caller may take in the place of what was given for a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.unrounded import Exact


def of_no_tensor(name: str, value: object, expected: str) -> str:
    """A message for what is no tensor, and where the tensor is that was meant."""
    where = _inside(name, value)
    found = f"{name} is {type(value).__name__}, expected {expected}"
    return f"{found}: {where}" if where else found


def _inside(name: str, value: Any) -> str:
    if isinstance(value, nn.Module):
        return "its .weight" if name.endswith("weight") and hasattr(value, "weight") else ""
    if isinstance(value, Exact):
        return "its .value, since fastdpop.exact is for what a model's forward is given"
    if name.endswith("hidden"):
        if getattr(value, "last_hidden_state", None) is not None:
            return "its .last_hidden_state"
        if getattr(value, "hidden_states", None) is not None:
            return "its .hidden_states[-1]"
        if getattr(value, "logits", None) is not None:
            return "the hidden states, which output_hidden_states=True gives"
    if name.endswith("logps") and getattr(value, "logps", None) is not None:
        return "its .logps"
    if isinstance(value, Sequence) and value and all(isinstance(each, Tensor) for each in value):
        return "the last of them" if name.endswith("hidden") else ""
    if isinstance(value, (list, tuple, int, float)) or hasattr(value, "__array__"):
        return "torch.as_tensor(...) makes one"
    return ""


def of_labels(labels: Tensor) -> str:
    """A message for labels that are no integers."""
    expected = "expected torch.int64: token ids, -100 where not scored"
    if labels.dtype == torch.bool:
        expected += "; of a mask, input_ids.masked_fill(~mask, -100)"
    return f"labels has dtype {labels.dtype}, {expected}"


def of_width(hidden: Tensor, weight: Tensor, prefix: str) -> str:
    """The end of a message for hidden states and a weight that do not fit."""
    if weight.dim() != 2 or hidden.shape[-1] != len(weight):
        return ""
    return (
        f". {prefix}hidden is as wide as the vocabulary of {prefix}weight: if these are logits, pass the hidden states "
        f"that they were made of; if {prefix}weight is transposed, {prefix}weight.T"
    )
