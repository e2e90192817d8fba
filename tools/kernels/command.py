"""The command line of ``python -m tools.kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.kernels import compiler, report
from tools.kernels.variant import Variants


def main(argv: Sequence[str] | None = None, variants: Variants | None = None) -> int:
    """Compile, write the report and print it.

    Args:
        argv: the command line; that of the process if None.
        variants: what there is to compile for a target; the registry's if None.

    Returns:
        The exit code: 0, or 1 where something must not be shipped or there was an error.
    """
    options = _parser().parse_args(argv)
    try:
        entries = compiler.compile_all(
            options.target, options.out, options.only, options.jobs, variants
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"tools.kernels: error: {error}", file=sys.stderr)
        return 1
    return report.finish(entries, options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels",
        description="Compile the GPU kernels ahead of time, without a GPU, and report what they cost.",
    )
    parser.add_argument(
        "--target",
        nargs="+",
        default=["sm_90a"],
        metavar="ARCH",
        help="sm_80, sm_90a (H100), sm_100; several may be named (default: sm_90a)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for cubins and report.json"
    )
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="variants with such names, as in a shell"
    )
    parser.add_argument(
        "--jobs", type=_positive, default=2, metavar="N", help="processes (default: %(default)s)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
