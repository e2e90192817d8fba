"""Command lines of the documentation: those of fastdpop run, of others what they name exists."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import yaml

from fastdpop.cli import main, parser
from tests.snippets import files

ROOT = Path(__file__).parents[2]
_TARGETS = re.compile(r"^([\w -]+):(?!=)", re.MULTILINE)
_ELSEWHERE = ("git", "cd", ".", "source", "export", "echo")
"""Programs that change nothing of ours."""


def lines(text: str, prompt: bool) -> Iterator[tuple[str, str]]:
    """Each command of a block, on one line, and what the block shows of its output."""
    joined = re.sub(r"\\\n\s*", "", text)
    if not prompt:
        for line in joined.splitlines():
            if line.strip() and not line.startswith("#"):
                yield line, ""
        return
    for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        yield line, shown.strip()


def check(line: str, *, parse_only: bool = False) -> None:
    """Run or check a command line.

    Raises:
        AssertionError, SystemExit: it would not work.
    """
    if parse_only:
        done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if "&&" in words and not parse_only:
        cut = words.index("&&")
        check(shlex.join(words[:cut]))
        check(shlex.join(words[cut + 1 :]))
        return
    match words:
        case ["fastdpop", *argv]:
            _fastdpop(argv, parse_only)
        case ["accelerate", "launch", *argv]:
            _accelerate(argv)
        case ["python", *argv]:
            _python(argv, parse_only)
        case ["make", *argv]:
            _make(argv)
        case ["pip", command, *_] | ["python", "-m", "pip", command, *_]:
            assert command == "install"  # tests/test_install.py has the rest
        case [program, *_] if (ROOT / program).is_file():
            assert os.access(ROOT / program, os.X_OK), f"{program} is not executable"
        case [program, *_] if program in _ELSEWHERE or parse_only:
            pass
        case _:
            raise AssertionError(f"how is this run? {line}")


def _fastdpop(argv: list[str], parse_only: bool) -> None:
    argv = files.provide(argv)
    match argv:
        case ["train", *options]:
            if parse_only or "--resume" in options:
                _parse_train(options)
                return
            argv = [*argv, "--max-steps", "1", "--device", "cpu", "--report_to", "none"]
        case ["trl", "dpo", *options]:
            _parse_trl(options)
            return
        case ["demo", *_] | ["trl", *_]:
            parse_only = True
    if parse_only:
        parser().parse_args(argv)
        return
    assert main(argv) == 0, f"fastdpop {shlex.join(argv)} failed"


def _parse_train(argv: list[str]) -> None:
    from fastdpop.train.parse import parse

    parse([*argv, "--device", "cpu"])


def _parse_trl(argv: list[str]) -> None:
    """All of TRL's and accelerate's parsers; the processes are not started."""
    from fastdpop.integrations.trl import command

    # What a page has patched stays so.
    unpatch = mock.patch.object(command, "unpatch_trl")
    with unpatch, mock.patch.object(command, "launch_command") as start:
        assert command.launch(argv) == 0
    assert start.called


def _accelerate(argv: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    known = ROOT if any(word.startswith("examples/") for word in argv) else Path()
    argv = [re.sub(r"^\$N$", "0", word) for word in argv]
    args = launch_command_parser().parse_args(argv)
    if args.config_file:
        assert yaml.safe_load((known / args.config_file).read_text())["distributed_type"]
    if not args.module:
        _python([args.training_script, *args.training_script_args], parse_only=False)
        return
    assert args.training_script == "fastdpop"
    match files.provide(args.training_script_args):
        case ["train", *options]:
            _parse_train(options)
        case options:
            parser().parse_args(options)


def _python(argv: list[str], parse_only: bool) -> None:
    match argv:
        case ["-m", "fastdpop", *rest]:
            _fastdpop(rest, parse_only)
        case ["-m", module, *_]:
            assert importlib.util.find_spec(module), f"there is no module {module}"
        case [script, *_] if not parse_only:  # tests/test_examples.py runs them
            assert (ROOT / script).is_file(), f"there is no file {script}"


def _make(argv: list[str]) -> None:
    targets: set[str] = {
        target
        for names in _TARGETS.findall((ROOT / "Makefile").read_text())
        for target in names.split()
    }
    for word in argv:
        assert "=" in word or word in targets, f"the Makefile has no target {word}"
