"""The DPOP paper's experiments on SmolLM2-135M: ``python -m recipes.smaug --help``."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from fastdpop.demo import load_smollm2
from fastdpop.doctor import has_bf16
from recipes.smaug import figures, tables
from recipes.smaug.data import FOLDERS, Source
from recipes.smaug.runner import missing, perform_all
from recipes.smaug.runs import chosen_runs
from recipes.smaug.training import Loader


def main(arguments: Sequence[str] | None = None, load: Loader = load_smollm2) -> int:
    """Do the runs that are missing, then draw and tabulate what is there.

    Returns:
        0, or 1 if a run failed or a user's mistake was found.
    """
    options = _parser().parse_args(arguments)
    try:
        return _main(options, load)
    except (ValueError, OSError, ImportError) as error:
        print(f"recipes.smaug: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.smaug", description=__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--quick",
        action="store_true",
        help="DPO, IPO and DPOP on the GSM8K problems that the package brings along, one seed",
    )
    where.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="take the data sets from DIR/gsm8k and DIR/arc_challenge (train.jsonl, test.jsonl), not from the Hub",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="for results and pictures; default: build/smaug, or build/smaug-quick",
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="only runs whose name matches, such as 'gsm8k-dpo-*'"
    )
    parser.add_argument("--jobs", type=_count, default=2, help="runs side by side (default: 2)")
    parser.add_argument(
        "--threads", type=_count, default=1, help="threads of each of them (default: 1)"
    )
    parser.add_argument("--list", action="store_true", help="only say what there is to do")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _main(options: argparse.Namespace, load: Loader) -> int:
    source = _source(options)
    folder = options.output or Path("build", "smaug-quick" if options.quick else "smaug")
    identities = {data: source.identity(data) for data in source.data_sets()}
    precision = "bfloat16" if has_bf16() else "float32"
    runs = list(chosen_runs(identities, precision, quick=options.quick))
    if options.only:
        runs = [run for run in runs if fnmatch.fnmatchcase(run.name, options.only)]
        if not runs:
            raise ValueError(f"--only {options.only!r} matches no run; --list shows their names")
    todo = missing([run for run in runs for run in (run.untrained(), run)], folder)
    if options.list:
        for run in todo:
            print(run.name)
        return 0
    failures = []
    if todo:
        failures = perform_all(
            runs, source, folder, load, jobs=options.jobs, threads=options.threads
        )
    results = tables.load(folder)
    for path in figures.draw(results, folder):
        print(path)
    print(tables.summary(results))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _source(options: argparse.Namespace) -> Source:
    if options.data is None:
        return Source("excerpt" if options.quick else "hub")
    source = Source("folder", options.data)
    for data in FOLDERS:
        for split in ("train", "test"):
            if not source.file(data, split).is_file():
                raise ValueError(f"--data {options.data}: {source.file(data, split)} is missing")
    return source


if __name__ == "__main__":
    sys.exit(main())
