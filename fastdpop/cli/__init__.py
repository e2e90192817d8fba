"""The ``fastdpop`` command: ``train``, ``trl``, ``pairs``, ``analyze``, ``plan``, ``demo`` and ``doctor``,
a module each.

A command's module has its ``NAME``, what it is (``ABOUT``) and ``run``, which takes what
``add_arguments`` made of the command line; a command without ``add_arguments`` takes the arguments
themselves, since TRL's parser reads them. What a command needs is imported by its ``run``, torch
too, so that ``--help`` and mistakes in usage are answered at once.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from fastdpop.cli import analyze, demo, doctor, pairs, plan, train, trl
from fastdpop.installed import message
from fastdpop.version import VERSION

COMMANDS = (pairs, analyze, plan, demo, doctor)
WITH_OWN_PARSER = (train, trl)
# Of a user; the last is a library's, of what was asked for.
_MISTAKES = (ValueError, ImportError, FloatingPointError, NotImplementedError)
_LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Is in the environment of a process that ``torchrun`` or ``accelerate launch`` has started; torch looks there, too."""
_TELEMETRY = "HF_HUB_DISABLE_TELEMETRY"
"""Of Hugging Face's libraries: 0 leaves it on."""
_UNREAD = 141
"""The exit code where whoever read the output has gone, as a shell has it of what SIGPIPE ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code is 0 for success, 1 for an error, 2 for wrong usage.

    Where nobody reads the output to its end, as in ``fastdpop train --help | head``, it is 141, and nothing is said.
    """
    os.environ.setdefault(
        _TELEMETRY, "1"
    )  # TRL's trainers tell the Hugging Face hub what they train, and on what
    try:
        code = _answer(sys.argv[1:] if argv is None else list(argv))
    except SystemExit:
        if _flush():
            raise
        raise SystemExit(_UNREAD) from None
    return code if _flush() else code or _UNREAD


def _answer(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII shows what it can
            stream.reconfigure(errors="replace")
    own = {module.NAME: module for module in WITH_OWN_PARSER}
    if argv and argv[0] in own:
        run = functools.partial(own[argv[0]].run, argv[1:])
    else:
        args = parser().parse_args(argv)
        run = functools.partial(args.run, args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between libraries, not for their users
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nothing here needs
        warnings.showwarning = _plain_warning
        if _LAUNCHED not in os.environ:
            return _code(run)
        try:
            code = _code(run)
        except Exception:
            traceback.print_exc()
            code = 1
    if code:
        import torch

        if torch.distributed.is_initialized():
            from fastdpop.integrations.trl.process import end_process

            end_process(code)
    return code


def _code(run: Callable[[], int]) -> int:
    """The exit code of a command, whose user's mistakes are said in one line."""
    try:
        return run()
    except KeyboardInterrupt as stop:
        print(f"\nfastdpop: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError as error:  # it may be another than that of the output
        return _UNREAD if _is_unread() else _failed(str(error))
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        return _failed(f"{error.filename}: {error.strerror}" if named else message(error))
    except _MISTAKES as error:
        return _failed(message(error))
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


def _is_unread() -> bool:
    """Whether the output goes to a pipe that nobody reads any more."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush() -> bool:
    """Write what is left of the output; False if nobody reads it, and then nothing is left for Python's end either."""
    read = True
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            print(end="", file=stream, flush=True)  # to nowhere where there is no such stream
        except BrokenPipeError:
            read = False
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
    return read


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; what it parses has the command's function as ``run``."""
    whole = argparse.ArgumentParser(
        prog="fastdpop", description="Preference training with fused losses."
    )
    whole.add_argument("--version", action="version", version=f"fastdpop {VERSION}")
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
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return True
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _plain_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"fastdpop: warning: {message}", file=sys.stderr)
