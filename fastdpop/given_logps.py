"""Log-probs of a reference that a caller gave, as numbers: whether they can be log-probs at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import custom_op

HIGHEST = 1.0
"""In nats: sums of rounded log-probs may come out a little above 0."""


@custom_op("fastdpop::sound_logps", mutates_args=())
def sound(logps: Tensor, pairs: Tensor) -> Tensor:
    """The log-probs ``(2, P)`` of chosen and rejected completions, where a side is absent anything.

    An operator, since what depends on values is none of a compiler's business. Reads two numbers back.

    Args:
        pairs: ``(P, 2)``, -1 for an absent side.

    Raises:
        ValueError: one is NaN, infinite or above 0.
    """
    if logps.numel():
        there = torch.where(pairs.T < 0, 0.0, logps)
        low, high = torch.stack(torch.aminmax(there)).tolist()
        if not (-math.inf < low and high <= HIGHEST):  # NaN is neither
            raise ValueError(_message(there))
    return logps.clone()


@sound.register_fake
def _(logps: Tensor, pairs: Tensor) -> Tensor:
    return torch.empty_like(logps)


def _message(logps: Tensor) -> str:
    wrong = ~(logps.isfinite() & (logps <= HIGHEST))
    side, pair = wrong.nonzero()[0].tolist()
    found = float(logps[side, pair])
    expected = "expected the log-prob of a completion in nats, the sum over its tokens: finite and at most 0"
    text = f"ref_logps is {found:.6g} for the {('chosen', 'rejected')[side]} side of pair {pair}, {expected}"
    return f"{text}; of a negative log-likelihood, take -ref_logps" if found > 0 else text
