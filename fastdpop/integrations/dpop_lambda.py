"""DPOP's lambda as trainers' settings have it."""

from __future__ import annotations

import math
from typing import Any

from fastdpop import losses

DEFAULT = losses.DPOP().lam
HELP = (
    "DPOP's lambda (the loss type 'dpop'): the weight of its penalty, inside beta. "
    f"The default is the paper's, {DEFAULT:g}."
)


def check(value: Any) -> None:
    """
    Raises:
        ValueError, TypeError: `value` is not a finite number, 0 or above.
    """
    message = f"dpop_lambda is {value!r}, expected a finite number >= 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message)
    if not math.isfinite(value) or value < 0:
        raise ValueError(message)
