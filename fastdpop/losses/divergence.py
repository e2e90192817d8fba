"""f-divergences: what takes the place of the log-ratio when the policy is kept near its reference
by another measure than the reverse KL (f-DPO, arXiv:2309.16240, Table 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastdpop.choices import Divergence

from .algebra import bounded_expm1
from .base import PairLogps, Traits
from .options import CheckedLoss, one_of, optional_number, positive
from .shifts import SHIFTS, shifted


@dataclass(frozen=True, kw_only=True)
class DivergenceLoss(CheckedLoss):
    """A loss of scores ``s = f'(pi / ref)``, 0 where the policy equals its reference; with ``r =
    log pi - log ref``:

    - ``divergence="reverse_kl"``: ``s = r``, the usual one
    - ``divergence="forward_kl"``: ``s = 1 - exp(-r)``
    - ``divergence="js"``: ``s = log 2 + log sigmoid(r)``
    - ``divergence="alpha"``: ``s = (exp((alpha - 1) r) - 1) / (alpha - 1)``, alpha 0.5 by default;
      ``s = r`` in the limit alpha = 1

    An exponential is continued by its tangent above exponent 30, so that no score overflows.
    """

    beta: float = positive(0.1)
    divergence: Divergence = one_of(Divergence)
    alpha: float | None = optional_number()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and self.divergence != "alpha":
            raise ValueError(
                f"{type(self).__name__}: alpha is {self.alpha!r}, expected None with divergence "
                f"{self.divergence!r}: only divergence='alpha' reads it"
            )

    def scores(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected, ``(P,)`` each."""
        return self._score(pairs.chosen_logratios), self._score(pairs.rejected_logratios)

    def _score(self, r: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return -bounded_expm1(-r)
        if self.divergence == "js":
            return math.log(2.0) + F.logsigmoid(r)
        power = (0.5 if self.alpha is None else self.alpha) - 1.0
        if self.divergence == "alpha" and abs(power) >= 1e-6:  # nearer 1, rounding hides r
            return bounded_expm1(power * r) / power
        return r


@dataclass(frozen=True, kw_only=True)
class DifferenceLoss(DivergenceLoss):
    """A loss of the difference ``s_w - s_l``, less the pair's ``"offset"`` and ``"margin"`` where the
    data give them; see :func:`.shifts.shifted`.
    """

    _traits: ClassVar[Traits] = Traits(reads=SHIFTS)

    def z(self, pairs: PairLogps) -> Tensor:
        """``beta * (s_w - s_l - offset) - margin``, ``(P,)``."""
        chosen, rejected = self.scores(pairs)
        return self.beta * shifted(chosen - rejected, pairs, self.beta)
