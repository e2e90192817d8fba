"""The options of ``fastdpop train`` that are its own, and its defaults for TRL's.

This module imports nothing, torch neither, so that ``--help`` and ``--version`` cost little.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field, fields
from typing import Any

from fastdpop.choices import LossName, words

TOO_LONG = ("error", "drop")
"""What may become of a pair beyond the greatest length; the first is the default."""

MOST_THREADS = 1024
"""More CPU threads are a mistake."""

SHORT = {
    "model": ("model_name_or_path", "PATH_OR_ID", "a causal language model, or a folder with an adapter"),
    "output": ("output_dir", "DIR", "the run's folder"),
    "batch_pairs": ("per_device_train_batch_size", "N", "pairs in one forward pass of a process"),
    "accumulate": ("gradient_accumulation_steps", "N", "forward passes in one step"),
    "epochs": ("num_train_epochs", "X", "how often every pair is trained on"),
    "steps": ("max_steps", "N", "optimizer steps, instead of --epochs"),
    "warmup": ("warmup_steps", "N", "steps of linear warm-up of the learning rate"),
    "lora": ("use_peft", "", "train a LoRA adapter; that of --model, if it has one"),
    "lora_rank": ("lora_r", "R", "rank of a new adapter"),
    "lora_targets": ("lora_target_modules", "NAMES", "modules of a new adapter, separated by commas"),
    "schedule": (
        "lr_scheduler_type", "{constant,cosine}",
        "of the learning rate after warm-up; cosine ends at zero",
    ),
    "reference": (
        "precompute_ref_log_probs", "{precomputed,online}",
        "score the reference once before training, or in every step",
    ),
    "eval_every": ("eval_steps", "N", "steps between evaluations, 0 for first and last only"),
    "save_every": ("save_steps", "N", "steps between checkpoints, 0 for none"),
}  # fmt: skip
"""Short options: TRL's name, what stands for the value in the help, and the help."""


def under_trl_names(name: str, value: Any) -> dict[str, Any]:
    """A short option and its value, as TRL's options; any other option as it is.

    Raises:
        ValueError: the value is none that the short option takes.
    """
    words: dict[str, dict[str, Any]] = {
        "schedule": {"constant": "constant_with_warmup", "cosine": "cosine"},
        "reference": {"precomputed": True, "online": False},
    }
    trl_name = SHORT[name][0] if name in SHORT else name
    if name in words:
        if not isinstance(value, str) or value not in words[name]:
            raise ValueError(f"--{name} is {value!r}, expected one of {tuple(words[name])}")
        return {trl_name: words[name][value]}
    if name == "lora_targets":
        return {trl_name: value if isinstance(value, list) else str(value).split(",")}
    if name in ("eval_every", "save_every"):
        if not str(value).isdecimal():
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, expected a whole number, 0 or above"
            )
        strategy = {trl_name.replace("steps", "strategy"): "steps" if int(value) else "no"}
        return strategy | ({trl_name: value} if int(value) else {})
    return {trl_name: value}


TRL_SHOWN = {
    "config": ("FILE", "YAML with any of these options, and any of TRL's"),
    "max_length": ("N", "most tokens of prompt and completion; the model's context by default"),
    "beta": ("X", "of the loss"),
    "dpop_lambda": ("X", "weight of DPOP's penalty"),
    "learning_rate": ("X", "of AdamW, after warm-up"),
    "weight_decay": ("X", "of AdamW"),
    "max_grad_norm": ("X", "gradients are clipped to this global norm"),
    "seed": ("N", "of the order of the data, of dropout and of a new adapter"),
    "bf16": ("", "autocast to bfloat16; weights that are trained stay in their own type"),
    "gradient_checkpointing": ("", "less memory for more time"),
    "share_prefixes": ("", "compute what pairs begin with in common once, and no padding"),
    "pair_values": (
        "NAMES",
        "numbers of the data that go to the loss with each pair: weight, margin, offset, ...",
    ),
    "sync_ref_model": ("", "move the reference towards the model in training (TR-DPO)"),
    "ref_model_mixup_alpha": ("X", "how far: 1 makes it the model as it is then"),
    "ref_model_sync_steps": ("N", "every N steps"),
    "warn_displacement": (
        "{true,false}",
        "warn once where chosen completions become less likely for good",
    ),
    "global_batch": (
        "{true,false}",
        "losses over the pairs of all processes, not of each; gradients are those of one process",
    ),
    "report_to": ("NAME", "tensorboard, wandb, trackio, ..."),
    "lora_alpha": ("A", "of a new adapter"),
    "lora_dropout": ("P", "of a new adapter"),
}
"""TRL's options that the short help shows."""

DEFAULTS: dict[str, Any] = {
    "loss_type": ["dpop"],
    "beta": 0.3,
    "dpop_lambda": 50.0,
    "max_length": None,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1.0,
    "seed": 0,
    "precompute_ref_log_probs": True,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,
    "global_batch": True,
    "dtype": None,
    "lora_dropout": 0.0,
    "lora_target_modules": ["all-linear"],
}
"""Where ``fastdpop train`` differs from TRL: the loss, beta and lambda of the DPOP paper (arXiv:2402.13228, Section 6),
nothing that cuts or hides, and numbers that do not depend on how many processes compute them."""


def _help(text: str, metavar: str = "", **more: Any) -> dict[str, Any]:
    return {"help": text, "metavar": metavar or None, **more}


@dataclass
class PairArguments:
    """What ``fastdpop train`` is told beyond TRL's options. Each field is a command line option."""

    pairs: str | None = field(
        default=None,
        metadata=_help(
            "preference pairs: JSON Lines, JSON, CSV or Parquet, a folder, or a data set of the Hub",
            "FILE",
        ),
    )
    eval_pairs: str | None = field(default=None, metadata=_help("held-out pairs, likewise", "FILE"))
    columns: list[str] | None = field(
        default=None,
        metadata=_help(
            "what the columns are called: prompt=question weight=quality ...", "NAME=COLUMN"
        ),
    )
    chat: bool = field(
        default=False,
        metadata=_help("apply the chat template to pairs that are plain text, too"),
    )
    too_long: str = field(
        default=TOO_LONG[0],
        metadata=_help(
            "what becomes of pairs beyond --max-length: error or drop; texts are never cut",
            choices=TOO_LONG,
        ),
    )
    tokenizer: str | None = field(
        default=None, metadata=_help("the model's own by default", "PATH_OR_ID")
    )
    chat_template_path: str | None = field(
        default=None,
        metadata=_help(
            "a chat template (Jinja) instead of the tokenizer's, for messages, and kept with the saved model",
            "FILE",
        ),
    )
    merge_adapter: bool = field(
        default=False,
        metadata=_help("merge the adapter of --model into its base model before training"),
    )
    loss: str | None = field(
        default=None,
        metadata=_help(
            "a loss of fastdpop's family with its --loss-option: " + ", ".join(words(LossName)),
            "NAME",
            choices=words(LossName),
        ),
    )
    loss_option: list[str] | None = field(
        default=None, metadata=_help("an option of --loss, such as lam=50", "NAME=VALUE")
    )
    resume: bool = field(
        default=False,
        metadata=_help("go on from the newest checkpoint in --output, if there is one"),
    )
    device: str | None = field(
        default=None, metadata=_help("cpu, cuda or cuda:N; a GPU if there is one", "DEVICE")
    )
    threads: int | None = field(
        default=None, metadata=_help("CPU threads; torch's choice by default", "N")
    )
    engine: str = field(
        default="auto", metadata=_help("what computes the loss, see `fastdpop doctor`", "ENGINE")
    )
    workspace_bytes: int | None = field(
        default=None, metadata=_help("bytes that bound the loss's scratch memory", "N")
    )


_GROUPS = {
    "data": (
        "pairs", "eval_pairs", "columns", "pair_values", "chat", "chat_template_path", "max_length", "too_long",
    ),
    "model": (
        "model", "tokenizer", "output", "device", "threads", "bf16", "gradient_checkpointing", "share_prefixes",
        "lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "merge_adapter",
    ),
    "loss": ("beta", "dpop_lambda", "loss", "loss_option"),
    "reference": ("reference", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "optimisation (AdamW)": (
        "epochs", "steps", "batch_pairs", "accumulate", "global_batch", "learning_rate", "warmup", "schedule",
        "weight_decay", "max_grad_norm", "seed",
    ),
    "evaluation and checkpoints": ("eval_every", "save_every", "resume", "report_to", "warn_displacement"),
    "engine": ("engine", "workspace_bytes"),
    "from a file": ("config",),
}  # fmt: skip


_WORDS = {
    "schedule": "constant", "reference": "precomputed", "lora_targets": "all-linear",
    "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512, "warn_displacement": "true",
    "warmup": "10, or a quarter of a run that is shorter than 40",
}  # fmt: skip
"""Defaults of options that are TRL's, or called something else there."""


def short_help() -> str:
    """What ``fastdpop train --help`` prints."""
    own = {f.name: f for f in fields(PairArguments)}
    lines = [
        "usage: fastdpop train --model PATH_OR_ID --pairs FILE --output DIR [options]",
        "",
        "Train a causal language model on preference pairs, on one device or under accelerate launch.",
    ]
    for title, names in _GROUPS.items():
        lines += ["", f"{title}:"]
        for name in names:
            if name in own:
                default = own[name].default
                value, text = own[name].metadata["metavar"], own[name].metadata["help"]
                choices = own[name].metadata.get("choices") or ()
                value = value or (f"{{{','.join(choices)}}}" if choices else "")
            else:
                trl_name, value, text = SHORT[name] if name in SHORT else (name, *TRL_SHOWN[name])
                default = _WORDS.get(name, DEFAULTS.get(trl_name))
            if default not in (None, False):
                text += f" (default: {default})"
            option = f"  --{name.replace('_', '-')} {value or ''}".rstrip()
            first, *more = textwrap.wrap(text, 68)
            lines += [f"{option:<31} {first}"] if len(option) < 31 else [option, " " * 32 + first]
            lines += [" " * 32 + line for line in more]
    lines += [
        "",
        "Every option of `trl dpo` works as well, under TRL's name (--per_device_eval_batch_size, ...):",
        "`fastdpop train --help-all` lists them.",
    ]
    return "\n".join(lines)
