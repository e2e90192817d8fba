"""The few functions that several losses share. All are elementwise, differentiable and finite for
finite arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# exp(30) squared still fits float32 with room for a factor of 1e12.
_LARGEST_EXPONENT = 30.0


def smoothed_nll(z: Tensor, label_smoothing: float) -> Tensor:
    """``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``: cDPO, labels wrong with probability e."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def bounded_exp(x: Tensor) -> Tensor:
    """``exp(x)`` up to x = 30 and its tangent beyond: a lost pair keeps a finite gradient of the
    right sign.
    """
    inside = x.clamp(max=_LARGEST_EXPONENT)
    return inside.exp() * (1 + (x - inside))


def bounded_expm1(x: Tensor) -> Tensor:
    """``bounded_exp(x) - 1``, exact near 0."""
    inside = x.clamp(max=_LARGEST_EXPONENT)
    return inside.expm1() + inside.exp() * (x - inside)


def per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    """Mean over a completion's tokens; 0 for an empty completion."""
    return sums / lengths.clamp(min=1)


def present_mean(values: Tensor, present: Tensor) -> Tensor:
    """Mean over the sides that exist, a constant to autograd; 0 when there are none."""
    present = present.to(values.dtype)
    return ((values * present).sum() / present.sum().clamp(min=1)).detach()


def side_sum(
    chosen: Tensor, rejected: Tensor, chosen_present: Tensor, rejected_present: Tensor
) -> Tensor:
    """``chosen + rejected`` with exactly 0, and no gradient, for a side that does not exist."""
    return chosen.masked_fill(~chosen_present, 0.0) + rejected.masked_fill(~rejected_present, 0.0)


def rank(values: Tensor) -> Tensor:
    """Position of every value in ascending order, ties in their order of appearance, ``(P,)``
    int64.
    """
    return torch.argsort(torch.argsort(values, stable=True))
