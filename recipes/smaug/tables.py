"""Results of finished runs, by what was run, with their mean and spread over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.smaug.runs import BETA, BETAS, LAMBDA, LAMBDAS, UNTRAINED

Result = dict[str, Any]
"""A run's file."""
TITLES = {UNTRAINED: "untrained", "dpo": "DPO", "ipo": "IPO", "dpop": "DPOP"}


@dataclass(frozen=True)
class Arm:
    """What is repeated with several seeds."""

    data: str
    loss: str
    beta: float | None = BETA
    lam: float | None = None

    @staticmethod
    def of(data: str, loss: str, *, beta: float = BETA, lam: float = LAMBDA) -> Arm:
        """With the paper's beta and lambda, unless others are given."""
        if loss == UNTRAINED:
            return Arm(data, loss, None)
        return Arm(data, loss, beta, lam if loss == "dpop" else None)


Results = Mapping[Arm, Sequence[Result]]


@dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def text(self, form: str) -> str:
        """The mean and the half of the range, such as ``-1.20 ± 0.05``."""
        half = (self.high - self.low) / 2
        spread = f" ± {format(half, form.lstrip('+'))}" if len(self.values) > 1 else ""
        return (format(self.mean, form) + spread).replace("-", "\N{MINUS SIGN}")


def load(folder: Path) -> dict[Arm, list[Result]]:
    """The results in a folder, ordered by seed.

    Raises:
        ValueError: two runs differ in settings that are no part of what is compared.
    """
    found: dict[Arm, list[Result]] = {}
    seen: dict[tuple[Arm, int], str] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        settings = result["settings"]
        arm = Arm(*(settings[name] for name in ("data", "loss", "beta", "lam")))
        place = (arm, settings["seed"])
        if place in seen:
            raise ValueError(
                f"{folder}: {seen[place]} and {path.name} are the same run with other settings; keep one of them"
            )
        seen[place] = path.name
        found.setdefault(arm, []).append(result)
    for arm_results in found.values():
        arm_results.sort(key=lambda result: result["settings"]["seed"])
    return found


def side(pairs: str, of: str, what: str) -> Callable[[Any], float]:
    """What an evaluation says of the chosen or rejected completions of ``held_out`` or ``train`` pairs."""
    return lambda evaluation: evaluation[pairs][of][what]


def last(results: Sequence[Result], pick: Callable[[Any], float]) -> Spread:
    """A number of the last evaluation."""
    return Spread([pick(result["evaluations"][-1]) for result in results])


def course(
    results: Results, arm: Arm, pick: Callable[[Any], float]
) -> tuple[list[int], list[Spread]]:
    """A number of each evaluation, the untrained model's first: steps, and the spread over seeds."""
    before = {r["settings"]["seed"]: r for r in results.get(Arm.of(arm.data, UNTRAINED), [])}
    rows = [
        [*before[run["settings"]["seed"]]["evaluations"], *run["evaluations"]]
        for run in results[arm]
        if run["settings"]["seed"] in before
    ]
    steps = [evaluation["step"] for evaluation in rows[0]]
    return steps, [Spread([pick(row[i]) for row in rows]) for i in range(len(steps))]


COLUMNS: dict[str, tuple[Callable[[Any], float], str]] = {
    "held-out chosen": (side("held_out", "chosen", "change"), "+.1f"),
    "rejected": (side("held_out", "rejected", "change"), "+.1f"),
    "told apart": (lambda e: e["held_out"]["told_apart"], ".2f"),
    "per token": (side("held_out", "chosen", "per_token"), ".3f"),
    "after the edit": (side("held_out", "chosen", "after"), ".3f"),
    "train chosen": (side("train", "chosen", "change"), "+.1f"),
    "train per token": (side("train", "chosen", "per_token"), ".3f"),
}


def arms() -> Iterator[Arm]:
    """In the order of a table."""
    for data in ("gsm8k", "arc"):
        for loss in TITLES:
            yield Arm.of(data, loss)
    for beta in BETAS:
        if beta != BETA:
            yield Arm.of("gsm8k", "dpo", beta=beta)
            yield Arm.of("gsm8k", "dpop", beta=beta)
    for lam in LAMBDAS:
        if lam != LAMBDA:
            yield Arm.of("gsm8k", "dpop", lam=lam)


def summary(results: Results) -> str:
    """What the models are like at the end, as a Markdown table."""
    head = ["data", "loss", "beta", "lambda", *COLUMNS, "acc", "acc_norm", "CPU s"]
    rows = [head, ["---"] * len(head)]
    for arm in arms():
        found = results.get(arm)
        if not found:
            continue
        cells = [
            arm.data,
            TITLES[arm.loss],
            *("" if x is None else f"{x:g}" for x in (arm.beta, arm.lam)),
        ]
        for name, (pick, form) in COLUMNS.items():
            relative = arm.loss == UNTRAINED and (
                "chosen" in name or name in ("rejected", "told apart")
            )
            cells.append("" if relative else last(found, pick).text(form))
        for name in ("acc", "acc_norm"):
            asked = "questions" in found[0]
            cells.append(Spread([r["questions"][name] for r in found]).text(".3f") if asked else "")
        cells.append(Spread([r["seconds"]["cpu"] for r in found]).text(".0f"))
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
