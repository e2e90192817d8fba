"""The product of backward, as an operator: a gradient that is there, times what comes from above."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

_PIECE = 2**19
"""Numbers that are scaled at once on a CPU."""


def no_second_derivative(ctx: Any, *gradients: Any) -> Any:
    """The backward of what has been differentiated.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "no double differentiation: fastdpop gives first derivatives only. Take second ones from "
        "fastdpop.naive, which has the same log-probs in plain torch, or by finite differences"
    )


@custom_op("fastdpop::scale", mutates_args=())
def scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor`` rounded once to ``dtype``; `factor` is 0-d, or ``(rows, 1)``.

    A product with a 16-bit result goes through a full-size temporary on CPUs; pieces that fit the
    cache don't.
    """
    result = torch.empty_like(gradient, dtype=dtype)
    if gradient.device.type != "cpu" or gradient.dim() == 0:
        return torch.mul(gradient, factor, out=result)
    step = max(1, _PIECE * gradient.shape[0] // max(gradient.numel(), 1))
    for start in range(0, gradient.shape[0], step):
        piece = slice(start, start + step)
        own = factor[piece] if factor.dim() else factor
        torch.mul(gradient[piece], own, out=result[piece])
    return result


@scale.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


scale.register_autograd(no_second_derivative)
