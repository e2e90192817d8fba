"""A look at the first batch that a trainer trains on (:mod:`fastdpop.batch_check`), at log-probs that its step computed
anyway: nothing runs a second time, no random number is drawn, and no process waits for another.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdpop.batch_check.check import check_computed
from fastdpop.hf.wrappers import innermost

VARIABLE = "FASTDPOP_CHECK_BATCH"
"""The environment variable that turns the look off by 0."""


def wanted() -> bool:
    """Whether trainers look.

    Raises:
        ValueError: the environment variable ``FASTDPOP_CHECK_BATCH`` is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable {VARIABLE} is {value!r}, expected 0 or 1")
    return value == "1"


def look(
    trainer: Any, call: Mapping[str, Any], labels: Tensor, logps: Tensor, ref_logps: Tensor | None
) -> None:
    """Warn of what looks wrong, once a trainer, in its main process.

    Args:
        call: the arguments of the model, with `labels` beside them.
        logps, ref_logps: ``(2B,)`` of policy and reference; None: there is none.

    Raises:
        ValueError: as :func:`wanted`.
    """
    if not trainer.model.training or vars(trainer).get("_batch_seen"):
        return
    trainer._batch_seen = True
    if not wanted() or not trainer.accelerator.is_main_process:
        return
    at_start = trainer.state.global_step == 0 and getattr(trainer.args, "disable_dropout", False)
    findings = check_computed(
        innermost(trainer.model),
        {**call, "labels": labels},
        logps,
        ref_logps,
        trainer.processing_class,
        at_start,
        copies=trainer.is_deepspeed_enabled,
    )
    for finding in findings:
        if finding.code not in getattr(trainer, "said_of_data", ()):
            warnings.warn(
                f"fastdpop: the first batch looks wrong ({finding.code}): {finding.message}. {finding.advice}. "
                f"docs/check.md explains it; {VARIABLE}=0 turns this look off",
                stacklevel=3,
            )
