"""Time, peak memory and error of a step through the head, against the bare products: `make bench`.

The floor is timed before every round of a contender, so that both see the same machine.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case
from bench.contenders import FLOOR, Floor, contender
from bench.memory import peak_extra_bytes, release_freed_memory
from bench.workloads import DTYPES, LOSSES, MODES, Batch, Shape

SECONDS = {"cpu": 2.0, "cuda": 1.0}
"""What the timed rounds of a contender should take, without the floor's, within these bounds."""
ROUNDS = range(3, 21)


@functools.lru_cache(maxsize=1)
def batch_and_floor(shape: Shape, dtype: str, device: str) -> tuple[Batch, Floor]:
    release_freed_memory()
    batch = Batch.random(shape, DTYPES[dtype], device)
    _ = batch.exact
    return batch, Floor(batch)


def require(name: str) -> None:
    package = contender(name).needs
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{name} needs {package}: pip install '.[bench]'")


def test_step(
    benchmark: BenchmarkFixture,
    rows: list[dict[str, Any]],
    shapes: dict[str, Shape],
    quick: bool,
    device: str,
    case: Case,
) -> None:
    """One line of the big table."""
    batch, floor = batch_and_floor(shapes[case.workload], case.dtype, device)
    loss = LOSSES[case.loss or "dpop"]
    benchmark.group = f"{case.workload}, {case.dtype}, {case.mode}"
    is_floor = case.contender == FLOOR
    compiles = False
    if case.loss:
        require(case.contender)
        compiles = contender(case.contender).compiles

    def step() -> torch.Tensor | None:
        logps = None
        if is_floor:
            floor.run(case.mode)
        elif not case.loss:
            floor.run_as_written(case.mode)
        else:
            logps = contender(case.contender).run(batch, case.mode, loss)
        if device == "cuda":
            torch.cuda.synchronize()
        return logps

    def timed(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    # Warm-up: to compile, to measure memory, and to plan the rounds.
    batch.start(case.mode)
    if compiles:
        step()
        batch.start(case.mode)
    peak, logps = peak_extra_bytes(step, device)
    errors = {} if logps is None else batch.errors(logps, loss)
    batch.start(case.mode)
    estimate = timed(step)
    rounds = max(ROUNDS[0], min(math.ceil(SECONDS[device] / estimate), ROUNDS[-1]))
    if quick or estimate > 4.0:
        rounds = 1 if quick else 2

    floor_times: list[float] = []

    def before_a_round() -> None:
        batch.start(case.mode)
        if not is_floor:
            floor_times.append(timed(lambda: floor.run(case.mode)))

    benchmark.pedantic(step, setup=before_a_round, rounds=rounds)
    batch.start(case.mode)
    if benchmark.disabled:
        return
    times = benchmark.stats.stats.data
    floor_times = floor_times or times
    row = {
        "kind": "step",
        **case._asdict(),
        "scored_rows": len(batch.rows),
        "distinct_rows": len(batch.rows) - batch.repeated,
        "rounds": rounds,
        "seconds": statistics.median(times),
        "floor_seconds": statistics.median(floor_times),
        "to_floor": statistics.median(t / f for t, f in zip(times, floor_times, strict=True)),
        "peak_extra_bytes": peak,
        **errors,
    }
    benchmark.extra_info.update(row)
    rows.append(row)


def test_weight_gradient_of_many_pairs(
    benchmark: BenchmarkFixture,
    rows: list[dict[str, Any]],
    shapes: dict[str, Shape],
    device: str,
    summed_by: str,
) -> None:
    """dWeight in bf16 after 128 pairs of DPO: does its error grow with the number of pairs?"""
    require(summed_by)
    batch, _ = batch_and_floor(shapes["128 pairs"], "bf16", device)
    batch.start(MODES[0])
    loss = LOSSES["dpo"]
    logps = benchmark.pedantic(lambda: contender(summed_by).run(batch, MODES[0], loss), rounds=1)
    row = {
        "kind": "gradient",
        "contender": summed_by,
        "pairs": len(batch.labels) // 2,
        **batch.errors(logps, loss),
    }
    batch.start(MODES[0])
    benchmark.extra_info.update(row)
    rows.append(row)
