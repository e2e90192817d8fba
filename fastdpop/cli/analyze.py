"""``fastdpop analyze``: why a chosen log-prob falls, token by token."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdpop.cli.pairs import add_reading, reading_options
from fastdpop.cli.values import positive

NAME = "analyze"
ABOUT = "say why the chosen log-prob falls, token by token, as a page with pictures"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Which models, which pairs, and where the report goes."""
    add = command.add_argument
    add(
        "--model",
        required=True,
        action="append",
        metavar="PATH_OR_ID",
        help="a model or an adapter; several times to compare models side by side",
    )
    add("--name", action="append", metavar="NAME", help="what a --model is called, in their order")
    add(
        "--reference",
        metavar="PATH_OR_ID",
        help="the model before training (default: the base of an adapter, else none)",
    )
    add(
        "--pairs",
        required=True,
        metavar="FILE",
        help="preference pairs: JSON Lines, JSON, CSV or Parquet, a folder, or a data set of the Hub",
    )
    add(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where analysis.html, analysis.png and analysis.json go (default: here)",
    )
    add(
        "--limit",
        type=positive,
        default=1000,
        metavar="N",
        help="most pairs to score, drawn at random (default: %(default)s, as in the paper)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of that draw (default: %(default)s)")
    add(
        "--batch-pairs",
        type=positive,
        default=8,
        metavar="N",
        help="pairs in one forward pass (default: %(default)s)",
    )
    add(
        "--examples",
        type=positive,
        default=3,
        metavar="N",
        help="pairs to show of each model (default: %(default)s)",
    )
    add(
        "--device",
        metavar="NAME",
        help="cpu, cuda:0, ... (default: an accelerator, if there is one)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the models' weights (default: %(default)s)",
    )
    add_reading(command)


def run(args: argparse.Namespace) -> int:
    """Analyse.

    Raises:
        ValueError, OSError, ImportError: with a message for the user.
    """
    from fastdpop.analysis.run import Job, analyze

    analyze(
        Job(
            models=args.model,
            names=args.name or (),
            reference=args.reference,
            pairs=args.pairs,
            reading=reading_options(args),
            limit=args.limit,
            seed=args.seed,
            batch_pairs=args.batch_pairs,
            device=args.device,
            dtype=args.dtype,
            examples=args.examples,
            output=args.output,
        )
    )
    return 0
