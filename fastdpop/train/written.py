"""Options under the names that a user wrote: of most there are two, TRL's and a short one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fastdpop.train.options import SHORT

_FOLLOW = {"eval_strategy": "eval_every", "save_strategy": "save_every"}
"""What a short option says of a second one of TRL's."""
_OTHER_WORDS = "lr_scheduler_type"
"""Its values are others than those of its short option, and messages name them."""


def flags(argv: Iterable[str]) -> list[str]:
    """The options of a command line, as they are written there."""
    return [text.partition("=")[0] for text in argv if text.startswith("--")]


def check_twice(written: Sequence[str]) -> None:
    """
    Raises:
        ValueError: an option is given under both of its names, of which one would be passed over.
    """
    seen: dict[str, str] = {}
    for flag in written:
        other = seen.setdefault(_trl(flag), flag)
        if _plain(other) != _plain(flag):
            raise ValueError(f"{other} and {flag} are two names of one option: give one of them")


def as_written(message: str, written: Sequence[str], given: Iterable[str] = ()) -> str:
    """A message in which options have the names under which they were written, or else their short ones.

    Args:
        given: TRL's names without dashes in front, which are options in this message.
    """
    names = {_trl(flag): flag for flag in written} | {_OTHER_WORDS: f"--{_OTHER_WORDS}"}
    for name, short in _FOLLOW.items():
        names.setdefault(name, next((f for f in written if _plain(f) == short), f"--{name}"))
    shorter = {trl: f"--{short.replace('_', '-')}" for short, (trl, *_) in SHORT.items()}
    for name in given:
        if name in names:
            message = re.sub(rf"(?<![\w-]){name}(?![\w-])", f"--{name}", message)
    return re.sub(
        r"(?<![\w-])--[a-z][\w-]*",
        lambda found: names.get(_trl(found[0]), shorter.get(_trl(found[0]), found[0])),
        message,
    )


def _plain(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _trl(flag: str) -> str:
    """TRL's name of an option."""
    name = _plain(flag)
    return SHORT[name][0] if name in SHORT else name
