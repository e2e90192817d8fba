"""WPO: any loss, with every pair weighted by how likely the policy itself is to write it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .algebra import per_token
from .base import PairLogps, PreferenceLoss, Traits, by_pair, check_loss

_STATISTIC = "aligned_logps"


@dataclass(frozen=True)
class WPOWeighted(PreferenceLoss):
    """``w(y_w) * w(y_l) * loss``, where ``w(y) = exp(mean_t(log p_t(y_t) - log sum_v p_t(v)^2))``
    without gradient (arXiv:2406.11827, Eq. 2, with the paper's sampled alignment). An empty
    completion weighs 1.
    """

    loss: PreferenceLoss

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def traits(self) -> Traits:
        inner = self.loss.traits
        return replace(inner, statistics=tuple(sorted({*inner.statistics, _STATISTIC})))

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = pairs.chosen_aligned_logps, pairs.rejected_aligned_logps
        if chosen is None or rejected is None:
            raise ValueError(f"WPO reads the statistic {_STATISTIC!r}, which this call lacks")
        log_weights = per_token(chosen, pairs.chosen_lengths)
        log_weights = log_weights + per_token(rejected, pairs.rejected_lengths)
        return torch.exp(log_weights.detach()) * by_pair(self.loss, pairs)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.loss.rewards(pairs)


def wpo_weighted(loss: PreferenceLoss) -> PreferenceLoss:
    """The loss with WPO's weights; see :class:`WPOWeighted`."""
    return WPOWeighted(loss)
