"""GSM8K's problems, and the wrong answers that the DPOP paper makes of its right ones."""

from __future__ import annotations

import random
import re
from decimal import Decimal
from importlib import resources
from typing import Any

from fastdpop.data.read import read_json

_ANNOTATION = re.compile(r"<<[^<>]*=([^<>=]*)>>")


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


def corrupt(answer: str, rng: random.Random) -> str | None:
    """Make one intermediate result of a GSM8K answer wrong; leave all else, the answer included.

    This is how the DPOP paper builds rejected completions from chosen ones (arXiv:2402.13228,
    Appendix D). GSM8K marks every result with a calculator annotation; the last one is the final
    answer's and is never touched.

    Returns:
        The corrupted answer without annotations, to set against ``without_annotations(answer)``;
        None without an intermediate result that is a plain number right after its annotation.
    """
    places = []
    for mark in list(_ANNOTATION.finditer(answer))[:-1]:
        shown = re.match(r"\d+(?:\.\d+)?(?![\d.,]*\d)", answer[mark.end() :])
        if shown and shown.group() == mark.group(1):
            places.append((mark.end(), shown.group()))
    if not places:
        return None
    start, right = rng.choice(places)
    errors = [e for e in (-10, -5, -3, -2, -1, 1, 2, 3, 5, 10) if Decimal(right) + e > 0]
    wrong = str(Decimal(right) + rng.choice(errors))
    end = start + len(right)
    return without_annotations(answer[:start]) + wrong + without_annotations(answer[end:])
