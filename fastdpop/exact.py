"""Numbers that frameworks must not round on their way into a model's ``forward``."""

from __future__ import annotations

from collections.abc import Sequence
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


def exact(value: Tensor | Sequence[Tensor] | Exact) -> Exact:
    """Carry numbers through a wrapper that casts the arguments of ``forward``, as FSDP does under mixed precision.

        out = model(**batch, preference="dpop", ref_logps=fastdpop.exact(ref_logps))

    An attached model takes it for ``ref_logps``, and for tensors in ``preference_options``. It changes nothing else, so
    it may always be there. Log-probs of a sequence rounded to bfloat16 are off by up to half a nat or more.

    Args:
        value: a tensor, or (chosen, rejected).

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, Exact):
        return value
    sides = [value] if isinstance(value, Tensor) else value
    if not isinstance(sides, (list, tuple)) or not all(isinstance(side, Tensor) for side in sides):
        raise TypeError(f"value is {type(value).__name__}, expected a tensor or (chosen, rejected)")
    return Exact(value)


def opened(value: Any) -> Any:
    """What an :class:`Exact` holds; anything else as it is."""
    return value.value if isinstance(value, Exact) else value
