"""What an argument's text stands for; each raises ``ArgumentTypeError`` for a text that is nothing."""

from __future__ import annotations

import argparse
import ast
import math
from typing import Any

MOST_THREADS = 1024


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def threads(text: str) -> int:
    """A number of threads that a machine may have."""
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text} is more than {MOST_THREADS} threads")
    return value


def positive_real(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def option(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, the value as Python writes it, or else as a word."""
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word, such as form=outside
