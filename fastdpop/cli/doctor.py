"""``fastdpop doctor``."""

from __future__ import annotations

import argparse

NAME = "doctor"
ABOUT = "say what can be used here, what is missing, and which engine would run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Text or JSON."""
    parser.add_argument(
        "--json", action="store_true", help="the same as JSON, whose keys stay what they are"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    import json

    from fastdpop.doctor import facts, report

    found = facts()
    print(json.dumps(found, indent=2) if args.json else report(found))
    return 0
