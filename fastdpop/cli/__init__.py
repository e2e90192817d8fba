"""The ``fastdpop`` command: ``train``, ``trl``, ``pairs``, ``analyze``, ``plan``, ``demo`` and ``doctor``,
a module each.

A command's module has its ``NAME``, what it is (``ABOUT``) and ``run``, which takes what
``add_arguments`` made of the command line; a command without ``add_arguments`` takes the arguments
themselves, since TRL's parser reads them. What a command needs beyond the package itself is
imported by its ``run``, so that ``--help`` and mistakes are answered as fast as ``import fastdpop``
allows.
"""

from __future__ import annotations

import argparse
import functools
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

import torch

import fastdpop
from fastdpop.cli import analyze, demo, doctor, pairs, plan, train, trl

COMMANDS = (pairs, analyze, plan, demo, doctor)
WITH_OWN_PARSER = (train, trl)
# Of a user; the last is a library's, of what was asked for.
_MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code is 0 for success, 1 for an error, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else list(argv)
    own = {module.NAME: module for module in WITH_OWN_PARSER}
    if argv and argv[0] in own:
        run = functools.partial(own[argv[0]].run, argv[1:])
    else:
        args = parser().parse_args(argv)
        run = functools.partial(args.run, args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between libraries, not for their users
        warnings.showwarning = _plain_warning
        if not torch.distributed.is_torchelastic_launched():
            return _code(run)
        try:
            code = _code(run)
        except Exception:
            traceback.print_exc()
            code = 1
    if code and torch.distributed.is_initialized():
        from fastdpop.integrations.trl.process import end_process

        end_process(code)
    return code


def _code(run: Callable[[], int]) -> int:
    """The exit code of a command, whose user's mistakes are said in one line."""
    try:
        return run()
    except KeyboardInterrupt as stop:
        print(f"\nfastdpop: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    except _MISTAKES as error:
        return _failed(str(error))
    except (RuntimeError, MemoryError) as error:
        # Any other RuntimeError is a fault of the program: those of a user's mistake have
        # become a ValueError where it is known what was asked for.
        if not _is_out_of_memory(error):
            raise
        return _failed(
            f"there is not enough memory: {error}\nLower --batch-pairs (and raise --accumulate as "
            "much), set --gradient-checkpointing or --lora, or drop long pairs with --max-length "
            "and --too-long drop"
        )


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what it parses has the command's function as ``run``."""
    whole = argparse.ArgumentParser(
        prog="fastdpop", description="Preference training with fused losses."
    )
    whole.add_argument("--version", action="version", version=f"fastdpop {fastdpop.__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for own in WITH_OWN_PARSER:
        commands.add_parser(own.NAME, help=own.ABOUT, add_help=False)
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
