"""Which runs there are, and with what settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from fastdpop import losses

BETA, LAMBDA = 0.3, 50.0
"""The paper's, for all runs that do not vary them."""
BETAS = (0.1, 0.3, 1.0)
LAMBDAS = (0.5, 5.0, 50.0, 500.0)
"""Beside 0, which is DPO."""
SEEDS = (0, 1)
UNTRAINED = "untrained"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How runs on a data set are trained and watched. A group is the pairs of one prompt.

    Attributes:
        steps: optimizer steps.
        groups: groups a step.
        learning_rate: AdamW's, constant after a linear warmup of `warmup` steps.
        clip: greatest norm of the gradient.
        every: steps between evaluations.
        held_out: held-out groups that are watched; train: groups of the training data.
        max_tokens: groups with a pair of more are not used.
        questions: whether the multiple-choice questions of the test split are answered at the end.
    """

    steps: int
    groups: int
    learning_rate: float
    every: int
    held_out: int
    train: int
    warmup: int = 8
    clip: float = 1.0
    max_tokens: int = 160
    questions: bool = False


SCHEDULES = {
    "gsm8k": Schedule(steps=40, groups=4, learning_rate=2e-5, every=10, held_out=64, train=40),
    "arc": Schedule(
        steps=48, groups=16, learning_rate=5e-5, every=12, held_out=24, train=24, questions=True
    ),
}
# Of 60 problems.
QUICK = {"gsm8k": replace(SCHEDULES["gsm8k"], held_out=48)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, or, with the loss ``"untrained"``, what the model does before it.

    Attributes:
        data: a key of :data:`SCHEDULES`.
        loss: a name of ``fastdpop.losses``, or ``"untrained"``.
        beta, lam: the loss's; None where it has none.
        seed: of the data's order and of what is made wrong in rejected completions.
        source: what the data came from (:meth:`recipes.smaug.data.Source.identity`).
        precision: ``"bfloat16"`` (autocast) or ``"float32"``.
    """

    data: str
    loss: str
    beta: float | None = None
    lam: float | None = None
    seed: int
    schedule: Schedule
    source: str
    precision: str

    @property
    def name(self) -> str:
        """For people, and for ``--only``."""
        parts = [self.data, self.loss]
        if self.beta is not None:
            parts.append(f"beta{self.beta:g}")
        if self.lam is not None:
            parts.append(f"lambda{self.lam:g}")
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def key(self) -> str:
        """The name of the run's files: other settings give another key."""
        settings = json.dumps(asdict(self), sort_keys=True).encode()
        return f"{self.name}-{hashlib.sha256(settings).hexdigest()[:8]}"

    def untrained(self) -> Run:
        """The run that scores what this one is compared with."""
        return Run(
            data=self.data,
            loss=UNTRAINED,
            seed=self.seed,
            schedule=self.schedule,
            source=self.source,
            precision=self.precision,
        )

    def make_loss(self) -> losses.PreferenceLoss:
        """IPO is Azar et al.'s, of sums over tokens; TRL divides them by lengths."""
        if self.loss == "dpop":
            return losses.get("dpop", beta=self.beta, lam=self.lam)
        options = {"average": False} if self.loss == "ipo" else {}
        return losses.get(self.loss, beta=self.beta, **options)


def chosen_runs(
    identities: dict[str, str], precision: str, *, quick: bool = False
) -> Iterator[Run]:
    """All runs, those first that most depends on.

    Args:
        identities: of each data set that there is.
        precision: of every run.
        quick: only figure 2's on GSM8K, with one seed.
    """

    def run(data: str, loss: str, seed: int, beta: float = BETA, lam: float = LAMBDA) -> Run:
        return Run(
            data=data,
            loss=loss,
            beta=beta,
            lam=lam if loss == "dpop" else None,
            seed=seed,
            schedule=(QUICK if quick else SCHEDULES)[data],
            source=identities[data],
            precision=precision,
        )

    seeds = SEEDS[:1] if quick else SEEDS
    for seed in seeds:
        for data in identities:
            for loss in ("dpo", "dpop", "ipo"):
                yield run(data, loss, seed)
    if quick:
        return
    for seed in seeds:
        for beta in BETAS:
            if beta != BETA:
                yield run("gsm8k", "dpo", seed, beta)
                yield run("gsm8k", "dpop", seed, beta)
        for lam in LAMBDAS:
            if lam != LAMBDA:
                yield run("gsm8k", "dpop", seed, lam=lam)
