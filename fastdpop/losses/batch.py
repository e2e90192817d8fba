"""Losses in which pairs meet: each compares a pair with the whole batch, always or by an option.

``r = log pi - log ref``; w is the chosen and l the rejected completion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .algebra import present_mean, rank, side_sum, smoothed_nll
from .base import PairLogps, Traits, rounded_alike
from .divergence import DivergenceLoss
from .options import CheckedLoss, flag, noise_rate, positive


@dataclass(frozen=True, kw_only=True)
class AOT(CheckedLoss):
    """``-log sigmoid(beta * (m_(k) - n_(k)))``: distributional alignment by optimal transport,
    paired (arXiv:2406.05882), with m the policy's margins ``log pi(y_w) - log pi(y_l)``, n the
    reference's, and ``(k)`` the k-th smallest of the batch. A pair's value is that of its own
    margin's rank. ``label_smoothing`` as in cDPO.
    """

    beta: float = positive(0.1)
    label_smoothing: float = noise_rate(0.0)
    _traits: ClassVar[Traits] = Traits(couples_pairs=True)

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen, ref_chosen = rounded_alike(pairs.chosen, pairs.ref_chosen)
        rejected, ref_rejected = rounded_alike(pairs.rejected, pairs.ref_rejected)
        policy = chosen - rejected
        reference = torch.sort(ref_chosen - ref_rejected).values
        return smoothed_nll(self.beta * (policy - reference[rank(policy)]), self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class AOTUnpaired(CheckedLoss):
    """``-log sigmoid(beta * (r_w(k) - r_l(k)))``: distributional alignment by optimal transport,
    unpaired (arXiv:2406.05882), with ``(k)`` the k-th smallest of the batch. A pair's value is that
    of its own chosen side's rank. ``label_smoothing`` as in cDPO.
    """

    beta: float = positive(0.1)
    label_smoothing: float = noise_rate(0.0)
    _traits: ClassVar[Traits] = Traits(couples_pairs=True)

    def __call__(self, pairs: PairLogps) -> Tensor:
        r_w, r_l = pairs.chosen_logratios, torch.sort(pairs.rejected_logratios).values
        return smoothed_nll(self.beta * (r_w - r_l[rank(r_w)]), self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class BCO(DivergenceLoss):
    """``-log sigmoid(b_w - d) - log sigmoid(d - b_l)`` with ``b = beta * s`` (arXiv:2404.04656).
    The paper's reward shift d is the batch's mean of b over both sides with ``batch_shift=True``
    (no gradient), else 0. Either side may be absent.
    """

    batch_shift: bool = flag(False)

    @property
    def traits(self) -> Traits:
        return Traits(accepts_unpaired=True, couples_pairs=self.batch_shift)

    def __call__(self, pairs: PairLogps) -> Tensor:
        b_w, b_l = (self.beta * s for s in self.scores(pairs))
        there_w, there_l = pairs.chosen_present, pairs.rejected_present
        if self.batch_shift:
            shift = present_mean(torch.cat([b_w, b_l]), torch.cat([there_w, there_l]))
            b_w, b_l = b_w - shift, b_l - shift
        return side_sum(-F.logsigmoid(b_w), -F.logsigmoid(-b_l), there_w, there_l)


@dataclass(frozen=True, kw_only=True)
class KTO(CheckedLoss):
    """``u * sigmoid(beta * (z_w - r_w)) + v * sigmoid(beta * (r_l - z_l))`` (arXiv:2402.01306, Eq.
    7, written as a loss) with u = ``desirable_weight`` and v = ``undesirable_weight``, scaled so
    that the mean over pairs is the mean over all sides that exist.

    The reference point z is ``kl``, an estimate of KL(pi || ref), clamped at 0 and without
    gradient, when the call has it. Otherwise the batch gives it: ``z_w = max(0, mean r_l)`` and
    ``z_l = max(0, mean r_w)``, each side judged by the other as in TRL's former ``kto_pair``;
    a side missing from the whole batch gives 0.
    """

    beta: float = positive(0.1)
    desirable_weight: float = positive(1.0)
    undesirable_weight: float = positive(1.0)
    _traits: ClassVar[Traits] = Traits(
        accepts_unpaired=True, uses_kl=True, couples_pairs_without_kl=True
    )

    def __call__(self, pairs: PairLogps) -> Tensor:
        r_w, r_l = pairs.chosen_logratios, pairs.rejected_logratios
        there_w, there_l = pairs.chosen_present, pairs.rejected_present
        if pairs.kl is None:
            z_w, z_l = present_mean(r_l, there_l), present_mean(r_w, there_w)
        else:
            z_w = z_l = pairs.kl.detach()
        chosen = self.desirable_weight * torch.sigmoid(self.beta * (z_w.clamp(min=0) - r_w))
        rejected = self.undesirable_weight * torch.sigmoid(self.beta * (r_l - z_l.clamp(min=0)))
        sides = side_sum(chosen, rejected, there_w, there_l)
        return sides * pairs.batch_pairs / pairs.batch_sides.clamp(min=1)
