"""Losses of one pair's log-ratios, DPO and its relatives.

In every formula ``r = log pi - log ref`` of a completion, ``s`` its score (``r``, unless another
``divergence`` is chosen), w the chosen and l the rejected one, and ``z = beta * (s_w - s_l)``, less
the pair's offset and margin where it has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .algebra import bounded_exp, per_token, side_sum, smoothed_nll
from .base import PairLogps, Traits
from .divergence import DifferenceLoss, DivergenceLoss
from .options import CheckedLoss, flag, fraction, noise_rate, non_negative, positive
from .shifts import SHIFTS, shifted


@dataclass(frozen=True, kw_only=True)
class DPO(DifferenceLoss):
    """``-log sigmoid(z)`` (arXiv:2305.18290, Eq. 7); ``label_smoothing`` e makes it cDPO:
    ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)`` (Mitchell 2023, "A note on DPO with noisy
    preferences").
    """

    label_smoothing: float = noise_rate(0.0)

    def __call__(self, pairs: PairLogps) -> Tensor:
        return smoothed_nll(self.z(pairs), self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class LengthNormalisedDPO(DifferenceLoss):
    """``-log sigmoid(beta * (s_w / |y_w| - s_l / |y_l|))`` (Tulu 3, arXiv:2411.15124). Being
    per token, it wants a larger beta than DPO: the paper trains with 5.
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        s_w, s_l = self.scores(pairs)
        means = per_token(s_w, pairs.chosen_lengths) - per_token(s_l, pairs.rejected_lengths)
        return -F.logsigmoid(self.beta * shifted(means, pairs, self.beta))


@dataclass(frozen=True, kw_only=True)
class IPO(DifferenceLoss):
    """``(s_w - s_l - 1 / (2 beta))^2`` (arXiv:2310.12036, Eq. 17; beta is the paper's tau). With
    ``average`` each score is first divided by its completion's length, as TRL does and, according
    to TRL, the paper's authors did. A margin moves the target of ``beta * (s_w - s_l)``, one half, up.
    """

    average: bool = flag(True)

    def __call__(self, pairs: PairLogps) -> Tensor:
        s_w, s_l = self.scores(pairs)
        if self.average:
            s_w, s_l = per_token(s_w, pairs.chosen_lengths), per_token(s_l, pairs.rejected_lengths)
        return (shifted(s_w - s_l, pairs, self.beta) - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True, kw_only=True)
class Hinge(DifferenceLoss):
    """``max(0, 1 - z)`` (SLiC, arXiv:2305.10425, with RSO's log-ratios, arXiv:2309.06657)."""

    def __call__(self, pairs: PairLogps) -> Tensor:
        return torch.relu(1 - self.z(pairs))


@dataclass(frozen=True, kw_only=True)
class RobustDPO(DifferenceLoss):
    """``(-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)`` (arXiv:2403.00409): DPO's loss,
    unbiased when labels are wrong with probability e = ``label_smoothing``. 0 is plain DPO.
    """

    label_smoothing: float = noise_rate(0.1)

    def __call__(self, pairs: PairLogps) -> Tensor:
        z, e = self.z(pairs), self.label_smoothing
        return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


@dataclass(frozen=True, kw_only=True)
class EXO(DifferenceLoss):
    """``KL(q || p)`` with ``q = (sigmoid(z), sigmoid(-z))`` and ``p = (1 - e, e)``
    (arXiv:2402.00856, Eq. 16). e = ``label_smoothing`` must be above 0, where the divergence would
    be infinite; the paper takes 1e-3.
    """

    label_smoothing: float = noise_rate(1e-3, zero=False)

    def __call__(self, pairs: PairLogps) -> Tensor:
        z, e = self.z(pairs), self.label_smoothing
        return torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-e)) + torch.sigmoid(-z) * (
            F.logsigmoid(-z) - math.log(e)
        )


@dataclass(frozen=True, kw_only=True)
class NCA(DivergenceLoss):
    """``-log sigmoid(b_w) - log sigmoid(-b_w) / 2 - log sigmoid(-b_l) / 2`` with ``b = beta * s``
    (arXiv:2402.05369).
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        b_w, b_l = (self.beta * s for s in self.scores(pairs))
        return -F.logsigmoid(b_w) - 0.5 * F.logsigmoid(-b_w) - 0.5 * F.logsigmoid(-b_l)


@dataclass(frozen=True, kw_only=True)
class SPPO(DivergenceLoss):
    """``(s_w - 1 / (2 beta))^2 + (s_l + 1 / (2 beta))^2`` (arXiv:2405.00675, Eq. 4.7, with win
    probabilities 1 and 0; beta is one over the paper's eta).
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        s_w, s_l = self.scores(pairs)
        return (s_w - 0.5 / self.beta) ** 2 + (s_l + 0.5 / self.beta) ** 2


@dataclass(frozen=True, kw_only=True)
class APOZero(CheckedLoss):
    """``sigmoid(-beta * r_w) + sigmoid(beta * r_l)`` (arXiv:2408.06266, Eq. 7), for chosen
    completions better than the model's own. Either side may be absent.
    """

    beta: float = positive(0.1)
    _traits: ClassVar[Traits] = Traits(accepts_unpaired=True)

    def __call__(self, pairs: PairLogps) -> Tensor:
        chosen = torch.sigmoid(-self.beta * pairs.chosen_logratios)
        rejected = torch.sigmoid(self.beta * pairs.rejected_logratios)
        return side_sum(chosen, rejected, pairs.chosen_present, pairs.rejected_present)


@dataclass(frozen=True, kw_only=True)
class APODown(DifferenceLoss):
    """``sigmoid(beta * r_w) + sigmoid(-z)`` (arXiv:2408.06266, Eq. 8), for chosen completions worse
    than the model's own.
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        return torch.sigmoid(self.beta * pairs.chosen_logratios) + torch.sigmoid(-self.z(pairs))


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(DifferenceLoss):
    """``-(1 - m) log sigmoid(z) + m exp(-z)`` with ``m = sigmoid(z / tau)``
    (arXiv:2406.08414, Eq. 5).
    """

    tau: float = positive(0.05)

    def __call__(self, pairs: PairLogps) -> Tensor:
        z = self.z(pairs)
        # m * exp(-z) from its logarithm: for a lost pair the factors are 0 and infinity.
        exponential = bounded_exp(F.logsigmoid(z / self.tau) - z)
        return exponential - torch.sigmoid(-z / self.tau) * F.logsigmoid(z)


@dataclass(frozen=True, kw_only=True)
class DPOShift(CheckedLoss):
    """``-log sigmoid(beta * (r_w - f * r_l))`` with f = ``f_lambda`` (DPO-Shift, arXiv:2502.07599): less
    weight on the rejected completion, so that less of what pushes it down pulls the chosen one along.
    1 is DPO. The paper's f(lambda) is fixed or moves linearly over the steps; this is the fixed one.
    ``label_smoothing`` as in cDPO.
    """

    beta: float = positive(0.1)
    f_lambda: float = fraction(0.95)
    label_smoothing: float = noise_rate(0.0)
    _traits: ClassVar[Traits] = Traits(reads=SHIFTS)

    def __call__(self, pairs: PairLogps) -> Tensor:
        difference = pairs.chosen_logratios - self.f_lambda * pairs.rejected_logratios
        return smoothed_nll(self.beta * shifted(difference, pairs, self.beta), self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class CalDPO(CheckedLoss):
    """``-log sigmoid(r_w - r_l) + c * ((r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2)`` with c =
    ``calibration`` (Cal-DPO, arXiv:2412.14516). There is no beta in the sigmoid. The paper's objective
    has c = 1, its authors' code 1/2, with a beta of 0.001 or 0.002.
    """

    beta: float = positive(0.1)
    calibration: float = non_negative(1.0)

    def __call__(self, pairs: PairLogps) -> Tensor:
        r_w, r_l, half = pairs.chosen_logratios, pairs.rejected_logratios, 0.5 / self.beta
        squares = (r_w - half) ** 2 + (r_l + half) ** 2
        return -F.logsigmoid(r_w - r_l) + self.calibration * squares
