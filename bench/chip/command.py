"""The command line of ``python -m bench.chip``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import contenders
from bench.chip.parts import PARTS, NothingWorks, part_smoke
from bench.chip.results import Results, merged, summary, write
from bench.chip.setup import Setup

NOTHING_WORKS = 3
"""The exit code that keeps ``h100.sh`` from going on."""


def main(argv: Sequence[str] | None = None, setup: Setup | None = None) -> None:
    """Measure parts, or put results together.

    Args:
        argv: the command line; that of the process if None.
        setup: what is measured; what stands in :class:`Setup` if None.

    Raises:
        SystemExit: there is no GPU, or something of ours failed.
    """
    setup = setup or Setup()
    parser = argparse.ArgumentParser(
        prog="python -m bench.chip", description="Time, memory and exactness on a GPU."
    )
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path("build/h100"))
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after as many")
    parser.add_argument("--tiny", action="store_true", help="the smoke test for a slow checker")
    parser.add_argument("--report", type=Path, nargs="+", help="put results together instead")
    options = parser.parse_args(argv)
    unknown = set(options.parts) - set(PARTS)
    if unknown or not (options.parts or options.report):
        parser.error(f"parts are {', '.join(PARTS)}")
    if options.report:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in options.report]
        write(merged(found), options.output)
        print(summary(merged(found)))
        return
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA GPU")
    if "fastdpop triton" in contenders.ours(setup.device):
        from tests import launches

        launches.settle_keys()  # what was compiled beforehand is found
    if options.tiny:
        part_smoke(setup, None, tiny=True)
        return
    results = Results(options.output, setup.device, options.seconds)
    for part in options.parts:
        try:
            PARTS[part](setup, results)
        except NothingWorks as error:
            print(error)
            raise SystemExit(NOTHING_WORKS) from None
    if results.failed:
        raise SystemExit("\n".join(["failed:", *results.failed]))
