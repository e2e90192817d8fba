"""TRL's ``DPOConfig`` with DPOP's lambda, and with prefixes that are computed once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.dpo_config import DPOConfig

from fastdpop import checks
from fastdpop.integrations import dpop_lambda as lambdas

ADDED = ("dpop_lambda", "share_prefixes", "global_batch", "pair_values", "warn_displacement")
"""The fields that :class:`FastDPOConfig` has beyond ``DPOConfig``'s."""
_OTHERWISE = (
    *("prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids", "tools"),
    *("chat_template_kwargs", "ref_chosen_logps", "ref_rejected_logps", "place"),
)
"""Columns of the data that have a meaning of their own."""


@dataclass
class FastDPOConfig(DPOConfig):
    """TRL's ``DPOConfig`` with DPOP's lambda, and with prefixes that are computed once.

    Attributes:
        dpop_lambda: weight of the penalty in ``loss_type="dpop"``, 0 or above; its beta is ``beta``. A trainer of other
            loss types refuses all but the default.
        share_prefixes: compute what sequences of a batch begin with in common once, and no padding, as in
            :func:`fastdpop.attach`; pairs of one prompt are trained on side by side. None: if ``padding_free`` is set,
            or :func:`fastdpop.patch_trl` was told so.
        global_batch: of several processes, take the loss of all their pairs, as one process with all of them would:
            losses that compare pairs (``aot``, ``bco_pair``) or count tokens (``sft``) see the whole batch, and pairs
            that are repeated to fill a last batch do not count. False: each process takes the loss of its own, and the
            gradients are averaged, as in TRL. None: False, unless :func:`fastdpop.patch_trl` was told otherwise.
        pair_values: columns of the data whose numbers go to the loss with each pair, under their names
            (``["weight", "margin"]``); see :mod:`fastdpop.integrations.trl.values`. None: none.
        warn_displacement: warn once where chosen completions become less likely for good while accuracy rises.

    Raises:
        ValueError, TypeError: `dpop_lambda` is not a finite number, 0 or above; `share_prefixes`, `global_batch`,
            `pair_values` or `warn_displacement` is none of its values, or the first of these False beside
            ``padding_free=True``.
    """

    dpop_lambda: float = field(default=lambdas.DEFAULT, metadata={"help": lambdas.HELP})
    share_prefixes: bool | None = field(
        default=None,
        metadata={
            "help": "Compute what sequences of a batch begin with in common once, and no padding, through the whole "
            "model; pairs of one prompt are trained on side by side. By default if padding_free or patch_trl says so.",
            "nargs": "?",
            "const": True,
        },
    )
    global_batch: bool | None = field(
        default=None,
        metadata={
            "help": "Of several processes, take the loss of all their pairs, as one process with all of them would, "
            "also where it compares pairs or counts tokens. By default each process takes that of its own pairs.",
            "nargs": "?",
            "const": True,
        },
    )
    pair_values: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the data whose numbers go to the loss with each pair: weight, margin, offset, "
            "chosen_score, rejected_score, or what else a loss of yours reads."
        },
    )
    warn_displacement: bool = field(
        default=True,
        metadata={
            "help": "Warn once where chosen completions become less likely for good while accuracy rises."
        },
    )

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()


def check(args: Any) -> None:
    """Check what :class:`FastDPOConfig` adds.

    Raises:
        ValueError, TypeError: as that does.
    """
    lambdas.check(args.dpop_lambda)
    shares_prefixes(args)
    takes_global_batch(args)
    value_names(args)
    warns_displacement(args)


def shares_prefixes(args: Any, otherwise: bool = False) -> bool:
    """Whether a trainer with these arguments, of whatever class they are, shares prefixes.

    Args:
        otherwise: if the arguments say nothing.

    Raises:
        ValueError, TypeError: `share_prefixes` is none of its values, or False beside ``padding_free=True``.
    """
    asked = getattr(args, "share_prefixes", None)
    padding_free: bool = getattr(args, "padding_free", False)
    if asked is None:
        return padding_free or otherwise
    checks.flag("share_prefixes", asked)
    if padding_free and not asked:
        raise ValueError(
            "share_prefixes is False beside padding_free=True, expected True or None: fastdpop leaves the padding out "
            "by the same computation"
        )
    return bool(asked)


def takes_global_batch(args: Any, otherwise: bool = False) -> bool:
    """Whether a trainer with these arguments, of whatever class they are, takes the loss of all processes' pairs.

    Args:
        otherwise: if the arguments say nothing.

    Raises:
        TypeError: `global_batch` is none of its values.
    """
    asked = getattr(args, "global_batch", None)
    if asked is None:
        return otherwise
    checks.flag("global_batch", asked)
    return bool(asked)


def value_names(args: Any) -> tuple[str, ...]:
    """The columns whose numbers go to the loss, of a trainer with these arguments, of whatever class they are.

    Raises:
        ValueError: `pair_values` holds a name twice, or one whose meaning is another, or needs whole lists of pairs.
        TypeError: it is no list of names.
    """
    asked = getattr(args, "pair_values", None)
    if asked is None:
        return ()
    if not isinstance(asked, (list, tuple)) or not all(isinstance(n, str) and n for n in asked):
        raise TypeError(f"pair_values is {asked!r}, expected a list of columns such as ['weight']")
    for name in asked:
        if asked.count(name) > 1:
            raise ValueError(f"pair_values contains {name!r} twice, expected each name once")
        if name in _OTHERWISE:
            raise ValueError(
                f"pair_values contains {name!r}, expected columns of numbers: that one is a text, or token ids"
            )
        if name == "list":
            raise ValueError(
                "pair_values contains 'list', which a trainer cannot give: its batches do not keep the pairs of a "
                "list together. In a loop of your own fused_preference_loss takes them"
            )
    return tuple(asked)


def warns_displacement(args: Any) -> bool:
    """Whether a trainer with these arguments, of whatever class they are, warns where chosen completions fall.

    Raises:
        TypeError: `warn_displacement` is neither True nor False.
    """
    asked = getattr(args, "warn_displacement", True)
    checks.flag("warn_displacement", asked)
    return bool(asked)
