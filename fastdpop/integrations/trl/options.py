"""Mistakes in TRL's options that transformers finds after minutes of training, or never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdpop.names import hint

EVALUATED = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logratios/chosen", "logratios/rejected", "logps/chosen", "logps/rejected"),
    *("logratios/chosen_standard_error", "logratios/rejected_standard_error"),
    *("penalty", "hinge_on", "logps/first_difference", "logps/after_difference"),
    *("ches", "ches_normalised", "entropy", "logits/chosen", "logits/rejected"),
    *("mean_token_accuracy", "num_tokens", "runtime", "samples_per_second", "steps_per_second"),
)
"""What an evaluation of a ``DPOTrainer`` on fastdpop logs, without the prefix ``eval_``."""
_OF_ROUTERS = "aux_loss"
_BETTER_BELOW = ("loss", _OF_ROUTERS, "penalty", "hinge_on")


def check_best_metric(args: Any) -> None:
    """Check by what the best checkpoint is chosen, of a trainer that logs no metrics of its own.

    Args:
        args: a ``DPOConfig``.

    Raises:
        ValueError: no evaluation logs `metric_for_best_model`, or the greatest value of it is the worst.
    """
    given = args.metric_for_best_model
    if given is None:
        return
    name = given.removeprefix("eval_")
    known = (*EVALUATED, _OF_ROUTERS)
    if name not in known:
        raise ValueError(
            f"--metric_for_best_model is {given!r}{hint(name, known)}, expected what an evaluation logs: "
            + ", ".join(EVALUATED)
        )
    # transformers' own default is True for every name that does not end with "loss".
    if name in _BETTER_BELOW and args.greater_is_better:
        raise ValueError(
            f"--metric_for_best_model {given} would choose the checkpoint with the greatest {name}, which is the "
            "worst: give --greater_is_better false"
        )


def check_revision(model: str | None, revision: str | None) -> None:
    """Check a model's revision.

    Raises:
        ValueError: it is of a folder, which has none.
    """
    if revision not in (None, "main") and model is not None and Path(model).expanduser().is_dir():
        raise ValueError(
            f"--model_revision {revision} has no effect: {model} is a folder, which is taken as it is; revisions are "
            "those of a model of the Hub"
        )
