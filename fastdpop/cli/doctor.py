"""``fastdpop doctor``."""

from __future__ import annotations

import argparse

NAME = "doctor"
ABOUT = "say which engine would run here, and why"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(_: argparse.Namespace) -> int:
    """Print the report."""
    from fastdpop.doctor import report

    print(report())
    return 0
