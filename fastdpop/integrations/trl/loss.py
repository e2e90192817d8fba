"""The loss that the settings of a ``DPOTrainer`` ask for, as fastdpop's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from types import SimpleNamespace
from typing import Any

import torch

from fastdpop import checks, losses, pair_values
from fastdpop.integrations.dpop_lambda import DEFAULT
from fastdpop.integrations.trl.config import value_names
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


SETTINGS = {
    "dpop_lambda": "lam",
    "discopop_tau": "tau",
    "label_smoothing": "label_smoothing",
    "f_divergence_type": "divergence",
    "f_alpha_divergence_coef": "alpha",
    "beta": "beta",
}
"""TRL's settings, and what a loss calls them."""
_REPLACED = ("loss_type", "loss_weights", *(name for name in SETTINGS if name != "beta"))
"""Settings of a config that only its own losses read."""


def preference(trainer: Any) -> PreferenceLoss:
    """The loss that a ``DPOTrainer`` was given, or that its settings ask for, as fastdpop's.

    Raises:
        ValueError: a loss type or divergence is not known, or some of the settings do not go together.
    """
    given = trainer._fastdpop.loss
    loss = _configured(trainer) if given is None else given
    if trainer.use_weighting:
        loss = losses.wpo_weighted(loss)
    if trainer.ld_alpha is None:
        return loss
    if given is None and "sft" in trainer.loss_types:
        raise ValueError(
            f"ld_alpha is {trainer.ld_alpha}, expected None with loss_type 'sft', which TRL computes from whole "
            "completions: train with one of the two, or without fastdpop (fastdpop.unpatch_trl())"
        )
    return losses.length_desensitised(loss, trainer.ld_alpha)


def check_config(args: Any, loss: PreferenceLoss | None) -> None:
    """What a trainer would find when it is made, before there is one.

    Raises:
        ValueError: as :func:`preference`, :func:`check_given` and :func:`check_values` do.
    """
    if loss is not None:
        check_given(loss, args)
    check_values(configured(args, loss), value_names(args))


def configured(args: Any, loss: PreferenceLoss | None) -> PreferenceLoss:
    """The loss of a trainer with these arguments, given `loss` or not, before there is one; raises as
    :func:`preference`.
    """
    names = [
        *("beta", "label_smoothing", "ld_alpha", "use_weighting"),
        *("f_divergence_type", "f_alpha_divergence_coef"),
    ]
    return preference(
        SimpleNamespace(
            **{name: getattr(args, name) for name in names},
            args=args,
            loss_types=args.loss_type,
            loss_weights=args.loss_weights or [1.0] * len(args.loss_type),
            _fastdpop=SimpleNamespace(loss=loss),
        )
    )


def check_values(loss: PreferenceLoss, names: Sequence[str]) -> None:
    """What the loss would find in the first step.

    Raises:
        ValueError: the loss does not read one of the values that it is to be given, or needs another.
    """
    nothing = torch.empty(0, dtype=torch.float64)
    pair_values.checked(dict.fromkeys(names, nothing), loss, 0, nothing.device, False)


def unread(args: Any) -> list[str]:
    """The settings of a config that none of its losses reads, wherever they stand."""
    read = {option for name in args.loss_type for option in _TAKES.get(name, SETTINGS.values())}
    if str(args.f_divergence_type) != "alpha_divergence":
        read -= {"alpha"}
    return [name for name, option in SETTINGS.items() if option not in read]


def setting(args: Any, name: str) -> Any:
    """The value of one of :data:`SETTINGS`, as a loss takes it."""
    value = getattr(args, name)
    return _DIVERGENCES.get(str(value), value) if name == "f_divergence_type" else value


def default_of(field: Field[Any]) -> Any:
    """Of a config's field."""
    made = field.default_factory
    return field.default if made is MISSING else made()


def logged_beta(trainer: Any) -> float:
    """The factor of the rewards that a ``DPOTrainer`` logs: its loss's beta, or the config's where that has none."""
    beta: float = _own_beta(trainer._fastdpop.loss) or trainer.beta
    return beta


def _own_beta(loss: PreferenceLoss | None) -> float | None:
    """A loss's beta; of a sum, that of its first loss, whose rewards are the sum's; None for a loss without one."""
    if isinstance(loss, losses.WeightedSum):
        return _own_beta(loss.terms[0][1])
    if isinstance(loss, (losses.LengthDesensitised, losses.WPOWeighted)):
        return _own_beta(loss.loss)
    return getattr(loss, "beta", None)


def check_given(loss: PreferenceLoss, args: Any) -> None:
    """
    Raises:
        ValueError: the config sets something that has no effect beside a loss that is given.
    """
    beta, kind = _own_beta(loss), type(loss).__name__
    for setting in fields(args):
        value = getattr(args, setting.name)
        default = default_of(setting)
        if value in (default, [default]):
            continue
        if setting.name in _REPLACED:
            raise ValueError(
                f"{setting.name} is {value!r} beside loss={kind}(...), expected {default!r}: the config's settings are "
                "for its own loss_type, and those of a loss that is given are the loss's own options"
            )
        if setting.name == "beta" and beta not in (None, value):
            raise ValueError(
                f"beta is {value!r} beside loss={kind}(...), expected its own, {beta!r}"
            )
        if setting.name == "ld_alpha" and loss.traits.ld_alpha is not None:
            raise ValueError(
                f"ld_alpha is {value!r} beside loss={kind}(...), expected None: that loss has its own"
            )


def _configured(trainer: Any) -> PreferenceLoss:
    divergence = str(trainer.f_divergence_type)
    checks.choice("f_divergence_type", divergence, tuple(_DIVERGENCES))
    plain = divergence == "reverse_kl"
    lam = getattr(trainer.args, "dpop_lambda", DEFAULT)
    if lam != DEFAULT and "dpop" not in trainer.loss_types:
        raise ValueError(
            f"dpop_lambda is {lam!r} beside loss_type {trainer.loss_types}, which does not read it, expected "
            f"loss_type 'dpop', or the default, {DEFAULT:g}"
        )
    alpha = trainer.f_alpha_divergence_coef if divergence == "alpha_divergence" else None
    options = {
        "beta": trainer.beta,
        "lam": lam,
        "label_smoothing": trainer.label_smoothing,
        "tau": trainer.args.discopop_tau,
        "divergence": _DIVERGENCES[divergence],
        "alpha": alpha,
    }
    terms = []
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        _check_type(name)
        if not plain and name != "sft" and "divergence" not in _TAKES[name]:
            raise ValueError(
                f"f_divergence_type is {divergence!r}, expected 'reverse_kl' with loss_type {name!r}: "
                "it is no function of the difference of two scores"
            )
        terms.append(weight * losses.get(name, **{o: options[o] for o in _TAKES[name]}))
    return functools.reduce(lambda total, term: total + term, terms)


def _check_type(name: str) -> None:
    """
    Raises:
        ValueError: the config has no loss of that name.
    """
    ours = name in losses.available() and losses.get(name) != losses.get("sigmoid")
    if ours and name not in _TAKES:
        raise ValueError(
            f"loss_type is {name!r}, whose options the config does not have, expected one of {tuple(_TAKES)}, or "
            f"FastDPOTrainer(..., loss=fastdpop.losses.get({name!r}))"
        )
    checks.choice("loss_type", name, tuple(_TAKES))
