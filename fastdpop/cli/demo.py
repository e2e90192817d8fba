"""``fastdpop demo``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fastdpop.cli.values import positive, threads

NAME = "demo"
ABOUT = "train a small language model with DPO and with DPOP, and draw the difference"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Where the results go, and how long it may take."""
    command.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where demo.png and demo.json go (default: here)",
    )
    command.add_argument(
        "--steps", type=positive, metavar="N", help="steps of each run, fewer for a quick look"
    )
    command.add_argument(
        "--threads",
        type=threads,
        default=2,
        metavar="N",
        help="CPU threads (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run it; 1 if the difference is not the expected one."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model comes from an installed package
    import torch

    from fastdpop.demo import run_demo

    torch.set_num_threads(args.threads)
    steps = {} if args.steps is None else {"steps": args.steps}
    return 0 if run_demo(args.output, **steps) else 1
