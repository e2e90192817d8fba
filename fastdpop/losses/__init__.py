"""The family of preference losses, by name.

    get("dpop", beta=0.3, lam=50.0)                  a loss
    get("dpo") + 0.1 * get("sft")                    a weighted sum of losses
    wpo_weighted(get("ipo"))                         a loss with WPO's weights
    length_desensitised(get("dpo"), alpha=0.5)       a loss with LD-DPO's token weights
    pairwise(lambda pairs: ...)                      a loss of your own

Losses of one pair are in :mod:`.dpop` and :mod:`.ratio`, those that compare pairs in :mod:`.batch`,
those without a reference in :mod:`.free`, those of given rewards in :mod:`.rewarded`, that of rankings
in :mod:`.ranking`, and sums that have a name in :mod:`.presets`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdpop.choices import LossName
from fastdpop.names import hint

from .base import (
    FunctionLoss,
    LengthDesensitised,
    PairLogps,
    PreferenceLoss,
    Traits,
    WeightedSum,
    length_desensitised,
)
from .batch import AOT, BCO, KTO, AOTUnpaired
from .divergence import DivergenceLoss
from .dpop import DPOP
from .free import AFT, CPO, ORPO, SFT, AlphaPO, SimPO
from .keys import by_key, key_of
from .presets import mpo, rpo
from .ranking import PlackettLuce, ranked
from .ratio import (
    DPO,
    EXO,
    IPO,
    NCA,
    SPPO,
    APODown,
    APOZero,
    CalDPO,
    DiscoPOP,
    DPOShift,
    Hinge,
    LengthNormalisedDPO,
    RobustDPO,
)
from .rewarded import RPOBackwardKL, RPOForwardKL, RPOSquared
from .trial import pairwise
from .wpo import WPOWeighted, wpo_weighted

__all__ = [
    "AFT",
    "AOT",
    "BCO",
    "CPO",
    "DPO",
    "DPOP",
    "EXO",
    "IPO",
    "KTO",
    "NCA",
    "ORPO",
    "SFT",
    "SPPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AlphaPO",
    "CalDPO",
    "DPOShift",
    "DiscoPOP",
    "DivergenceLoss",
    "FunctionLoss",
    "Hinge",
    "LengthDesensitised",
    "LengthNormalisedDPO",
    "PairLogps",
    "PlackettLuce",
    "PreferenceLoss",
    "RPOBackwardKL",
    "RPOForwardKL",
    "RPOSquared",
    "RobustDPO",
    "SimPO",
    "Traits",
    "WPOWeighted",
    "WeightedSum",
    "as_loss",
    "available",
    "by_key",
    "get",
    "key_of",
    "length_desensitised",
    "options_of",
    "pairwise",
    "ranked",
    "wpo_weighted",
]

_LOSSES: dict[str, Callable[..., PreferenceLoss]] = {
    "dpop": DPOP,
    "dpo": DPO,
    "sigmoid": DPO,
    "sigmoid_norm": LengthNormalisedDPO,
    "ipo": IPO,
    "hinge": Hinge,
    "robust": RobustDPO,
    "exo_pair": EXO,
    "nca_pair": NCA,
    "bco_pair": BCO,
    "sppo_hard": SPPO,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "discopop": DiscoPOP,
    "dpo_shift": DPOShift,
    "cal_dpo": CalDPO,
    "rpo_sq": RPOSquared,
    "rpo_bwd_kl": RPOBackwardKL,
    "rpo_fwd_kl": RPOForwardKL,
    "plackett_luce": PlackettLuce,
    "listwise": PlackettLuce,
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "kto": KTO,
    "sft": SFT,
    "cpo": CPO,
    "simpo": SimPO,
    "alpha_po": AlphaPO,
    "orpo": ORPO,
    "aft": AFT,
    "mpo": mpo,
    "rpo": rpo,
}


_OPTIONS = {name: list(inspect.signature(make).parameters) for name, make in _LOSSES.items()}


def available() -> tuple[str, ...]:
    """The names that :func:`get` knows. ``"sigmoid"`` is TRL's name of ``"dpo"``, ``"listwise"`` another
    of ``"plackett_luce"``; ``"mpo"`` and ``"rpo"`` are sums.
    """
    return tuple(_LOSSES)


def options_of(name: str) -> tuple[str, ...]:
    """The names of the options of the loss of that name, one of :func:`available`."""
    return tuple(_OPTIONS[name])


def get(name: LossName | str, **options: Any) -> PreferenceLoss:
    """The loss of that name.

    Args:
        name: one of :func:`available`.
        options: the fields of the loss's class, or what its function in :mod:`.presets` takes; those left
            out keep their defaults.

    Raises:
        ValueError: no loss has that name, or an option's value is out of its range.
        TypeError: the loss has no such option, or a value is of the wrong type.
    """
    _check_name(name, "loss")
    for option in options:
        if option not in _OPTIONS[name]:
            others = [repr(other) for other, own in _OPTIONS.items() if option in own]
            raise TypeError(
                f"the loss {name!r} has no option {option!r}{hint(option, _OPTIONS[name])}; it has "
                + (", ".join(_OPTIONS[name]) or "no options")
                + (f" ({option!r} is one of {' and '.join(others)})" if 0 < len(others) < 4 else "")
            )
    return _LOSSES[name](**options)


def _check_name(name: object, keyword: str) -> None:
    if not isinstance(name, str) or name not in _LOSSES:
        raise ValueError(
            f"{keyword} is {name!r}, which is not a loss{hint(name, _LOSSES)}: expected one of "
            + ", ".join(_LOSSES)
        )


def as_loss(
    loss: LossName | str | PreferenceLoss | Callable[[PairLogps], Tensor], keyword: str = "loss"
) -> PreferenceLoss:
    """A loss from its name, itself, or a function of :class:`PairLogps`.

    A plain function may compare pairs, so the whole batch is given to it at once; see
    :func:`pairwise` for one that doesn't.

    Args:
        keyword: under which the caller has it, for messages.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if isinstance(loss, str):
        _check_name(loss, keyword)
        return get(loss)
    if isinstance(loss, PreferenceLoss):
        return loss
    if isinstance(loss, type) or not callable(loss):
        more = ""
        if isinstance(loss, type) and issubclass(loss, PreferenceLoss):
            more = f": {loss.__name__}(), not the class"
        elif isinstance(loss, (list, tuple)):
            more = ": a sum of losses is written get('dpop') + 0.1 * get('sft')"
        raise TypeError(
            f"{keyword} is {loss!r}, expected a name, a PreferenceLoss object or a function of PairLogps{more}"
        )
    if isinstance(loss, torch.nn.modules.loss._Loss):
        raise TypeError(
            f"{keyword} is {loss!r}, which compares logits with labels, expected a name, a PreferenceLoss object or a "
            "function of PairLogps"
        )
    return FunctionLoss(loss, Traits(needs_reference=False, couples_pairs=True, reads=None))
