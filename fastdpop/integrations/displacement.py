"""A warning, once a run: chosen completions become less likely while the model learns to tell them from rejected ones.

A loss of the difference of two log-ratios alone is content when both fall (arXiv:2402.13228, Section 3; likelihood
displacement, arXiv:2410.08847), and what trainers show looks well then: the loss falls, accuracy rises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LEAST_BATCHES = 8
"""Of a block, whose mean is looked at: a run's first steps go up and down by several nats."""
LEAST_PAIRS = 32
"""Of a block."""
BLOCKS = 3
"""In a row that must agree."""
LEAST_FALL = 1.0
"""In nats: less than this, a completion has hardly changed."""
STANDARD_ERRORS = 2.0
"""Of a mean, beyond which it is no chance."""


@dataclass(frozen=True)
class Finding:
    """What a :class:`Watch` has found, over its last blocks.

    Attributes:
        first, last: mean chosen log-ratio of the first and the last block, in nats.
        accuracy: share of pairs whose chosen reward is the greater one.
        pairs: how many there were.
    """

    first: float
    last: float
    accuracy: float
    pairs: int

    def message(self, step: int) -> str:
        """What it means and what to try, for a user."""
        times = f"{math.exp(min(-self.last, 700.0)):.3g}"
        return (
            f"fastdpop: chosen completions are becoming less likely. Over the last {self.pairs} training pairs, up to "
            f"step {step}, their log-ratio (policy minus reference) went from {self.first:+.1f} to {self.last:+.1f} "
            f"nats: the model gives them {times} times less probability than the reference does, although it tells "
            f"them from rejected ones in {self.accuracy:.0%} of the pairs. The loss sees the difference of the two "
            "alone, and rejected ones fall faster. To try: DPO-Positive (loss_type 'dpop', or a greater dpop_lambda), "
            "an SFT term beside the loss (loss_type ['sigmoid', 'sft'] with loss_weights), a lower learning rate. "
            "`fastdpop analyze` shows in which tokens and pairs it happens. This is said once a run; "
            "warn_displacement=False turns it off."
        )


@dataclass
class _Block:
    """Chosen log-ratios of some batches in a row: how many, their sum, squares around their mean; hits of accuracy."""

    batches: int = 0
    pairs: int = 0
    total: float = 0.0
    squares: float = 0.0
    accurate: float = 0.0

    def add(self, pairs: int, mean: float, squares: float, accurate: float) -> None:
        if self.pairs:
            both = self.pairs + pairs
            self.squares += (mean - self.mean) ** 2 * self.pairs * pairs / both
        self.batches += 1
        self.pairs += pairs
        self.total += pairs * mean
        self.squares += squares
        self.accurate += accurate

    @property
    def mean(self) -> float:
        return self.total / self.pairs

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return math.sqrt(self.squares / ((self.pairs - 1) * self.pairs))

    @property
    def full(self) -> bool:
        return self.batches >= LEAST_BATCHES and self.pairs >= LEAST_PAIRS

    @property
    def has_fallen(self) -> bool:
        return self.mean < -max(LEAST_FALL, STANDARD_ERRORS * self.error)


@dataclass
class Watch:
    """Looks at the training batches of a run, which has a reference, one after another.

    It finds that chosen completions fall for good, while accuracy has risen, where in each of the last three blocks of
    at least eight batches and 32 pairs the mean chosen log-ratio is below 0 by more than a nat and two standard errors,
    the last lower than the first; and over these blocks the accuracy is above a half by two standard errors. A policy
    that equals its reference begins with log-ratios of 0 and an accuracy of chance.
    """

    _blocks: list[_Block] = field(default_factory=lambda: [_Block()])
    _found: bool = False

    def add(self, pairs: int, mean: float, squares: float, accurate: float) -> Finding | None:
        """Take a batch in; what it shows, the first time that it shows it.

        Args:
            pairs: how many it has, of all processes.
            mean: their mean chosen log-ratio, in nats.
            squares: the sum of the squares of their log-ratios' distances from that mean.
            accurate: how many have a greater reward for chosen than for rejected.
        """
        if self._found or pairs == 0:
            return None
        self._blocks[-1].add(pairs, mean, squares, accurate)
        if not self._blocks[-1].full:
            return None
        blocks = self._blocks[-BLOCKS:]
        self._blocks = [*blocks, _Block()]
        found = self._finding(blocks) if len(blocks) == BLOCKS else None
        self._found = found is not None
        return found

    @staticmethod
    def _finding(blocks: list[_Block]) -> Finding | None:
        pairs = sum(block.pairs for block in blocks)
        accuracy = sum(block.accurate for block in blocks) / pairs
        falls = all(block.has_fallen for block in blocks) and blocks[-1].mean < blocks[0].mean
        if not falls or accuracy < 0.5 + STANDARD_ERRORS * 0.5 / math.sqrt(pairs):
            return None
        return Finding(blocks[0].mean, blocks[-1].mean, accuracy, pairs)
