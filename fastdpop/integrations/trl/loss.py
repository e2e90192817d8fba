"""The loss that the settings of a ``DPOTrainer`` ask for, as fastdpop's."""

from __future__ import annotations

import functools
from typing import Any

from fastdpop import checks, losses
from fastdpop.integrations.dpop_lambda import DEFAULT
from fastdpop.losses.base import PreferenceLoss

_SHARED = ("beta", "divergence", "alpha")
_TAKES: dict[str, tuple[str, ...]] = {
    "dpop": ("beta", "lam", "label_smoothing"),
    "sigmoid": _SHARED,
    "sigmoid_norm": _SHARED,
    "hinge": _SHARED,
    "ipo": _SHARED,
    "exo_pair": (*_SHARED, "label_smoothing"),
    "robust": (*_SHARED, "label_smoothing"),
    "discopop": (*_SHARED, "tau"),
    "nca_pair": ("beta",),
    "bco_pair": ("beta",),
    "sppo_hard": ("beta",),
    "apo_zero": ("beta",),
    "apo_down": ("beta",),
    "aot": ("beta", "label_smoothing"),
    "aot_unpaired": ("beta", "label_smoothing"),
    "sft": (),
}
"""The losses of TRL and DPOP, under TRL's names, and the options that each of them reads there."""
LOSS_TYPES = tuple(_TAKES)

_DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}


def preference(trainer: Any) -> PreferenceLoss:
    """The loss that a ``DPOTrainer``'s settings ask for, as fastdpop's.

    Raises:
        ValueError: a loss type or divergence is not known, or some of the settings do not go together.
    """
    divergence = str(trainer.f_divergence_type)
    checks.choice("f_divergence_type", divergence, tuple(_DIVERGENCES))
    plain = divergence == "reverse_kl"
    alpha = trainer.f_alpha_divergence_coef if divergence == "alpha_divergence" else None
    options = {
        "beta": trainer.beta,
        "lam": getattr(trainer.args, "dpop_lambda", DEFAULT),
        "label_smoothing": trainer.label_smoothing,
        "tau": trainer.args.discopop_tau,
        "divergence": _DIVERGENCES[divergence],
        "alpha": alpha,
    }
    terms = []
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        checks.choice("loss_type", name, tuple(_TAKES))
        if not plain and name != "sft" and "divergence" not in _TAKES[name]:
            raise ValueError(
                f"f_divergence_type is {divergence!r}, expected 'reverse_kl' with loss_type {name!r}: "
                "it is no function of the difference of two scores"
            )
        terms.append(weight * losses.get(name, **{o: options[o] for o in _TAKES[name]}))
    loss = functools.reduce(lambda total, term: total + term, terms)
    if trainer.use_weighting:
        loss = losses.wpo_weighted(loss)
    if trainer.ld_alpha is None:
        return loss
    if "sft" in trainer.loss_types:
        raise ValueError(
            f"ld_alpha is {trainer.ld_alpha}, expected None with loss_type 'sft', which TRL computes from whole "
            "completions: train with one of the two, or without fastdpop (fastdpop.unpatch_trl())"
        )
    return losses.length_desensitised(loss, trainer.ld_alpha)
