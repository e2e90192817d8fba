"""``fastdpop pairs``: making preference pairs, and what is in them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastdpop.cli.values import positive
from fastdpop.train.options import TOO_LONG

if TYPE_CHECKING:
    from fastdpop.data.build import Counts

NAME = "pairs"
ABOUT = "make preference pairs, or say what they hold"
BUILD = "make the DPOP paper's pairs from the original data sets"
DATA_SETS = ("metamath", "arc", "hellaswag", "gsm8k")
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
    _add_build(actions.add_parser("build", help=BUILD, description=BUILD))
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


def _add_build(command: argparse.ArgumentParser) -> None:
    command.add_argument("kind", choices=DATA_SETS, help="which data set SOURCE is")
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="its rows: JSON Lines, JSON or Parquet, a folder, or a data set of the Hub; of hellaswag "
        "also a text of six lines a task (.txt, .txt.bz2)",
    )
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="where the pairs go: JSON Lines (.jsonl) or Parquet (.parquet), by its ending",
    )
    command.add_argument("--force", action="store_true", help="replace FILE if it is there")
    command.add_argument(
        "--split", metavar="SPLIT", help="of a data set or folder (default: train)"
    )
    command.add_argument("--config", metavar="NAME", help="which configuration of a data set")
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="chooses the results that are made wrong, their values and the examples (default: 0)",
    )
    command.add_argument(
        "--few-shot",
        type=positive,
        default=0,
        metavar="K",
        help="put K solved tasks of the same source in front of each",
    )
    command.add_argument(
        "--chat", action="store_true", help="make messages of user and assistant instead of texts"
    )
    command.add_argument("--limit", type=positive, metavar="N", help="make no more than N pairs")
    command.add_argument("--json", action="store_true", help="print what was made as JSON")
    command.set_defaults(action=_build)


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


def _build(args: argparse.Namespace) -> int:
    from fastdpop.data.build import CORRUPTED, Counts, build
    from fastdpop.data.build.write import schema, write

    source = Path(args.source)
    if args.out.exists() and source.exists() and args.out.samefile(source):
        raise ValueError(f"--out is {str(args.out)!r}, which is the source itself")
    # Whatever lies there is read: a file of the source would be replaced, a new one be read the next time.
    if source.is_dir() and source.resolve() in args.out.resolve().parents:
        raise ValueError(
            f"--out is {str(args.out)!r}, expected a file outside the source, {args.source!r}"
        )
    counts = Counts()
    pairs = build(
        args.kind,
        args.source,
        seed=args.seed,
        few_shot=args.few_shot,
        chat=args.chat,
        split=args.split,
        config=args.config,
        limit=args.limit,
        counts=counts,
        progress=True,
    )
    columns = schema(chat=args.chat, edit=args.kind in CORRUPTED)
    write(pairs, args.out, columns, force=args.force)
    if args.json:
        print(json.dumps({"out": str(args.out), **vars(counts)}, indent=1))
    else:
        print(_said(args.out, counts))
    return 0


def _said(out: Path, counts: Counts) -> str:
    lines = [f"{out}: {counts.pairs:,} pairs of {counts.rows:,} rows"]
    for reason, count in counts.left_out.most_common():
        lines.append(f"left out: {count:,} with {reason}")
    return "\n".join(lines)
