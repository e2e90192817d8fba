"""Numbers that frameworks must not round on their way into a model's ``forward``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class Exact:
    """What :func:`exact` gives.

    A plain object, no container that casts would enter: FSDP's mixed precision rounds floating-point tensors in tuples,
    dicts, dataclasses and pytrees.

    Attributes:
        value: what it holds.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"exact({self.value!r})"


def exact(value: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Exact) -> Exact:
    """Carry numbers through a wrapper that casts the arguments of ``forward``, as FSDP does under mixed precision.

        out = model(**batch, preference="dpop", ref_logps=fastdpop.exact(ref_logps))

    An attached model takes it for ``ref_logps``, and for what has tensors in ``preference_options``. It changes nothing
    else, so it may always be there. Log-probs of a sequence rounded to bfloat16 are off by up to half a nat or more.

    Args:
        value: a tensor, (chosen, rejected), or tensors by name.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, Exact):
        return value
    parts: Any = [value] if isinstance(value, Tensor) else value
    if isinstance(parts, Mapping):
        parts = list(parts.values())
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"value is {type(value).__name__}, expected a tensor, (chosen, rejected) or tensors by name"
        )
    return Exact(value)


def opened(value: Any) -> Any:
    """What an :class:`Exact` holds, also as an item of a mapping; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: opened(item) for name, item in value.items()}
    return value.value if isinstance(value, Exact) else value
