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
from fastdpop.rows import wide_dtype

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
    dtype = wide_dtype(ref_logps.device)
    by_pair, weighted = _by_pair(outputs, ref_logps, beta), _weighted(outputs, own, dtype)
    if getattr(trainer, "aux_loss_enabled", False):
        by_pair["aux_loss"] = outputs.aux_loss.expand_as(outputs.losses)
    if mode == "eval":
        # Of what is no pair's own, a router's loss, each pair has the mean.
        by_pair["loss"] = outputs.losses + (outputs.loss - outputs.losses.mean())
    values = torch.stack(list(by_pair.values())).detach()[:, :own].to(dtype)
    sums = values.sum(1)
    squares = (values - sums[:, None] / max(own, 1)).square().sum(1)
    # Of every process with these pairs: `fill` divides.
    seen = inputs["attention_mask"].view(2, pairs, -1)[:, : batch.kept(trainer, pairs)]
    seen = seen.sum().to(dtype)
    nothing = torch.zeros_like(seen)
    columns = [
        torch.stack([sums, torch.full_like(sums, own), squares]),
        *(torch.stack([*pair, nothing])[:, None] for pair in weighted.values()),
        torch.stack([seen, nothing, nothing])[:, None],
    ]
    step = trainer.accelerator.gather(torch.cat(columns, dim=1)[None])
    kept = pending(trainer)
    kept.names[mode] = (*by_pair, *weighted)
    kept.steps[mode].append(step[..., :-1])
    if mode == "train":
        tokens = step[:, 0, -1].sum().long()
        kept.tokens = tokens if kept.tokens is None else kept.tokens + tokens


def _by_pair(outputs: Any, ref_logps: Tensor, beta: float) -> dict[str, Tensor]:
    """Metrics that are means over pairs, ``(B,)`` each."""
    chosen, rejected = outputs.chosen_logps, outputs.rejected_logps
    ref_chosen, ref_rejected = ref_logps.to(chosen).chunk(2)
    chosen_logratios, rejected_logratios = chosen - ref_chosen, rejected - ref_rejected
    chosen_rewards, rejected_rewards = beta * chosen_logratios, beta * rejected_logratios
    penalty = outputs.penalty  # from unrounded log-probs, of a loss that has them
    penalty = (0.0 - chosen_logratios).relu() if penalty is None else penalty
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logratios/chosen": chosen_logratios,
        "logratios/rejected": rejected_logratios,
        "penalty": penalty,
        "hinge_on": (penalty > 0).to(chosen),
        "ches": outputs.ches.to(chosen),
        "ches_normalised": outputs.ches_normalised.to(chosen),
    }


def _weighted(outputs: Any, own: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics that are means over tokens, or over some of the pairs: each one's sum and number of those, 0-d, of the
    first `own` pairs.
    """

    def by_side(values: Tensor) -> Tensor:
        return values.to(dtype).view(2, -1)[:, :own].sum(1)

    lengths = outputs.lengths.to(dtype)
    tokens = by_side(lengths)
    entropy = by_side(outputs.entropy * lengths)
    logits = by_side(outputs.mean_logits * lengths)
    correct = by_side(outputs.token_accuracy * lengths)
    # 0 where a pair does not differ, or has nothing behind the difference.
    first, after = outputs.first_logps[:own].to(dtype), outputs.after_logps[:own].to(dtype)
    return {
        "entropy": (entropy.sum(), tokens.sum()),
        "logits/chosen": (logits[0], tokens[0]),
        "logits/rejected": (logits[1], tokens[1]),
        "mean_token_accuracy": (correct[0], tokens[0]),
        "logps/first_difference": (first.sum(), outputs.differs[:own].sum().to(dtype)),
        "logps/after_difference": (after.sum(), (after != 0).sum().to(dtype)),
    }


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
