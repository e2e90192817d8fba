"""Calls that ``torch.compile`` leaves alone; a module of its own, since torch imports its compiler for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns, which runs as it is written, and so what it calls."""
    return function(*args, **kwargs)
