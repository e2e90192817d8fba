"""What the builders of pairs have in common: tasks, the fields that they are read from, and counts."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastdpop.data.arithmetic import Edit, Result, made_wrong


class LeftOut(Exception):
    """No pair can be made of a row; the message says why, for rows of that kind."""


class Rejected(NamedTuple):
    """A rejected completion, and how it was made from the chosen one, if it was."""

    text: str
    edit: Edit | None = None


@dataclass(frozen=True)
class Task(ABC):
    """A task with its right completion; texts begin and end without blanks.

    Attributes:
        asked: what a user asks.
        prompt: the same as a text that a completion, after a blank, goes on with.
        right: the right completion.
        origin: what this and other tasks were made from: these are no examples for one another.
        source: what the row calls itself, or None.
    """

    asked: str
    prompt: str
    right: str
    origin: str
    source: str | None

    @abstractmethod
    def rejected(self, seed: int) -> Sequence[Rejected]:
        """Wrong completions, at least one; raises LeftOut where there are none."""


@dataclass(frozen=True)
class Choice(Task):
    """A task with wrong answers to choose from."""

    wrong: Sequence[str]

    def rejected(self, seed: int) -> Sequence[Rejected]:
        """All wrong answers, in their order."""
        return [Rejected(text) for text in self.wrong]


@dataclass(frozen=True)
class Calculation(Task):
    """A task with a calculation; ``results`` finds the intermediate results in ``right``."""

    results: Callable[[], Sequence[Result]]

    def rejected(self, seed: int) -> Sequence[Rejected]:
        """The right answer with one result made wrong: which, and how, follows from seed and task."""
        results = self.results()
        if not results:
            raise LeftOut("no intermediate result to make wrong")
        rng = random.Random(f"{seed}\n{self.asked}\n{self.right}")
        edit = made_wrong(rng.choice(results), rng)
        return [Rejected(edit.applied(self.right), edit)]


@dataclass
class Counts:
    """What became of a source's rows.

    Attributes:
        rows: how many were read.
        pairs: how many were made.
        left_out: how many rows (or single wrong answers) gave no pair, by reason.
    """

    rows: int = 0
    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def text_of(fields: Mapping[str, Any], name: str) -> str:
    """A field's text without blanks around it.

    Raises:
        ValueError: there is no such field, or no text in it.
    """
    if name not in fields:
        raise ValueError(f"field '{name}' is missing (fields here: {sorted(fields)})")
    return checked(fields[name], f"field '{name}'")


def checked(value: Any, what: str) -> str:
    """A text without blanks around it; raises ValueError for any other value, called `what`."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {value!r:.80}, expected a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half a surrogate pair, {value[error.start]!r}") from None
    return value.strip()


def texts_of(value: Any, what: str) -> list[str]:
    """Texts without blanks around them; raises ValueError unless it is a list of two or more."""
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{what} is {value!r:.80}, expected a list of two texts or more")
    return [checked(item, f"item {i} of {what}") for i, item in enumerate(value)]


def name_of(fields: Mapping[str, Any], name: str) -> str | None:
    """What a row calls itself in a field that it may have."""
    value = fields.get(name)
    return str(value) if isinstance(value, (str, int)) and value != "" else None


def without(texts: Sequence[str], index: int) -> list[str]:
    """All texts but one."""
    return [text for i, text in enumerate(texts) if i != index]
