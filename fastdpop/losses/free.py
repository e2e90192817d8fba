"""Losses without a reference model.

w is the chosen and l the rejected completion; ``a = log pi(y) / |y|`` is a completion's mean
log-probability of a token, 0 when the completion is empty. NLL is the batch's mean over chosen
tokens: a pair's share is ``-log pi(y_w)`` times pairs over chosen tokens of the batch, so that the
mean over pairs is the mean over tokens. Only scored tokens count, never the prompt. Where a loss has a
difference of chosen and rejected times beta, a pair's margin and offset lower it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpop.choices import Per

from .algebra import bounded_expm1, per_token, smoothed_nll
from .base import PairLogps, Traits
from .options import CheckedLoss, flag, noise_rate, non_negative, number, one_of, positive
from .shifts import SHIFTS, shifted


def _means(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    return (
        per_token(pairs.chosen, pairs.chosen_lengths),
        per_token(pairs.rejected, pairs.rejected_lengths),
    )


def _nll(pairs: PairLogps) -> Tensor:
    nll = -pairs.chosen.masked_fill(~pairs.chosen_present, 0.0)
    return nll * pairs.batch_pairs / pairs.batch_chosen_tokens.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class SFT(CheckedLoss):
    """NLL of the chosen completions: the mean over the batch's tokens, or with ``per="sequence"`` that
    of each completion over its own tokens, ``-a_w``. A pair without a chosen side adds 0.
    """

    per: Per = one_of(Per)
    _traits: ClassVar[Traits] = Traits(needs_reference=False, accepts_unpaired=True)

    def __call__(self, pairs: PairLogps) -> Tensor:
        if self.per == "token":
            return _nll(pairs)
        return -_means(pairs)[0].masked_fill(~pairs.chosen_present, 0.0)


@dataclass(frozen=True, kw_only=True)
class CPO(CheckedLoss):
    """``-log sigmoid(beta * (log pi(y_w) - log pi(y_l))) + nll_weight * NLL`` (arXiv:2401.08417,
    Eq. 3). ``label_smoothing`` as in cDPO.
    """

    beta: float = positive(0.1)
    nll_weight: float = non_negative(1.0)
    label_smoothing: float = noise_rate(0.0)
    _traits: ClassVar[Traits] = Traits(needs_reference=False, reads=SHIFTS)

    def __call__(self, pairs: PairLogps) -> Tensor:
        z = self.beta * shifted(pairs.chosen - pairs.rejected, pairs, self.beta)
        return smoothed_nll(z, self.label_smoothing) + self.nll_weight * _nll(pairs)


@dataclass(frozen=True, kw_only=True)
class SimPO(CheckedLoss):
    """``-log sigmoid(beta * (a_w - a_l) - gamma)`` (arXiv:2405.14734, Eq. 6). ``label_smoothing``
    as in cDPO.
    """

    beta: float = positive(2.0)
    gamma: float = non_negative(1.0)
    label_smoothing: float = noise_rate(0.0)
    _traits: ClassVar[Traits] = Traits(needs_reference=False, reads=SHIFTS)

    def __call__(self, pairs: PairLogps) -> Tensor:
        a_w, a_l = _means(pairs)
        z = self.beta * shifted(a_w - a_l, pairs, self.beta)
        return smoothed_nll(z - self.gamma, self.label_smoothing)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``beta * a``, ``(P,)`` each."""
        a_w, a_l = _means(pairs)
        return self.beta * a_w, self.beta * a_l


@dataclass(frozen=True, kw_only=True)
class AlphaPO(CheckedLoss):
    """``-log sigmoid(beta * (h_w - h_l) - gamma)`` with ``h = (1 - exp(-alpha * a)) / alpha``
    (arXiv:2501.03884): SimPO with another shape of the reward, and SimPO itself at alpha 0. The
    defaults are the paper's for Mistral-7B-Instruct. ``label_smoothing`` as in cDPO.

    The exponential is continued by its tangent above exponent 30. h is no log-probability, so there is
    a margin but no offset.
    """

    beta: float = positive(2.5)
    gamma: float = non_negative(0.1)
    alpha: float = number(0.25)
    label_smoothing: float = noise_rate(0.0)
    _traits: ClassVar[Traits] = Traits(needs_reference=False, reads=("margin",))

    def __call__(self, pairs: PairLogps) -> Tensor:
        h_w, h_l = self._shaped(pairs)
        z = self.beta * shifted(h_w - h_l, pairs, self.beta, with_offset=False)
        return smoothed_nll(z - self.gamma, self.label_smoothing)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``beta * h``, ``(P,)`` each."""
        h_w, h_l = self._shaped(pairs)
        return self.beta * h_w, self.beta * h_l

    def _shaped(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        a_w, a_l = _means(pairs)
        if self.alpha == 0:
            return a_w, a_l
        return (
            -bounded_expm1(-self.alpha * a_w) / self.alpha,
            -bounded_expm1(-self.alpha * a_l) / self.alpha,
        )


@dataclass(frozen=True, kw_only=True)
class ORPO(CheckedLoss):
    """``NLL - beta * log sigmoid(o_w - o_l)`` with log-odds ``o = a - log(1 - exp(a))``
    (arXiv:2403.07691, Eq. 6 and 7; beta is the paper's lambda).

    A completion of probability 1, the empty one included, has infinite odds; odds are therefore
    capped at one over the machine epsilon (o = 15.9 in float32, 36.0 in float64), beyond which
    ``log(1 - exp(a))`` is constant.
    """

    beta: float = positive(0.1)
    _traits: ClassVar[Traits] = Traits(needs_reference=False)

    def __call__(self, pairs: PairLogps) -> Tensor:
        o_w, o_l = (self._log_odds(a) for a in _means(pairs))
        return _nll(pairs) - self.beta * F.logsigmoid(o_w - o_l)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``beta * a``, ``(P,)`` each."""
        a_w, a_l = _means(pairs)
        return self.beta * a_w, self.beta * a_l

    @staticmethod
    def _log_odds(a: Tensor) -> Tensor:
        return a - torch.log(-torch.expm1(a.clamp(max=-torch.finfo(a.dtype).eps)))


@dataclass(frozen=True, kw_only=True)
class AFT(CheckedLoss):
    """``log(1 + exp(a_l - a_w))`` (arXiv:2309.02144, Eq. 6, with one positive and one negative
    answer), which the paper adds to SFT: ``get("sft") + get("aft")``. ``detach_rejected`` is the
    paper's detached constraint: only the chosen side learns.
    """

    detach_rejected: bool = flag(False)
    _traits: ClassVar[Traits] = Traits(needs_reference=False)

    def __call__(self, pairs: PairLogps) -> Tensor:
        a_w, a_l = _means(pairs)
        return -F.logsigmoid(a_w - (a_l.detach() if self.detach_rejected else a_l))

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """The scores ``a``, ``(P,)`` each."""
        return _means(pairs)
