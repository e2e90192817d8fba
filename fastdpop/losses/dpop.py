"""DPO-Positive, the loss this package is named after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdpop.choices import Form

from .algebra import smoothed_nll
from .base import PairLogps, Traits
from .options import CheckedLoss, noise_rate, non_negative, one_of, positive
from .shifts import SHIFTS, shifted


@dataclass(frozen=True, kw_only=True)
class DPOP(CheckedLoss):
    """DPO-Positive (arXiv:2402.13228, Eq. 3). With ``r = log pi - log ref`` of a completion, w the
    chosen and l the rejected one, and the penalty ``p = max(0, -r_w)``:

    - ``form="inside"`` (Eq. 3): ``-log sigmoid(beta * (r_w - r_l - lam * p))``
    - ``form="outside"``: ``-log sigmoid(beta * (r_w - r_l) - lam * p)``
    - ``form="additive"``: ``-log sigmoid(beta * (r_w - r_l)) + lam * p``

    The hinge is off at ``r_w == 0`` exactly, so a policy equal to its reference takes DPO's first
    step, bit for bit.

    Lambda in the three forms: ``lam_outside = beta * lam_inside`` is the same loss. The additive
    form is not the same loss for any lambda; ``lam_additive = beta * lam_inside`` gives the penalty
    at most the slope that the inside form gives it, and that slope where the pair is lost
    (``sigmoid(-z)`` near 1). To match at the reference (``sigmoid(0) = 1/2``), take half.

    ``label_smoothing`` is cDPO's: ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``, where z is the
    form's whole argument of the sigmoid, the penalty included (it is part of the implicit reward of
    y_w); the additive form's penalty is left alone.

    A pair's offset and margin lower ``r_w - r_l``, in every form; the penalty looks at r_w alone.
    """

    beta: float = positive(0.3)
    lam: float = non_negative(50.0)
    form: Form = one_of(Form)
    label_smoothing: float = noise_rate(0.0)
    _traits: ClassVar[Traits] = Traits(reads=SHIFTS)

    def __call__(self, pairs: PairLogps) -> Tensor:
        r_w, r_l = pairs.chosen_logratios, pairs.rejected_logratios
        difference = shifted(r_w - r_l, pairs, self.beta)
        penalty = self.lam * torch.relu(-r_w)  # relu's slope at 0 is 0
        if self.form == "inside":
            return smoothed_nll(self.beta * (difference - penalty), self.label_smoothing)
        if self.form == "outside":
            return smoothed_nll(self.beta * difference - penalty, self.label_smoothing)
        return smoothed_nll(self.beta * difference, self.label_smoothing) + penalty
