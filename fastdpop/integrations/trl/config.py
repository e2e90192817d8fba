"""TRL's ``DPOConfig`` with DPOP's lambda, and with prefixes that are computed once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.trainer.dpo_config import DPOConfig

from fastdpop import checks
from fastdpop.integrations import dpop_lambda as lambdas

ADDED = ("dpop_lambda", "share_prefixes", "global_batch")
"""The fields that :class:`FastDPOConfig` has beyond ``DPOConfig``'s."""


@dataclass
class FastDPOConfig(DPOConfig):
    """TRL's ``DPOConfig`` with DPOP's lambda, and with prefixes that are computed once.

    Attributes:
        dpop_lambda: weight of the penalty in ``loss_type="dpop"``, 0 or above; its beta is ``beta``.
        share_prefixes: compute what sequences of a batch begin with in common once, and no padding, as in
            :func:`fastdpop.attach`; pairs of one prompt are trained on side by side. None: if ``padding_free`` is set,
            or :func:`fastdpop.patch_trl` was told so.
        global_batch: of several processes, take the loss of all their pairs, as one process with all of them would:
            losses that compare pairs (``aot``, ``bco_pair``) or count tokens (``sft``) see the whole batch, and pairs
            that are repeated to fill a last batch do not count. False: each process takes the loss of its own, and the
            gradients are averaged, as in TRL. None: False, unless :func:`fastdpop.patch_trl` was told otherwise.

    Raises:
        ValueError, TypeError: `dpop_lambda` is not a finite number, 0 or above; `share_prefixes` or `global_batch` is
            none of its values, or the former False beside ``padding_free=True``.
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
