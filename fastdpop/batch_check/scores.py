"""What the model makes of a batch, without a trace: log-probs of tokens, and what its head gets."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.batch_check.view import BatchView
from fastdpop.hf import attach, detach, is_attached
from fastdpop.hf.attachment import causal_lm
from fastdpop.hf.forward import attachment_of
from fastdpop.hf.guards import guarded
from fastdpop.hf.self_check import undisturbed
from fastdpop.hf.sharded import spread
from fastdpop.hf.wrappers import innermost
from fastdpop.rows import IGNORE


def why_not(model: Any) -> str | None:
    """Why a model does not run here, in words; None if it does.

    Raises:
        TypeError: it is no causal language model.
    """
    model = innermost(model)
    target = causal_lm(model)
    if spread(model) or any(p.is_meta for p in model.parameters()):
        return "its parameters are spread over processes, or not there yet"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its adapter puts tokens of its own before those of the batch"
    found = attachment_of(target)
    groups = (
        () if found is None else [found.settings[f"{name}group"] for name in ("", "cp_", "tp_")]
    )
    if any(group is not None for group in groups):
        return "it is attached with a group, whose other processes would have to run it too"
    return None


@dataclass
class Runner:
    """A model that is ready to score, and how its modules were before.

    Attributes:
        training: its modules that are in training mode at other times.
    """

    model: Any
    training: list[nn.Module]

    def logps(self, view: BatchView, dropping: bool = False) -> Tensor:
        """``(S, T)`` float64: the log-prob of each token given those before it; 0 for a first one and for padding.

        Args:
            dropping: with the dropout of training mode.
        """
        labels = view.ids.masked_fill(~view.attended, IGNORE)
        labels[:, 0] = IGNORE
        options = {"reduction": "token", "dtype": torch.float64, "share_prefixes": False}
        if self._device.type == "mps":
            options["dtype"] = torch.float32
        for module in self.training:
            module.training = dropping
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of checkpointing without gradients
                out = self.model(
                    **self.call(view),
                    labels=labels.to(self._device),
                    return_logps=True,
                    preference_options=options,
                )
        finally:
            for module in self.training:
                module.training = False
        return torch.nan_to_num(out.logps.cpu().double(), nan=-math.inf)

    def call(self, view: BatchView) -> dict[str, Any]:
        """The keywords of the model's forward, without labels."""
        call = dict(view.extra)
        call["input_ids"] = view.ids
        if view.masked:
            call["attention_mask"] = view.attended.long()
        if "use_cache" in inspect.signature(causal_lm(self.model).forward).parameters:
            call["use_cache"] = False
        return {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in call.items()
        }

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


@contextmanager
def running(model: Any) -> Iterator[Runner]:
    """The model inside all wrappers, attached, without dropout and gradients; afterwards it is as it was.

    Raises:
        TypeError, RuntimeError: as :func:`fastdpop.attach`.
    """
    model = innermost(model)
    training = [module for module in model.modules() if module.training]
    # A trainer's wrapper may hide that it is attached: what is asked for is answered all the same, or refused.
    ours = not is_attached(model) and not guarded(causal_lm(model))
    if ours:
        attach(model, check=False)
    try:
        with undisturbed(model, next(model.parameters()).device), torch.no_grad():
            yield Runner(model, training)
    finally:
        if ours:
            detach(model)
