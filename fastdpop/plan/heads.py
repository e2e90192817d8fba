"""Memory and time of the lm_head, as it was measured on an H200.

``bench/results/h200.md`` has peaks of 2,048 and 8,192 scored rows and times of 8,192 rows, of the heads
of Llama 3 8B, Qwen3 8B and Gemma 2 2B, in bfloat16. The formulas below are what these peaks consist
of, and a test compares them; the shares of the GPU's peak rate are those of Llama 3 8B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MIB = 2**20
_TILE = 256  # columns of the forward product's tiles


@dataclass(frozen=True)
class Rows:
    """What goes through the head.

    Attributes:
        scored: rows that are scored; all: those of prompts and padding, too.
        pair: all rows of one pair.
        vocabulary, width: of the weight ``(V, H)``, on a tensor-parallel rank a part of V.
        trained: whether the weight is; copied: whether its gradient is rounded to 16 bits at the
            end. If not, it is a float32 weight, of which a 16-bit copy is taken at the beginning.
        workspace: bytes that bound fastdpop's scratch memory.
    """

    scored: float
    all: float
    pair: float
    vocabulary: int
    width: int
    trained: bool
    copied: bool
    workspace: float

    @property
    def weights(self) -> float:
        """Of the head."""
        return float(self.vocabulary * self.width)


def _fastdpop(rows: Rows) -> float:
    """The rows' copies, what is kept of a chunk's softmax, and float32 gradients; then the copy of
    the weight's.
    """
    n, width = rows.scored, rows.width
    partial = 8 * -(-rows.vocabulary // _TILE) + 64
    at_once = min(n, max(1, rows.workspace // (2 * rows.vocabulary + 8 * width + partial)))
    chunk = at_once * (2 * rows.vocabulary + partial)
    if not rows.trained:
        return chunk + 4 * at_once * width + 4 * n * width
    during = (4 if rows.copied else 6) * rows.weights + chunk + 8 * n * width
    after = (6 if rows.copied else 4) * rows.weights + 8 * n * width
    return max(during, after)


def _logits(rows: Rows) -> float:
    """Logits in 16 bits and in float32, and the latter's gradient, or log-softmax: 12 bytes each."""
    return 12 * rows.all * rows.vocabulary + 2 * rows.all * rows.width * rows.trained


def _trl(rows: Rows) -> float:
    """Fixed tiles of logits; gradients of the weight in float32, and their copy."""
    return 42 * _MIB + 10.7 * rows.scored * rows.width + 6 * rows.weights * rows.trained


def _liger(rows: Rows) -> float:
    """A pair's logits, whole, in several copies; gradients of the weight in its own type, their sum
    and a pair's.
    """
    logits, weights = rows.pair * rows.vocabulary, rows.weights * rows.trained
    return max(14 * logits + 2 * weights, 10 * logits + 4 * weights) + 2 * rows.all * rows.width


@dataclass(frozen=True)
class Head:
    """A way to get from hidden states to a loss and gradients.

    Attributes:
        memory: its peak in bytes, gradients included.
        products: matrix products for a frozen and for a trained head.
        rate: share of the GPU's peak rate that these reach together, frozen and trained.
        start: seconds that it takes beside, however few the rows.
        all_rows: prompts and padding go through, too.
    """

    memory: Callable[[Rows], float]
    products: tuple[int, int]
    rate: tuple[float, float]
    start: tuple[float, float] = (0.0, 0.0)
    all_rows: bool = False

    def flop(self, rows: Rows) -> float:
        """Floating-point operations."""
        count = rows.all if self.all_rows else rows.scored
        return 2 * count * rows.weights * self.products[rows.trained]

    def seconds(self, rows: Rows, peak: float) -> float:
        """At `peak` operations a second."""
        return self.start[rows.trained] + self.flop(rows) / (self.rate[rows.trained] * peak)


HEADS = {
    "fastdpop": Head(_fastdpop, (2, 3), (0.62, 0.65), start=(2e-3, 5.4e-3)),
    "logits in float32": Head(_logits, (2, 3), (0.44, 0.50), all_rows=True),
    "TRL's chunks": Head(_trl, (3, 4), (0.607, 0.607)),
    "Liger's chunks": Head(_liger, (3, 3), (0.517, 0.369), all_rows=True),
}
"""Fastdpop's rates and starts are those of 2,048, 8,192 and 32,768 rows; the others were measured at 8,192
rows alone. TRL's rate for a frozen head was not: it is the trained one's.
"""

FORWARD_RATE, FORWARD_START = 0.62, 1.2e-3
"""Of log-probs alone, for a reference in every step."""
