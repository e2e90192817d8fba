"""Options of losses: dataclass fields that know which values they accept.

beta: float = positive(0.1)
form: Form = one_of(Form)     # a Literal, whose first word is the default
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, field
from numbers import Real
from typing import Any, ClassVar, NamedTuple

from fastdpop.choices import words

from .base import PreferenceLoss

KIND = "kind"
"""Where a field has it in its metadata."""


class Kind(NamedTuple):
    """Which values an option accepts."""

    types: tuple[type, ...]
    expected: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class CheckedLoss(PreferenceLoss):
    """A loss whose options are checked when it is made.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of its range. Both name the loss, the option, its value and
        what was expected.
    """

    _kinds: ClassVar[dict[str, Kind]] = {}

    def __init_subclass__(cls, **given: Any) -> None:
        """Note what is checked beside the fields: the compilers of torch 2.9 and 2.10 cannot read their metadata."""
        super().__init_subclass__(**given)
        own = {name: kind_of(option) for name, option in vars(cls).items()}
        cls._kinds = {
            name: kind for name, kind in {**cls._kinds, **own}.items() if kind is not None
        }

    def __post_init__(self) -> None:
        for name, kind in self._kinds.items():
            check(type(self).__name__, name, getattr(self, name), kind)


def positive(default: float) -> Any:
    """A finite number above 0."""
    return _number(default, "a finite number > 0", lambda x: x > 0)


def non_negative(default: float) -> Any:
    """A finite number, 0 or above."""
    return _number(default, "a finite number >= 0", lambda x: x >= 0)


def fraction(default: float) -> Any:
    """A number above 0, 1 or below."""
    return _number(default, "a number in (0, 1]", lambda x: 0 < x <= 1)


def number(default: float) -> Any:
    """A finite number."""
    return _number(default, "a finite number", lambda x: True)


def noise_rate(default: float, *, zero: bool = True) -> Any:
    """The assumed share of wrong labels: below one half, and above 0 if ``zero`` is not allowed."""
    expected = "a number in [0, 0.5)" if zero else "a number in (0, 0.5)"
    return _number(default, expected, lambda x: 0 <= x < 0.5 and (zero or x > 0))


def optional_number() -> Any:
    """A finite number or None, the default."""
    return _option(None, (Real, type(None)), "a finite number or None", lambda x: True)


def flag(default: bool) -> Any:
    """True or False."""
    return _option(default, (bool,), "True or False", lambda x: True)


def one_of(kind: Any) -> Any:
    """One of the words of a ``Literal``; the first is the default."""
    allowed = words(kind)
    expected = "one of " + ", ".join(map(repr, allowed))
    return _option(allowed[0], (str,), expected, lambda word: word in allowed)


def _number(default: float, expected: str, accepts: Callable[[float], bool]) -> Any:
    return _option(default, (Real,), expected, accepts)


def _option(
    default: Any, types: tuple[type, ...], expected: str, accepts: Callable[[Any], bool]
) -> Any:
    return field(default=default, metadata={KIND: Kind(types, expected, accepts)})


def kind_of(option: Any) -> Kind | None:
    """What one of the functions above gave, if it is that."""
    return option.metadata.get(KIND) if isinstance(option, Field) else None


def check(owner: str, option: str, value: Any, kind: Kind) -> None:
    """
    Args:
        kind: of one of the functions above.

    Raises:
        TypeError, ValueError: `value` is none of its kind; the message names owner and option.
    """
    # bool is a Real to Python, but beta=True is a slip.
    if not isinstance(value, kind.types) or (isinstance(value, bool) and bool not in kind.types):
        raise TypeError(f"{owner}: {option} is {value!r}, expected {kind.expected}")
    if (isinstance(value, Real) and not math.isfinite(value)) or not kind.accepts(value):
        raise ValueError(f"{owner}: {option} is {value!r}, expected {kind.expected}")
