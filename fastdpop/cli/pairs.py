"""``fastdpop pairs``: what is in preference pairs."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdpop.cli.values import positive
from fastdpop.train.options import TOO_LONG

NAME = "pairs"
ABOUT = "say what preference pairs hold"
STATS = "how much of the pairs' tokens is shared, and what sharing them should save"

READING = {
    "columns": {
        "nargs": "+",
        "metavar": "NAME=COLUMN",
        "help": "what the columns are called: prompt=question chosen=good ...",
    },
    "chat": {
        "action": "store_true",
        "help": "apply the chat template to pairs that are plain text, too",
    },
    "tokenizer": {"metavar": "PATH_OR_ID", "help": "the model's own by default"},
    "chat_template_path": {
        "metavar": "FILE",
        "help": "a chat template (Jinja) instead of the tokenizer's",
    },
    "max_length": {
        "type": positive,
        "metavar": "N",
        "help": "most tokens of prompt and completion; the model's context by default",
    },
    "too_long": {
        "choices": TOO_LONG,
        "help": "what becomes of pairs beyond --max-length (default: error)",
    },
    "dataset_train_split": {
        "metavar": "SPLIT",
        "help": "which split of a data set (default: train)",
    },
    "dataset_config": {"metavar": "NAME", "help": "which configuration of a data set"},
    "model_revision": {"metavar": "NAME", "help": "which version of the model"},
    "trust_remote_code": {"action": "store_true", "help": "run code that the model brings along"},
}
"""Options of ``fastdpop train`` that say what is read, and how."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What to do with which pairs."""
    actions = command.add_subparsers(title="commands", required=True, metavar="COMMAND")
    stats = actions.add_parser("stats", help=STATS, description=STATS)
    stats.add_argument(
        "pairs",
        metavar="FILE",
        help="preference pairs: JSON Lines, JSON, CSV or Parquet, a folder, or a data set of the Hub",
    )
    stats.add_argument(
        "--model", required=True, metavar="PATH_OR_ID", help="whose tokens and layers are meant"
    )
    stats.add_argument(
        "--batch-pairs",
        type=positive,
        default=8,
        metavar="N",
        help="pairs in one forward pass (default: %(default)s)",
    )
    stats.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw histograms (PNG, SVG, PDF)"
    )
    stats.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_reading(stats)
    stats.set_defaults(action=_stats)


def add_reading(command: argparse.ArgumentParser) -> None:
    """The options that say what is read, and how."""
    reading = command.add_argument_group("reading, as in fastdpop train")
    for name, options in READING.items():
        reading.add_argument("--" + name.replace("_", "-"), **options)  # type: ignore[arg-type]


def reading_options(args: argparse.Namespace) -> list[str]:
    """Those that were given, as a command line of ``fastdpop train``."""
    options = []
    for name in READING:
        value = getattr(args, name)
        if value is True:
            options += [f"--{name}"]
        elif value:
            options += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return options


def run(args: argparse.Namespace) -> int:
    """Do it."""
    return int(args.action(args))


def _stats(args: argparse.Namespace) -> int:
    from fastdpop.pair_stats import report

    options = ["--pairs", args.pairs, "--model", args.model, *reading_options(args)]
    report(options, args.pairs, args.batch_pairs, picture=args.picture, as_json=args.json)
    return 0
