"""One line that tells a user whether fastdpop is at work: of the patch, and of every trainer that it serves."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import trl

from fastdpop import engines, losses
from fastdpop.hf.wrappers import innermost
from fastdpop.integrations.trl import cpo
from fastdpop.integrations.trl.loss import preference
from fastdpop.integrations.trl.models import on_fastdpop

_logger = logging.getLogger("fastdpop")


def of_patch(kinds: list[type]) -> None:
    """Say which classes are patched, in the first process."""
    if os.environ.get("RANK", "0") == "0":  # accelerate has not begun
        names = " and ".join(kind.__name__ for kind in kinds)
        _say(f"fastdpop: TRL {trl.__version__} is patched; each new {names} says what it computes")


def of_trainer(trainer: Any) -> None:
    """Say what a trainer computes, and how, in the main process."""
    if not trainer.accelerator.is_main_process:
        return
    name = type(trainer).__name__
    if not on_fastdpop(trainer):
        _say(f"fastdpop: this {name} is left to TRL")
        return
    what = _what(trainer)
    settings = trainer._fastdpop
    weight = innermost(trainer.model).get_output_embeddings().weight
    engine = settings.engine
    if engine == "auto":
        engine = engines.available(trainer.accelerator.device, weight.dtype)[0]
    shares = "shared prefixes computed once" if settings.share_prefixes else "prefixes not shared"
    _say(f"fastdpop: this {name} computes {what}, engine {engine}, {shares}")


def _what(trainer: Any) -> str:
    if hasattr(trainer, "_compute_loss"):
        loss = preference(trainer)
    elif hasattr(trainer, "get_batch_loss_metrics"):
        loss = cpo.preference(trainer)
    else:  # online, whose loss is TRL's
        return "log-probs"
    if not isinstance(loss, losses.WeightedSum):
        return repr(loss)
    terms = [(weight, each) for weight, each in loss.terms if weight]
    return " + ".join(repr(of) if weight == 1 else f"{weight:g} * {of!r}" for weight, of in terms)


def _say(text: str) -> None:
    """At level INFO of the logger "fastdpop"; where nobody has set up logging, on stderr, like Python's warnings."""
    if _logger.hasHandlers() or _logger.level > logging.INFO:
        _logger.info(text)
    else:
        print(text, file=sys.stderr)
