"""``fastdpop train``: its options, and the run from files to a saved model.

Options that are a field of :class:`fastdpop.settings.Settings` take default, choices and help from
there.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from fastdpop import engines, losses
from fastdpop.cli.values import option, positive, positive_real, threads
from fastdpop.data import TOO_LONG, Batches, TokenPair, read_pairs, tokenise
from fastdpop.losses import PreferenceLoss
from fastdpop.settings import LOSS, Settings

NAME = "train"
ABOUT = "train a causal language model on preference pairs"

FIELDS = {field.name: field for field in fields(Settings)}
LORA_DEFAULTS = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}


# ---------------------------------------------------------------------------------------- arguments


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Everything that a run can be told, in groups."""
    _add_data(command.add_argument_group("data"))
    _add_model(command.add_argument_group("model"))
    _add_loss(command.add_argument_group("loss"))
    _add_optimisation(command.add_argument_group("optimisation (AdamW)"))
    group = command.add_argument_group("evaluation and checkpoints")
    _add_setting(group, "eval_every", int)
    _add_setting(group, "save_every", int)
    group.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --output"
    )
    group = command.add_argument_group("engine")
    _add_setting(group, "engine", str)
    _add_setting(group, "workspace_bytes", positive)


def _add_setting(
    group: argparse._ArgumentGroup, name: str, kind: Any, *, note: str | None = None
) -> None:
    """The option for a field of Settings, ``--batch-pairs`` for ``batch_pairs``."""
    field = FIELDS[name]
    choices = field.metadata["choices"]
    text = field.metadata["help"] + (f"; {note}" if note else "")
    group.add_argument(
        "--" + name.replace("_", "-"),
        type=kind,
        default=field.default,
        choices=choices,
        metavar=None if choices else {str: name.upper(), float: "X"}.get(kind, "N"),
        help=text if field.default is None else f"{text} (default: %(default)s)",
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pairs",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL with prompt (text or chat messages), chosen and rejected",
    )
    group.add_argument("--eval-pairs", type=Path, metavar="FILE", help="held-out pairs, likewise")
    group.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="most tokens of prompt and completion (default: the model's context)",
    )
    group.add_argument(
        "--too-long",
        choices=TOO_LONG,
        default=TOO_LONG[0],
        help="what becomes of longer pairs; texts are never cut (default: %(default)s)",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a causal LM")
    group.add_argument("--tokenizer", metavar="PATH_OR_ID", help="(default: the model's)")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="the run's folder")
    group.add_argument("--device", help="(default: cuda if there is one, else cpu)")
    group.add_argument(
        "--threads", type=threads, metavar="N", help="CPU threads (default: torch's choice)"
    )
    group.add_argument(
        "--bf16",
        action="store_true",
        help=FIELDS["bf16"].metadata["help"] + ", those frozen by --lora become bfloat16",
    )
    group.add_argument("--lora", action="store_true", help="train a LoRA adapter instead (peft)")
    for name, kind, metavar, text in (
        ("rank", positive, "R", ""),
        ("alpha", float, "A", ""),
        ("dropout", float, "P", ""),
        ("targets", str, "NAMES", "module names, separated by commas "),
    ):
        default = f"(default: {LORA_DEFAULTS[name]})"
        group.add_argument(f"--lora-{name}", type=kind, metavar=metavar, help=text + default)


def _add_loss(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--loss",
        choices=losses.available(),
        default=LOSS,
        metavar="NAME",
        help="one of " + ", ".join(losses.available()) + " (default: %(default)s)",
    )
    group.add_argument(
        "--loss-option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the loss, such as lam=50; may be repeated",
    )
    _add_setting(group, "reference", str)


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=positive_real, default=1.0, metavar="X", help="(default: %(default)s)"
    )
    length.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help=FIELDS["steps"].metadata["help"] + ", instead of --epochs",
    )
    _add_setting(group, "batch_pairs", positive)
    _add_setting(group, "accumulate", positive)
    _add_setting(group, "learning_rate", float)
    _add_setting(group, "warmup", int)
    _add_setting(group, "weight_decay", float)
    _add_setting(group, "max_grad_norm", float)
    _add_setting(group, "seed", int, note="with --lora also of the adapter")
    _add_setting(group, "schedule", str)


# ---------------------------------------------------------------------------------------------- run


def run(args: argparse.Namespace) -> int:
    """Read, train and save."""
    from fastdpop.train import train

    if args.threads:
        torch.set_num_threads(args.threads)
    lora = _lora_options(args)
    settings = settings_of(args)
    device = _device(args.device)
    engines.choose(settings.engine, device, torch.bfloat16 if args.bf16 else torch.float32)
    model, tokenizer = _load(args, device, lora)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    pairs = _read(args.pairs, tokenizer, model, args)
    batches = Batches.shuffled(pairs, settings.batch_pairs, pad_id, seed=settings.seed)
    held_out = None
    if args.eval_pairs is not None:
        held_out = Batches(
            _read(args.eval_pairs, tokenizer, model, args), settings.batch_pairs, pad_id
        )
    if args.steps is None:
        # Settings refuse what is cut here.
        steps = min(args.epochs * len(batches) / settings.accumulate, 2.0**63)
        settings = replace(settings, steps=math.ceil(steps))
    rows = train(
        model, batches, settings, held_out=held_out, output=args.output, resume=args.resume
    )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    if held_out is not None:
        last = rows[-1]
        print(
            f"Held-out log-ratio after {last['step']} steps: chosen "
            f"{last['eval_chosen_logratio']:+.2f}, rejected {last['eval_rejected_logratio']:+.2f}, "
            f"chosen ahead in {last['eval_accuracy']:.0%}"
        )
    print(f"Saved to {args.output}")
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a command line. Those of an epoch have one step until the data are counted."""
    given = {name: getattr(args, name) for name in FIELDS if name not in ("loss", "steps")}
    return Settings(loss=_loss(args.loss, args.loss_option), steps=args.steps or 1, **given)


def _loss(name: str, options: list[tuple[str, Any]]) -> PreferenceLoss:
    try:
        return losses.get(name, **dict(options))
    except TypeError as error:
        raise ValueError(str(error)) from None


def _lora_options(args: argparse.Namespace) -> dict[str, Any] | None:
    given = {name: getattr(args, f"lora_{name}") for name in LORA_DEFAULTS}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.lora:
        raise ValueError(f"--lora-{next(iter(given))} has no effect without --lora")
    alpha, dropout = given.get("alpha", 1.0), given.get("dropout", 0.0)
    if not 0 < alpha < math.inf:
        raise ValueError(f"--lora-alpha is {alpha}, expected a positive number")
    if not 0 <= dropout < 1:
        raise ValueError(f"--lora-dropout is {dropout}, expected a number from 0 to less than 1")
    return {**LORA_DEFAULTS, **given} if args.lora else None


def _device(name: str | None) -> torch.device:
    """The device to train on, once it has computed something."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    # What a build without CUDA raises, and one without a device's module.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"--device is {name!r}, expected a device that torch can use here, "
            f"such as cpu or cuda:0: {str(error).splitlines()[0]}"
        ) from error
    return device


def _load(
    args: argparse.Namespace, device: torch.device, lora: dict[str, Any] | None
) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Trained weights stay float32, or small updates would be rounded away; frozen ones need not.
    dtype = torch.bfloat16 if lora and args.bf16 else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    model: Any
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    except (RuntimeError, SafetensorError) as error:  # weights of other shapes, a file cut short
        raise ValueError(f"{args.model} cannot be loaded: {error}") from error
    model.to(device)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(args.seed)  # of the adapter's first weights
        targets = lora["targets"]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=targets if targets == "all-linear" else targets.split(","),
        )
        model = get_peft_model(model, config)
    return model, tokenizer


def _read(path: Path, tokenizer: Any, model: Any, args: argparse.Namespace) -> list[TokenPair]:
    longest = args.max_length or getattr(model.config, "max_position_embeddings", None)
    pairs, dropped = tokenise(
        read_pairs(path), tokenizer, max_length=longest, too_long=args.too_long
    )
    note = f", {dropped} dropped for more than {longest} tokens" if dropped else ""
    print(f"{path}: {len(pairs)} pairs{note}")
    return pairs
