"""What may stand around a model: DDP and engines (``module``), ``torch.compile`` (``_orig_mod``)."""

from __future__ import annotations

from typing import Any

from torch import nn


def wrapped(model: Any) -> nn.Module | None:
    """The module that a wrapper holds, None for anything that is no wrapper."""
    for name in ("_orig_mod", "module"):
        inside = getattr(model, name, None)
        if isinstance(inside, nn.Module):
            return inside
    return None


def innermost(model: Any) -> Any:
    """The model inside all wrappers."""
    while (inside := wrapped(model)) is not None:
        model = inside
    return model
