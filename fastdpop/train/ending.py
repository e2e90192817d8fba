"""The last lines of a run: how it went, what became of chosen completions, where the model is, and what comes next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from fastdpop.train.options import TOO_LONG
from fastdpop.train.parse import Asked
from fastdpop.train.report import Moved, evaluations, held_out_table, moved


def summary(
    asked: Asked, trainer: Any, result: Any, trained: Mapping[str, float], first: int
) -> str:
    """As text.

    Args:
        result: what training returned.
        trained: metrics of the last step's pairs, after it; empty where there are held-out pairs or was no step.
        first: the step from which on evaluations are of this run's held-out pairs.
    """
    state, seconds = trainer.state, result.metrics["train_runtime"]
    own = state.global_step - trainer.begun
    begun = f" ({trainer.begun} were done before)" if trainer.begun else ""
    lines = [
        f"\n{_counted(own, 'step')} in {_duration(seconds)}{begun}, {trainer.pairs / seconds:.3g} pairs per second"
    ]
    if not own:
        lines = [f"\n{_none_left(trainer.begun)}"]
    rows = [row for row in evaluations(state.log_history) if row["step"] >= first]
    if rows:
        # The last evaluation is of the weights that are saved.
        last = state.best_global_step if _is_best(trainer) else rows[-1]["step"]
        lines.append(
            held_out_table(
                {f"after {_counted(rows[0]['step'], 'step')}": rows[0]}
                | {f"after {_counted(last, 'step')}": rows[-1]}
            )
        )
    lines += _verdict(rows, trained, warming=asked.config.warmup_steps >= state.max_steps)
    folder = str(trainer.args.output_dir)
    lines.append(f"Saved to {folder}{_best(trainer)}")
    return "\n".join([*lines, *_what_next(asked, folder)])


def nothing_left(asked: Asked, steps: int) -> str:
    """What is said of a run that had ended, with its model in its folder, instead of :func:`summary`."""
    folder = str(asked.config.output_dir)
    lines = [f"\n{_none_left(steps)}, and {folder} is as it was", *_what_next(asked, folder)]
    return "\n".join(lines)


def _none_left(steps: int) -> str:
    done = "the step of this run had" if steps == 1 else f"all {steps} steps had"
    return f"Nothing was left to train: {done} been done"


def _what_next(asked: Asked, folder: str) -> list[str]:
    lines = [f"  to load: AutoModelForCausalLM.from_pretrained({folder!r})"]
    following = _analyze(asked, folder)
    if following is not None:
        lines.append(f"  to see token by token what changed: {following}")
    return lines


def _verdict(rows: list[dict[str, Any]], trained: Mapping[str, float], warming: bool) -> list[str]:
    """Whether chosen completions are more likely than under the reference: held-out ones, or else trained ones.

    Args:
        warming: the learning rate's warm-up had not ended.
    """
    if rows:
        which, name = "Held-out chosen completions", "eval_logratios/chosen"
        ratio, error = rows[-1][name], rows[-1][f"{name}_standard_error"]
    elif trained:
        which, name = "Chosen completions of the last step", "logratios/chosen, after that step,"
        ratio, error = trained["logratios/chosen"], 0.0  # of these very pairs
    else:
        return []
    change = moved(ratio, error)
    if change is Moved.NOT:
        lower = "lower --warmup, in which the learning rate still was" if warming else ""
        advice = lower or "train for more --epochs, or raise --learning-rate"
        return [
            f"{which} are as likely as under the reference ({name} {ratio:+.2f} nats): the model has hardly moved. "
            f"{advice[0].upper()}{advice[1:]}."
        ]
    if change is Moved.UNCLEAR:
        return [
            f"{which} became neither more nor less likely than chance explains ({name} {ratio:+.2f} nats, standard "
            f"error {error:.2f})."
        ]
    if change is Moved.UP:
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


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (value, _) in enumerate(parts) if value), 2)
    return " ".join(f"{value} {unit}" for value, unit in parts[first:])
