"""The ``fastdpop`` command: ``train``, ``demo`` and ``doctor``, a module each.

A command's module has its ``NAME``, what it is (``ABOUT``), ``add_arguments`` and ``run``. What a
command needs beyond the package itself is imported by its ``run``, so that ``--help`` and mistakes
are answered as fast as ``import fastdpop`` allows.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import torch

import fastdpop
from fastdpop.cli import demo, doctor, train

COMMANDS = (train, demo, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code is 0 for success, 1 for an error, 2 for wrong usage."""
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between libraries, not for their users
        warnings.showwarning = _plain_warning
        try:
            code: int = args.run(args)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            return _failed(str(error))
        except (RuntimeError, MemoryError) as error:
            # Any other RuntimeError is a fault of the program: those of a user's mistake have
            # become a ValueError where it is known what was asked for.
            if not _is_out_of_memory(error):
                raise
            return _failed(f"there is not enough memory: {error}")
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what it parses has the command's function as ``run``."""
    whole = argparse.ArgumentParser(
        prog="fastdpop", description="Preference training with fused losses."
    )
    whole.add_argument("--version", action="version", version=f"fastdpop {fastdpop.__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        command = commands.add_parser(module.NAME, help=module.ABOUT, description=module.ABOUT)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return whole


def _failed(message: str) -> int:
    print(f"fastdpop: error: {message}", file=sys.stderr)
    return 1


def _is_out_of_memory(error: Exception) -> bool:
    # torch has no type of its own for a CPU's memory.
    of_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or of_cpu


def _plain_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"fastdpop: warning: {message}", file=sys.stderr)
