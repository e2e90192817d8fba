"""When a fall of the chosen log-ratio is one, and when it is noise."""

from __future__ import annotations

import random

import pytest

from fastdpop.integrations.displacement import Finding, Watch

# Of `fastdpop demo`, as it was logged: mean chosen log-ratio of the 4 training pairs of each step, and how many of them
# were told apart. Two warm-up steps of bfloat16 change nothing; the third is the same in both.
DPO = [
    0.0, 0.0, -4.05, -2.67, -3.35, -3.34, -1.44, -1.76, -3.12, -2.6, -1.43, -3.11, -2.34, -1.76,
    -2.64, -3.06, -3.91, -3.78, -3.21, -6.44, -3.17, -4.99, -3.32, -5.08, -5.22, -7.8, -6.09,
    -5.54, -7.15, -10.27, -6.09, -8.33, -8.61, -10.72, -6.98, -10.13, -5.98, -7.65, -7.29, -10.19,
]  # fmt: skip
DPO_HITS = [
    0, 0, 3, 4, 4, 4, 4, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 4, 4, 4, 3, 4, 4, 4, 4, 4, 4, 4, 3,
    4, 4, 4, 4, 4, 4, 4, 4,
]  # fmt: skip
DPOP = [
    0.0, 0.0, -4.05, 2.97, 4.61, 5.15, 4.54, 4.07, 6.79, 3.53, 4.63, 3.89, 4.55, 5.19, 5.45, 6.97,
    3.56, 5.0, 2.98, 4.0, 4.39, 6.39, 4.13, 3.31, 4.25, 4.67, 5.18, 2.93, 4.0, 3.0, 4.55, 5.84,
    3.56, 7.15, 9.16, 8.16, 6.49, 9.39, 5.42, 4.37,
]  # fmt: skip
DPOP_HITS = [
    0, 0, 3, 4, 4, 4, 4, 3, 4, 4, 4, 3, 4, 4, 4, 4, 4, 4, 4, 3, 4, 4, 4, 3, 4, 4, 4, 4, 4, 4, 4, 3,
    4, 4, 4, 4, 4, 4, 4, 4,
]  # fmt: skip

Batch = tuple[int, float, float, float]


def watched(batches: list[Batch]) -> list[tuple[int, Finding]]:
    watch = Watch()
    found = [(step, watch.add(*batch)) for step, batch in enumerate(batches, 1)]
    return [(step, finding) for step, finding in found if finding is not None]


def of_pairs(logratios: list[float], hits: float) -> Batch:
    """A batch with these chosen log-ratios."""
    mean = sum(logratios) / len(logratios)
    return len(logratios), mean, sum((x - mean) ** 2 for x in logratios), hits


def test_the_demo() -> None:
    """The pairs of a step are 3 nats apart, as it was there."""
    dpo = [(4, mean, 27.0, hits) for mean, hits in zip(DPO, DPO_HITS, strict=True)]
    ((step, found),) = watched(dpo)
    assert step == 24  # of 40, after which held-out chosen log-probs had fallen by 11 nats
    assert found.first == pytest.approx(sum(DPO[:8]) / 8)
    assert found.last == pytest.approx(sum(DPO[16:24]) / 8)
    assert (found.accuracy, found.pairs) == (sum(DPO_HITS[:24]) / 96, 96)
    assert watched([(4, m, 27.0, h) for m, h in zip(DPOP, DPOP_HITS, strict=True)]) == []


def test_a_message_says_what_it_means_in_numbers() -> None:
    text = Finding(-2.08, -4.24, 0.95, 96).message(24)
    for part in (
        "96 training pairs",
        "step 24",
        "from -2.1 to -4.2 nats",
        "69.4 times less",
        "95%",
    ):
        assert part in text
    for advice in ("'dpop'", "dpop_lambda", "'sft'", "learning rate", "fastdpop analyze"):
        assert advice in text
    assert "warn_displacement=False" in text
    assert "inf" not in Finding(-2.0, -5000.0, 1.0, 96).message(9)


def falling(batch: int, steps: int, per_step: float, spread: float, seed: int = 0) -> list[Batch]:
    chance = random.Random(seed)
    return [
        of_pairs([-per_step * t + chance.gauss(0, spread) for _ in range(batch)], batch)
        for t in range(steps)
    ]


@pytest.mark.parametrize("batch", [1, 4, 64, 512])
def test_any_size_of_batches(batch: int) -> None:
    """A block has at least 8 batches and 32 pairs."""
    ((step, found),) = watched(falling(batch, 150, 0.2, 0.3))
    size = max(8, 32 // batch)
    assert step % size == 0
    assert found.pairs == 3 * size * batch
    # The first of the three blocks is the first with a mean below -1: half a block before its end.
    blocks = next(n for n in range(1, 9) if 0.2 * (size * (n - 0.5) - 0.5) > 1.0)
    assert step == (blocks + 2) * size


def test_said_once() -> None:
    assert len(watched(falling(4, 1000, 0.1, 1.0))) == 1


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_none(seed: int) -> None:
    """Log-ratios that stay around 0, of pairs that differ by as much as a run's, and of batches of 1."""
    chance = random.Random(seed)
    batches = [of_pairs([chance.gauss(0.0, 5.0)], chance.random() < 0.9) for _ in range(2000)]
    assert watched(batches) == []


def test_first_steps_that_go_back_are_none() -> None:
    """Down to -4 nats in 16 steps of warm-up, and up again."""
    dip = [(8, -4.0, 8.0, 8.0)] * 16 + [(8, 0.5, 8.0, 8.0)] * 200
    assert watched(dip) == []


def test_a_recovery_is_none() -> None:
    """Blocks that are below, each less than the one before."""
    assert watched([(8, -60.0 + t, 8.0, 8.0) for t in range(60)]) == []


def test_accuracy_of_chance_is_none() -> None:
    """The model changes, but not by its preferences."""
    assert watched([(8, -0.2 * t, 8.0, 4.0) for t in range(200)]) == []
    assert len(watched([(8, -0.2 * t, 8.0, 6.0) for t in range(200)])) == 1


def test_less_than_a_nat_is_none() -> None:
    assert watched([(8, -0.9 - 0.0001 * t, 0.1, 8.0) for t in range(200)]) == []


def test_batches_without_pairs_and_without_numbers() -> None:
    batches = [(0, 0.0, 0.0, 0.0), (8, float("nan"), 0.0, 8.0)] * 50
    assert watched(batches) == []
