"""Sums of losses that have a name of their own."""

from __future__ import annotations

from fastdpop.choices import Per

from .base import PreferenceLoss
from .batch import BCO
from .free import SFT
from .options import KIND, check, non_negative
from .ratio import DPO


def mpo(*, beta: float = 0.1) -> PreferenceLoss:
    """Mixed preference optimisation (arXiv:2411.10442) with the weights of InternVL2-MPO's scripts and
    of TRL's documentation: ``0.8 * dpo + 0.2 * bco_pair + 1.0 * sft``.
    """
    return 0.8 * DPO(beta=beta) + 0.2 * BCO(beta=beta) + 1.0 * SFT()


def rpo(
    *, alpha: float = 1.0, beta: float = 0.1, label_smoothing: float = 0.0, per: Per = "token"
) -> PreferenceLoss:
    """DPO with NLL (iterative reasoning preference optimisation, arXiv:2404.19733):
    ``dpo + alpha * sft``, TRL's former ``rpo_alpha``. TRL's NLL is the mean over the tokens of a
    batch, that of the paper is ``per="sequence"``.
    """
    check("rpo", "alpha", alpha, non_negative(1.0).metadata[KIND])
    return DPO(beta=beta, label_smoothing=label_smoothing) + alpha * SFT(per=per)
