"""GSM8K's problems, and the wrong answers that the DPOP paper makes of its right ones."""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from fractions import Fraction
from importlib import resources
from typing import Any

from fastdpop.data.arithmetic import (
    NUMBER,
    Result,
    as_arithmetic,
    can_be_made_wrong,
    evaluate,
    is_right,
    made_wrong,
    numbers_in,
    value_of,
)
from fastdpop.data.read import read_json

_ANNOTATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_BARE = re.compile(rf"\W*{NUMBER}\W*")
_SHOWN = re.compile(rf"({NUMBER})(?![\d.,]*\d)")


def shipped_problems(split: str) -> list[dict[str, Any]]:
    """The package's excerpt of GSM8K: ``question`` and ``answer`` of 300 ("train") or 60 ("test")."""
    path = resources.files("fastdpop") / "assets" / f"gsm8k-{split}.jsonl"
    with resources.as_file(path) as file:
        return [row.fields for row in read_json(file)]


def shipped_pairs(split: str, seed: int = 0) -> list[dict[str, str]]:
    """Text pairs of the shipped problems: solutions against themselves with one result made wrong.

    ``seed`` chooses which, and how. Problems that :func:`corrupt` cannot make wrong are left out.
    """
    rng = random.Random(seed)
    pairs = []
    for problem in shipped_problems(split):
        rejected = corrupt(problem["answer"], rng)
        if rejected is not None:
            chosen = without_annotations(problem["answer"])
            pairs.append({"prompt": problem["question"], "chosen": chosen, "rejected": rejected})
    return pairs


def without_annotations(answer: str) -> str:
    """A GSM8K answer as a reader sees it: ``48/2 = <<48/2=24>>24`` becomes ``48/2 = 24``."""
    return _ANNOTATION.sub("", answer)


def annotated_results(answer: str, *, final: Collection[Fraction] = ()) -> list[Result]:
    """The intermediate results of a GSM8K answer, at their places in ``without_annotations(answer)``.

    GSM8K marks every result with a calculator annotation. The last one is the final answer's and not
    among these, nor is one that its calculation contradicts, or that the text does not repeat.

    Args:
        answer: the solution with its annotations.
        final: values of the final answer. Where the last annotation does not calculate it, but says it
            again (``<<250=250>>``) or has another value, a result with one of these values may be the
            calculation of the answer, and is not among the results either.
    """
    results = []
    marks = [*_ANNOTATION.finditer(answer)]
    if marks and _calculates(marks[-1], final):
        final = ()
    for mark in marks[:-1]:
        calculation, written = mark.groups()
        shown = _SHOWN.match(answer, mark.end())
        if not shown or shown[1].replace(",", "") != written.replace(",", "").strip():
            continue
        if not can_be_made_wrong(shown[1]) or value_of(shown[1]) in final:
            continue
        truth = evaluate(as_arithmetic(calculation))
        if truth is None or is_right(shown[1], truth):
            start = len(without_annotations(answer[: mark.end()]))
            results.append(Result(start, shown[1], truth))
    return results


def _calculates(mark: re.Match[str], final: Collection[Fraction]) -> bool:
    calculation, written = mark.groups()
    return not _BARE.fullmatch(calculation) and not {*numbers_in(written)}.isdisjoint(final)


def corrupt(answer: str, rng: random.Random) -> str | None:
    """Make one intermediate result of a GSM8K answer wrong; leave all else, the answer included.

    Returns:
        The corrupted answer without annotations, to set against ``without_annotations(answer)``;
        None without an intermediate result, see :func:`annotated_results`.
    """
    results = annotated_results(answer)
    if not results:
        return None
    return made_wrong(rng.choice(results), rng).applied(without_annotations(answer))
