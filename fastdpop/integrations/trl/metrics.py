"""What a ``DPOTrainer`` logs: measured in every step, read from the device only when the trainer logs.

TRL averages the averages of batches. Here averages are over pairs, or over tokens where TRL weighs by tokens, of
everything since the trainer last logged; with batches of one size they are TRL's. Pairs that accelerate repeats, so
that every process has a batch at the end, count once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdpop.integrations.displacement import Watch
from fastdpop.integrations.trl import batch
from fastdpop.integrations.trl.config import warns_displacement
from fastdpop.integrations.trl.loss import preference
from fastdpop.measures import Measure, measures

_logger = logging.getLogger(__name__)

_WITH_ERROR = ("logratios/chosen", "logratios/rejected")
"""Metrics whose standard error over pairs is logged after an evaluation."""
_OF_SOME = ("logps/first_difference", "logps/after_difference")
"""Metrics that are means over pairs that have such a token in their chosen completion; there may be none."""


@dataclass
class Pending:
    """What the steps of a trainer measured since it last logged, on their device and without a graph.

    Attributes:
        names: of the metrics, by mode.
        steps: by mode, for each step ``(processes, 3, metrics)``: each process's sum, what it is to be divided by, and
            the sum of squares around its own mean.
        tokens: how many tokens were trained on, 0-d int64; None for none.
        watch: looks at what training steps measured.
    """

    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    steps: dict[str, list[Tensor]] = field(default_factory=lambda: {"train": [], "eval": []})
    tokens: Tensor | None = None
    watch: Watch = field(default_factory=Watch)


def pending(trainer: Any) -> Pending:
    """A trainer's own."""
    found: Pending = vars(trainer).setdefault("_fastdpop_pending", Pending())
    return found


def note(
    trainer: Any, inputs: Mapping[str, Any], outputs: Any, ref_logps: Tensor, beta: float
) -> None:
    """Keep what a step measured, for :func:`fill`. One exchange between processes, which no process waits for.

    Args:
        inputs: the process's batch, repeated pairs too.
        outputs: the policy's, with the loss of every pair that was computed.
        ref_logps: the reference's log-probs ``(2B,)``, chosen before rejected, in nats.
        beta: the factor of rewards.
    """
    mode = "train" if trainer.model.training else "eval"
    pairs = batch.count(inputs)
    own = batch.counted(trainer, pairs)
    found = measures(outputs) | _against(outputs, ref_logps, beta)
    ones = torch.ones_like(outputs.losses)
    if getattr(trainer, "aux_loss_enabled", False):
        found["aux_loss"] = Measure(outputs.aux_loss.expand_as(ones), ones)
    if mode == "eval":
        # Of what is no pair's own, a router's loss, each pair has the mean.
        losses = outputs.losses + (outputs.loss - outputs.losses.mean())
        found["loss"] = Measure(losses, ones)
    columns = [torch.stack(measure.sums(own)) for measure in found.values()]
    # Of every process with these pairs: `fill` divides.
    seen = inputs["attention_mask"].view(2, pairs, -1)[:, : batch.kept(trainer, pairs)]
    tokens_seen = seen.sum().to(columns[0])
    nothing = torch.zeros_like(tokens_seen)
    columns.append(torch.stack([tokens_seen, nothing, nothing]))
    step = trainer.accelerator.gather(torch.stack(columns, dim=1)[None])
    kept = pending(trainer)
    kept.names[mode] = tuple(found)
    kept.steps[mode].append(step[..., :-1])
    if mode == "train":
        tokens = step[:, 0, -1].sum().long()
        kept.tokens = tokens if kept.tokens is None else kept.tokens + tokens


def _against(outputs: Any, ref_logps: Tensor, beta: float) -> dict[str, Measure]:
    """Log-ratios, and rewards with this beta, whichever the loss is; a trainer's pairs have both sides."""
    logps = torch.stack([outputs.chosen_logps, outputs.rejected_logps])
    logratios = logps - ref_logps.to(logps).view(2, -1)
    chosen, rejected = rewards = beta * logratios
    found = {"accuracies": chosen > rejected, "margins": chosen - rejected}
    named = {f"rewards/{name}": values for name, values in found.items()}
    for group, sides in (("rewards", rewards), ("logratios", logratios)):
        named |= {
            f"{group}/{side}": v for side, v in zip(("chosen", "rejected"), sides, strict=True)
        }
    if outputs.penalty is None:  # of a loss that reads no reference
        penalty = (0.0 - logratios[0]).relu()
        named |= {"penalty": penalty, "hinge_on": penalty > 0}
    return {name: Measure(values, torch.ones_like(values)) for name, values in named.items()}


def fill(trainer: Any, mode: str) -> None:
    """Turn what the steps measured into numbers where TRL's ``log`` takes them from, ``trainer._metrics[mode]``."""
    kept, metrics = pending(trainer), trainer._metrics[mode]
    if not kept.steps[mode]:
        return
    by_step = torch.stack(kept.steps[mode]).cpu().double()
    kept.steps[mode].clear()
    if mode == "train":
        _warn(trainer, kept, by_step)
    values = by_step.flatten(0, 1)
    sums, counts, squares = values.unbind(1)
    means = sums.sum(0) / counts.sum(0).clamp_min(1)
    between = counts * (sums / counts.clamp_min(1) - means).square()
    # Of the mean, from the sample's own variance; 0 for a single pair, which has none.
    n = counts.sum(0)
    errors = ((squares + between).sum(0) / ((n - 1).clamp_min(1) * n.clamp_min(1))).sqrt()
    rows = zip(kept.names[mode], means.tolist(), errors.tolist(), n.tolist(), strict=True)
    for name, mean, error, count in rows:
        if count == 0 and name in _OF_SOME:
            continue
        metrics[name].append(mean)
        if mode == "eval" and name in _WITH_ERROR:
            metrics[f"{name}_standard_error"].append(error)
    if kept.tokens is not None:
        trainer._total_train_tokens += int(kept.tokens) // getattr(trainer, "_tp_size", 1)
        kept.tokens = None
    metrics["num_tokens"] = [trainer._total_train_tokens]


def _warn(trainer: Any, kept: Pending, by_step: Tensor) -> None:
    """Let the watch look at steps ``(steps, processes, 3, metrics)``; what it finds is said by the main process."""
    if not (warns_displacement(trainer.args) and preference(trainer).traits.needs_reference):
        return
    names = kept.names["train"]
    logratios, accuracies = (names.index(n) for n in ("logratios/chosen", "rewards/accuracies"))
    for step in by_step:
        sums, counts, squares = step[:, :, logratios].unbind(1)
        pairs, mean = counts.sum(), sums.sum() / counts.sum().clamp_min(1)
        around = squares.sum() + (counts * (sums / counts.clamp_min(1) - mean).square()).sum()
        accurate = step[:, 0, accuracies].sum()
        found = kept.watch.add(int(pairs), mean.item(), around.item(), accurate.item())
        if found is not None and trainer.accelerator.is_main_process:
            with tqdm.external_write_mode(file=sys.stderr):  # not inside the line of a bar
                _logger.warning(found.message(trainer.state.global_step))


def evaluated(trainer: Any, loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``Trainer.evaluation_loop``, from nothing pending to metrics that are ready to be logged, its loss over pairs."""
    trainer._metrics[
        "eval"
    ].clear()  # of a prediction, which logs none, or of an evaluation that failed
    pending(trainer).steps["eval"].clear()
    output = loop(*args, **kwargs)
    fill(trainer, "eval")
    losses = trainer._metrics["eval"].pop("loss", [])
    if losses and trainer.accelerator.num_processes > 1:
        # Trainer's counts the pairs that are repeated at the end.
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        output.metrics[f"{prefix}_loss"] = losses[0]
    return output
