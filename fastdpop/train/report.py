"""What a user sees of a run: its progress, its metrics, and how it ended."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

METRICS = "metrics.jsonl"
_SHOWN = 0.005
"""Nats; less is written as 0.00."""


class Progress(ProgressCallback):
    """A progress bar that shows the latest loss and log-ratios in place, not below one another."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._title)
            self.training_bar.unit = "step"

    def close(self) -> None:
        """End the line of a bar that is still there."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            shown = [f"loss {logs['loss']:.3g}"]
            if "logratios/chosen" in logs:
                shown.append(
                    f"log-ratio chosen {logs['logratios/chosen']:+.1f} "
                    f"rejected {logs['logratios/rejected']:+.1f}"
                )
            self.training_bar.set_postfix_str(", ".join(shown))


class MetricsFile(TrainerCallback):
    """Everything that is logged, a JSON object per line, in ``metrics.jsonl`` of the output folder.

    A run that goes on from a checkpoint begins the file with what had been logged up to there.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            _write(args.output_dir, "w", state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            _write(args.output_dir, "a", state.log_history[-1:])


def _write(output: str, mode: str, rows: Sequence[dict[str, Any]]) -> None:
    with open(Path(output) / METRICS, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def evaluations(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations among what a trainer has logged, one per step."""
    return by_step(history, "eval_logratios/chosen")


def by_step(history: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The lines that have a metric, the last one of each step."""
    found = {row["step"]: row for row in history if name in row}
    return [found[step] for step in sorted(found)]


class Moved(enum.Enum):
    """How log-probs compare with the reference's: hardly another, or another by no more than chance explains, or more
    or less likely.
    """

    NOT, UNCLEAR, UP, DOWN = range(4)


def moved(logratio: float, error: float) -> Moved:
    """What a mean log-ratio says, in nats, with its standard error."""
    if abs(logratio) < _SHOWN:
        return Moved.NOT
    if abs(logratio) <= 2 * error:
        return Moved.UNCLEAR
    return Moved.UP if logratio > 0 else Moved.DOWN


def held_out_table(rows: dict[str, dict[str, Any]], seconds: dict[str, float] | None = None) -> str:
    """Evaluations as text, one per line, by name.

    Args:
        rows: from a name to what an evaluation has logged.
        seconds: for a last column.
    """
    width = max(20, *(len(name) + 2 for name in rows))
    head = f"{'held-out log-ratio':<{width}}{'chosen':>10}{'rejected':>12}{'difference':>12}"
    lines = [f"{head}{'told apart':>12}" + (f"{'time':>8}" if seconds else "")]
    for name, row in rows.items():
        chosen, rejected = row["eval_logratios/chosen"], row["eval_logratios/rejected"]
        line = (
            f"{name:<{width}}{chosen:>+10.2f}{rejected:>+12.2f}{chosen - rejected:>+12.2f}"
            f"{row['eval_rewards/accuracies']:>12.0%}"
        )
        lines.append(line + (f"{seconds[name]:>7.0f}s" if seconds else ""))
    return "\n".join(lines)
