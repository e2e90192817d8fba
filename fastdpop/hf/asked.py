"""What a caller asks an attached model for, beside what the model itself takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpop import checks, losses
from fastdpop.api import fused_logps, fused_preference_loss
from fastdpop.call import Loss, RefLogps
from fastdpop.names import hint

SET_HERE = {"loss", "ref_logps", "bias", "softcap", "logit_scale", "engine", "workspace_bytes"}
SET_HERE |= {
    "hidden_index",
    "state_columns",
    "cp_group",
    "tp_group",
    "grad_reduction",
    "sequence_parallel",
}
"""Arguments of the fused functions that are no options of a call."""


def _options_of(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - SET_HERE
    return frozenset(names | {"share_prefixes"})


OPTIONS = _options_of(fused_preference_loss)
"""What ``preference_options`` may contain; with ``return_logps``:"""
_OPTIONS_OF_LOGPS = _options_of(fused_logps)


@dataclass
class Asked:
    """The arguments of a call that are fastdpop's."""

    preference: Loss | None
    ref_logps: RefLogps | None
    return_logps: bool
    options: Mapping[str, Any] | None
    router_loss_weight: float | None
    prefix_tree: Mapping[str, Tensor] | None

    def check(self) -> None:
        """
        Raises:
            ValueError: arguments are given that do not go together.
        """
        if self.preference is None and self.router_loss_weight is not None:
            raise ValueError(
                "router_loss_weight is given without preference, expected preference= too"
            )
        if self.return_logps:
            for name in ("preference", "ref_logps"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is given with return_logps=True, expected one of the two"
                    )
        elif self.preference is None:
            if self.ref_logps is not None:
                raise ValueError("ref_logps is given without preference, expected preference= too")
            for name, given in (
                ("preference_options", self.options),
                ("prefix_tree", self.prefix_tree),
            ):
                if given is not None:
                    raise ValueError(
                        f"{name} is given without preference, expected preference= too"
                    )

    def take_shifted(self, kwargs: dict[str, Any]) -> None:
        """Labels that were shifted before a sequence was split come as `shift_labels`, which models' own losses take
        in the place of `labels`, too.

        Raises:
            ValueError: they are no labels, or the options say that they are to be shifted.
        """
        shifted = kwargs.pop("shift_labels", None)
        if shifted is None:
            return
        if not isinstance(shifted, Tensor):
            raise ValueError(
                f"shift_labels is {shifted!r}, expected labels that were shifted already; whether labels are to be "
                "shifted stands in preference_options"
            )
        if (self.options or {}).get("shift_labels"):
            raise ValueError(
                "preference_options contains shift_labels=True, expected False beside shift_labels="
            )
        kwargs["labels"] = shifted
        self.options = {**(self.options or {}), "shift_labels": False}

    @torch.compiler.disable
    def check_options(self) -> None:
        """
        Raises:
            TypeError, ValueError: the preference is no loss, or the options are no dict of further arguments of the
                fused function.
        """
        if self.preference is not None:
            losses.as_loss(self.preference, "preference")
        if self.options is None:
            return
        if not isinstance(self.options, Mapping):
            raise TypeError(
                f"preference_options is a {type(self.options).__name__}, expected a dict"
            )
        checks.flag("share_prefixes", self.options.get("share_prefixes", False))
        names = _OPTIONS_OF_LOGPS if self.preference is None else OPTIONS
        for name in self.options:
            if name not in names:
                raise ValueError(
                    f"preference_options contains {name!r}{hint(name, names)}, expected names among {sorted(names)}; "
                    "a loss's own options go to losses.get, engine, workspace_bytes and groups to attach"
                )
