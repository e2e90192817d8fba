"""The last lines of a run: how it went, what became of chosen completions, where the model is, and what comes next."""

from __future__ import annotations

import shlex
from typing import Any

from fastdpop.train.options import TOO_LONG
from fastdpop.train.parse import Asked
from fastdpop.train.report import evaluations, held_out_table

_SHOWN = 0.005
"""Nats; less is written as 0.00."""


def summary(asked: Asked, trainer: Any, result: Any, first: int) -> str:
    """As text.

    Args:
        result: what training returned.
        first: the step from which on evaluations are of this run's held-out pairs.
    """
    state, metrics = trainer.state, result.metrics
    # Trainer divides the pairs of all steps by the time since this run began, maybe at a checkpoint.
    own = state.global_step - trainer.begun
    rate = metrics["train_samples_per_second"] * own / max(state.global_step, 1)
    begun = f" ({trainer.begun} were done before)" if trainer.begun else ""
    lines = [
        f"\n{own} steps in {_duration(metrics['train_runtime'])}{begun}, {rate:.3g} pairs per second"
    ]
    if not own:
        lines = [f"\nNothing was left to train: all {trainer.begun} steps had been done"]
    rows = [row for row in evaluations(state.log_history) if row["step"] >= first]
    if rows:
        # The last evaluation is of the weights that are saved.
        last = state.best_global_step if _is_best(trainer) else rows[-1]["step"]
        lines.append(
            held_out_table(
                {f"after {rows[0]['step']} steps": rows[0]} | {f"after {last} steps": rows[-1]}
            )
        )
    lines += _verdict(rows, state.log_history)
    folder = str(trainer.args.output_dir)
    lines.append(f"Saved to {folder}{_best(trainer)}")
    lines.append(f"  to load: AutoModelForCausalLM.from_pretrained({folder!r})")
    following = _analyze(asked, folder)
    if following is not None:
        lines.append(f"  to see token by token what changed: {following}")
    return "\n".join(lines)


def _verdict(rows: list[dict[str, Any]], history: list[dict[str, Any]]) -> list[str]:
    """Whether chosen completions are more likely than under the reference: held-out ones, or else trained ones."""
    trained = [row for row in history if "logratios/chosen" in row]
    if rows:
        which, ratio = "Held-out chosen completions", rows[-1]["eval_logratios/chosen"]
        error = rows[-1]["eval_logratios/chosen_standard_error"]
    elif trained:
        which, ratio, error = "Chosen completions", trained[-1]["logratios/chosen"], 0.0
    else:
        return []
    name = (
        "eval_logratios/chosen" if rows else "logratios/chosen, of the last steps that were logged"
    )
    if abs(ratio) < _SHOWN:
        return [
            f"{which} are as likely as under the reference ({name} {ratio:+.2f} nats): the model has hardly moved. "
            "Train for more --epochs, or raise --learning-rate."
        ]
    if abs(ratio) <= 2 * error:  # a mean that chance explains
        return [f"{which} are about as likely as under the reference ({name} {ratio:+.2f} nats)."]
    if ratio > 0:
        return [f"{which} became more likely ({name} {ratio:+.2f} nats)."]
    return [
        f"{which} became LESS likely ({name} {ratio:+.2f} nats): the model unlearns what it should prefer. "
        "Raise --dpop-lambda (with --loss-type dpop), or lower --learning-rate."
    ]


def _is_best(trainer: Any) -> bool:
    return bool(trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint)


def _best(trainer: Any) -> str:
    """Of which step the weights are, where the best were asked for."""
    if not trainer.args.load_best_model_at_end:
        return ""
    state, name = trainer.state, trainer.args.metric_for_best_model
    if not _is_best(trainer):
        return ", as after the last step: no evaluation stood beside a checkpoint"
    return f", as after step {state.best_global_step}, the best by {name} ({state.best_metric:.4g})"


def _analyze(asked: Asked, folder: str) -> str | None:
    """The command that says more; None where it does not take what this run was given."""
    own = asked.own
    pairs = own.eval_pairs or own.pairs
    if pairs is None or asked.model.model_revision not in (None, "main"):
        return None
    words = [
        "--model",
        folder,
        "--reference",
        str(asked.model.model_name_or_path),
        "--pairs",
        pairs,
    ]
    if own.chat:
        words.append("--chat")
    if own.columns:
        words += ["--columns", *own.columns]
    for option, value in (
        ("--tokenizer", own.tokenizer),
        ("--chat-template-path", own.chat_template_path),
        ("--max-length", asked.config.max_length),
        ("--too-long", own.too_long if own.too_long != TOO_LONG[0] else None),
    ):
        if value is not None:
            words += [option, str(value)]
    return shlex.join(["fastdpop", "analyze", *words])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (value, _) in enumerate(parts) if value), 2)
    return " ".join(f"{value} {unit}" for value, unit in parts[first:])
