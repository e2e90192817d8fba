"""Peak extra memory as batches and vocabularies grow, in bf16: `make bench` draws it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contenders import contender
from bench.memory import peak_extra_bytes, release_freed_memory
from bench.test_loss import require
from bench.workloads import LOSSES, MODES, Batch, Shape, small

LENGTHS = (128, 256, 512, 1_024)
VOCABULARIES = (16_384, 32_768, 65_536, 131_072, 262_144)


class Series(NamedTuple):
    """A contender (fastdpop's best engine where None), what is trained, and the longest completion
    it is given: beyond, it takes minutes, or more memory than a laptop has.
    """

    name: str | None
    mode: str
    longest: int = LENGTHS[-1]

    def __str__(self) -> str:
        return f"{self.name or 'fastdpop'}, {self.mode}"


TRAINED, FROZEN = MODES[:2]
SERIES = [
    Series("gather, fp32 upcast", TRAINED, 512),
    Series("gather, fp32 upcast", FROZEN, 512),
    Series("TRL, scored rows", TRAINED, 256),
    Series("TRL, scored rows", FROZEN, 256),
    Series("Liger", TRAINED, 256),
    Series("Liger", FROZEN, 256),
    Series(None, TRAINED),
    Series(None, FROZEN),
]

OVER_ROWS = [
    pytest.param(length, line, id=f"{line}, completions of {length:,}")
    for length in LENGTHS
    for line in SERIES
    if length <= line.longest
]
OVER_VOCABULARY = [
    pytest.param(vocabulary, line, id=f"{line}, V {vocabulary:,}")
    for vocabulary in VOCABULARIES
    for line in SERIES
]


def measure(
    benchmark: BenchmarkFixture, series: str, shape: Shape, line: Series, auto: str, device: str
) -> dict[str, Any]:
    name = line.name or auto
    require(name)
    release_freed_memory()
    batch = Batch.random(shape, torch.bfloat16, device)
    batch.start(line.mode)

    def step() -> torch.Tensor:
        return contender(name).run(batch, line.mode, LOSSES["dpo"])

    peak, _ = benchmark.pedantic(lambda: peak_extra_bytes(step, device), rounds=1)
    gradients = sum(t.grad.nbytes for t in (batch.hidden, batch.weight) if t.grad is not None)
    row = {
        "kind": "memory",
        "series": series,
        "contender": name,
        "mode": line.mode,
        "scored_rows": len(batch.rows),
        "vocabulary": len(batch.weight),
        "peak_extra_bytes": peak,
        # dHidden of the scored rows in fp32 comes before the one that is handed out.
        "gradient_bytes": gradients + 4 * batch.rows.numel(),
    }
    benchmark.extra_info.update(row)
    return row


@pytest.mark.parametrize(("completion", "line"), OVER_ROWS)
def test_over_rows(
    benchmark: BenchmarkFixture,
    rows: list[dict[str, Any]],
    quick: bool,
    device: str,
    fastdpop: str,
    completion: int,
    line: Series,
) -> None:
    """8 pairs; completions double from 128 to 1,024 tokens, V 49,152."""
    shape = Shape(8, 16, completion)
    rows.append(
        measure(benchmark, "rows", small(shape) if quick else shape, line, fastdpop, device)
    )


@pytest.mark.parametrize(("vocabulary", "line"), OVER_VOCABULARY)
def test_over_vocabulary(
    benchmark: BenchmarkFixture,
    rows: list[dict[str, Any]],
    quick: bool,
    device: str,
    fastdpop: str,
    vocabulary: int,
    line: Series,
) -> None:
    """2 pairs of 64 tokens a completion; the vocabulary doubles from 16,384 to 262,144."""
    shape = Shape(2, 16, 64, vocabulary=vocabulary)
    rows.append(
        measure(benchmark, "vocabulary", small(shape) if quick else shape, line, fastdpop, device)
    )
