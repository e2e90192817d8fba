"""Runs side by side, each once: what is finished is not done again."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from recipes.smaug.data import Source
from recipes.smaug.runs import Run
from recipes.smaug.training import Loader, perform, result_file


def missing(runs: Iterable[Run], folder: Path) -> list[Run]:
    """Those that have no result yet, each once."""
    return [run for run in dict.fromkeys(runs) if not result_file(folder, run).exists()]


def perform_all(
    runs: Sequence[Run], source: Source, folder: Path, load: Loader, *, jobs: int, threads: int
) -> list[str]:
    """Do what is missing, untrained runs first; one line for each that ends.

    Args:
        runs: training runs; the untrained ones that they are compared with come along.
        source: of their data.
        folder: of the results.
        load: gives the model; a function of a module, since other processes call it.
        jobs: processes side by side, each with `threads` threads.

    Returns:
        What went wrong, a line for each run that has failed; the others are done all the same.
    """
    failures: list[str] = []
    untrained = [run.untrained() for run in runs]
    # A reference that is missing is scored again, and the numbers that came with it.
    for first in untrained:
        if not (folder / "references" / f"{first.key}.pt").exists() and missing(
            (run for run in runs if run.untrained() == first), folder
        ):
            result_file(folder, first).unlink(missing_ok=True)
    # A thread that waits for the next product would take the other process's core.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for part in (untrained, runs):
            todo = missing(part, folder)
            futures = {
                pool.submit(perform, run, source, folder, load, threads): run for run in todo
            }
            failures += _reported(futures, len(missing([*untrained, *runs], folder)))
            if failures:
                pool.shutdown(cancel_futures=True)
                break
    return failures


def _reported(futures: dict[Future[float], Run], left: int) -> list[str]:
    failures = []
    for future in as_completed(futures):
        name = futures[future].name
        left -= 1
        try:
            said = f"{name}: {future.result():.0f} s"
        except Exception as error:
            said = f"{name}: {type(error).__name__}: {error}"
            failures.append(said)
        print(f"{time.strftime('%H:%M:%S')} {said}; {left} runs left", file=sys.stderr, flush=True)
    return failures
