"""The ``fastdpop`` command: ``train``, ``demo`` and ``doctor``.

Everything heavy is imported by the subcommand that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastdpop
from fastdpop import losses

if TYPE_CHECKING:
    from fastdpop.data import TokenPair
    from fastdpop.losses import PreferenceLoss

LORA_DEFAULTS = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code is 0 for success, 1 for an error, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between libraries, not for their users
        warnings.showwarning = _plain_warning
        try:
            code: int = args.run(args)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            print(f"fastdpop: error: {error}", file=sys.stderr)
            return 1
    return code


def _plain_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"fastdpop: warning: {message}", file=sys.stderr)


# ----------------------------------------------------------------------------------------- commands


def _doctor(_: argparse.Namespace) -> int:
    from fastdpop.doctor import report

    print(report())
    return 0


def _demo(args: argparse.Namespace) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model comes from an installed package
    from fastdpop.demo import run_demo

    torch.set_num_threads(args.threads)
    steps = {} if args.steps is None else {"steps": args.steps}
    return 0 if run_demo(args.output, **steps) else 1


def _train(args: argparse.Namespace) -> int:
    from fastdpop.data import Batches
    from fastdpop.train import Settings, train

    if args.threads:
        torch.set_num_threads(args.threads)
    lora = _lora_options(args)
    settings = Settings(
        loss=_loss(args.loss, args.loss_option),
        steps=args.steps or 1,
        batch_pairs=args.batch_pairs,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup=args.warmup,
        schedule=args.schedule,
        max_grad_norm=args.max_grad_norm,
        reference=args.reference,
        bf16=args.bf16,
        seed=args.seed,
        eval_every=args.eval_every,
        save_every=args.save_every,
        engine=args.engine,
        workspace_bytes=args.workspace_bytes,
    )
    model, tokenizer = _load(args, lora)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    pairs = _read(args.pairs, tokenizer, model, args)
    batches = Batches.shuffled(pairs, settings.batch_pairs, pad_id, seed=settings.seed)
    held_out = None
    if args.eval_pairs is not None:
        held_out = Batches(
            _read(args.eval_pairs, tokenizer, model, args), settings.batch_pairs, pad_id
        )
    if args.steps is None:
        steps = math.ceil(args.epochs * len(batches) / settings.accumulate)
        settings = replace(settings, steps=steps)
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
    return {**LORA_DEFAULTS, **given} if args.lora else None


def _load(args: argparse.Namespace, lora: dict[str, Any] | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Trained weights stay float32, or small updates would be rounded away; frozen ones need not.
    dtype = torch.bfloat16 if lora and args.bf16 else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
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
    from fastdpop.data import read_pairs, tokenise

    longest = args.max_length or getattr(model.config, "max_position_embeddings", None)
    pairs, dropped = tokenise(
        read_pairs(path), tokenizer, max_length=longest, too_long=args.too_long
    )
    note = f", {dropped} dropped for more than {longest} tokens" if dropped else ""
    print(f"{path}: {len(pairs)} pairs{note}")
    return pairs


# ------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpop", description="Preference training with fused losses."
    )
    parser.add_argument("--version", action="version", version=f"fastdpop {fastdpop.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_train, _add_demo, _add_doctor):
        add(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    about = "say which engine would run here, and why"
    command = commands.add_parser("doctor", help=about, description=about)
    command.set_defaults(run=_doctor)


def _add_demo(commands: Any) -> None:
    about = "train a small language model with DPO and with DPOP, and draw the difference"
    command = commands.add_parser("demo", help=about, description=about)
    command.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where demo.png and demo.json go (default: here)",
    )
    command.add_argument(
        "--steps", type=_positive, metavar="N", help="steps of each run, fewer for a quick look"
    )
    command.add_argument(
        "--threads", type=_positive, default=2, metavar="N", help="(default: %(default)s)"
    )
    command.set_defaults(run=_demo)


def _add_train(commands: Any) -> None:
    about = "train a causal language model on preference pairs"
    command = commands.add_parser("train", help=about, description=about)
    command.set_defaults(run=_train)

    group = command.add_argument_group("data")
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
        type=_positive,
        metavar="N",
        help="most tokens of prompt and completion (default: the model's context)",
    )
    group.add_argument(
        "--too-long",
        choices=("error", "drop"),
        default="error",
        help="what becomes of longer pairs; texts are never cut (default: %(default)s)",
    )

    group = command.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a causal LM")
    group.add_argument("--tokenizer", metavar="PATH_OR_ID", help="(default: the model's)")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="the run's folder")
    group.add_argument("--device", help="(default: cuda if there is one, else cpu)")
    group.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)"
    )
    group.add_argument(
        "--bf16",
        action="store_true",
        help="autocast to bfloat16; trained weights stay float32, those frozen by --lora do not",
    )
    group.add_argument("--lora", action="store_true", help="train a LoRA adapter instead (peft)")
    group.add_argument("--lora-rank", type=_positive, metavar="R", help=_lora_help("rank"))
    group.add_argument("--lora-alpha", type=float, metavar="A", help=_lora_help("alpha"))
    group.add_argument("--lora-dropout", type=float, metavar="P", help=_lora_help("dropout"))
    group.add_argument(
        "--lora-targets",
        metavar="NAMES",
        help="module names, separated by commas " + _lora_help("targets"),
    )

    group = command.add_argument_group("loss")
    group.add_argument(
        "--loss",
        choices=losses.available(),
        default="dpop",
        metavar="NAME",
        help="one of " + ", ".join(losses.available()) + " (default: %(default)s)",
    )
    group.add_argument(
        "--loss-option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the loss, such as lam=50; may be repeated",
    )
    group.add_argument(
        "--reference",
        choices=("precomputed", "online"),
        default="precomputed",
        help="score the reference once before training, or in every step (default: %(default)s)",
    )

    group = command.add_argument_group("optimisation (AdamW)")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=_epochs, default=1.0, metavar="X", help="(default: %(default)s)"
    )
    length.add_argument(
        "--steps", type=_positive, metavar="N", help="optimizer steps, instead of --epochs"
    )
    for flag, kind, default, text in (
        ("--batch-pairs", _positive, 4, "pairs in one forward pass"),
        ("--accumulate", _positive, 1, "forward passes in one step"),
        ("--learning-rate", float, 5e-6, "after warm-up"),
        ("--warmup", int, 10, "steps of linear warm-up"),
        ("--weight-decay", float, 0.0, "of AdamW"),
        ("--max-grad-norm", float, 1.0, "gradients are clipped to this norm"),
        ("--seed", int, 0, "of data order, dropout and adapter"),
    ):
        group.add_argument(
            flag,
            type=kind,
            default=default,
            metavar="X" if kind is float else "N",
            help=f"{text} (default: %(default)s)",
        )
    group.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="of the learning rate after warm-up (default: %(default)s)",
    )

    group = command.add_argument_group("evaluation and checkpoints")
    group.add_argument(
        "--eval-every",
        type=int,
        default=50,
        metavar="N",
        help="steps between evaluations, 0 for first and last only (default: %(default)s)",
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between checkpoints, 0 for none (default: %(default)s)",
    )
    group.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --output"
    )

    group = command.add_argument_group("engine")
    group.add_argument(
        "--engine", default="auto", help="see `fastdpop doctor` (default: %(default)s)"
    )
    group.add_argument(
        "--workspace-bytes",
        type=_positive,
        metavar="N",
        help="bound on the loss's scratch memory (default: the library's)",
    )


def _lora_help(name: str) -> str:
    return f"(default: {LORA_DEFAULTS[name]})"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _epochs(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word, such as form=outside


if __name__ == "__main__":
    sys.exit(main())
