"""Adding and removing hooks of a module by the functions themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

_ADDING = threading.Lock()


def add(
    module: nn.Module,
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    with_kwargs: bool = False,
) -> None:
    """Register hooks around ``forward`` that are not there yet, `after` as the first of its kind."""
    with _ADDING:
        if before is not None and before not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(before, with_kwargs=with_kwargs)
        if after is not None and after not in module._forward_hooks.values():
            module.register_forward_hook(after, with_kwargs=with_kwargs, prepend=True)


def remove(module: nn.Module, functions: Collection[Callable[..., Any]]) -> None:
    """Take out the hooks around ``forward`` that are among `functions`, also in a copy of a module."""
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        present = getattr(module, kind)
        for key in [key for key, hook in present.items() if hook in functions]:
            del present[key]
            getattr(module, f"{kind}_with_kwargs").pop(key, None)
