"""Reward-aware preference optimisation (RPO): the difference of the implicit rewards becomes that of
the rewards that someone gave the two completions.

Of each pair the losses read ``"chosen_score"`` and ``"rejected_score"``, which have no unit but what
``eta`` makes of it. In every formula ``z = beta * (r_w - r_l)`` with ``r = log pi - log ref``, w the
chosen and l the rejected completion, and ``t = eta * (chosen_score - rejected_score)``. The names are
those of NeMo's ``preference_loss``; its ``ref_policy_kl_penalty`` is beta and its
``gt_reward_scale`` eta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PairLogps, Traits
from .options import CheckedLoss, positive
from .shifts import given

_SCORES = ("chosen_score", "rejected_score")


@dataclass(frozen=True, kw_only=True)
class RewardAware(CheckedLoss):
    """What the losses of this module have in common."""

    beta: float = positive(0.1)
    eta: float = positive(1.0)
    _traits: ClassVar[Traits] = Traits(reads=_SCORES, needs=_SCORES)

    def differences(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """z and t, ``(P,)`` each."""
        chosen, rejected = (given(pairs, name) for name in _SCORES)
        z = self.beta * (pairs.chosen_logratios - pairs.rejected_logratios)
        return z, self.eta * (chosen - rejected)


@dataclass(frozen=True, kw_only=True)
class RPOSquared(RewardAware):
    """``(z - t)^2`` (RPO with the squared distance, arXiv:2502.00203)."""

    def __call__(self, pairs: PairLogps) -> Tensor:
        z, t = self.differences(pairs)
        return (z - t) ** 2


@dataclass(frozen=True, kw_only=True)
class RPOBackwardKL(RewardAware):
    """``KL(Bernoulli(sigmoid(t)) || Bernoulli(sigmoid(z)))`` (RPO of Nemotron-4 340B,
    arXiv:2406.11704). Its gradient in z is ``sigmoid(z) - sigmoid(t)``, that of DPO
    with a label of sigmoid(t).
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        z, t = self.differences(pairs)
        return _divergence(t, z)


@dataclass(frozen=True, kw_only=True)
class RPOForwardKL(RewardAware):
    """``KL(Bernoulli(sigmoid(z)) || Bernoulli(sigmoid(t)))`` (RPO with the other direction of the
    divergence, arXiv:2502.00203).
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        z, t = self.differences(pairs)
        return _divergence(z, t)


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """``KL(Bernoulli(sigmoid(a)) || Bernoulli(sigmoid(b)))``."""
    first = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    return first + torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))
