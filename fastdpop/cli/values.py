"""What an argument's text stands for; each raises ``ArgumentTypeError`` for a text that is nothing."""

from __future__ import annotations

import argparse

from fastdpop.train.options import MOST_THREADS


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    value = above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than 1")
    return value


def threads(text: str) -> int:
    """A number of threads that a machine may have."""
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text} is more than {MOST_THREADS} threads")
    return value
