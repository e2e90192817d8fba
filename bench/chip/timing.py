"""How long one contender, launch or setting takes, beside the bare products."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.chip.setup import MATRIX_PRODUCTS, TRAINED, Setup, contender
from bench.contenders import FLOOR
from bench.memory import peak_extra_bytes
from bench.workloads import LOSSES, Batch

Row = dict[str, Any]
"""A line of a table; JSON."""

ROUNDS = range(3, 16)
"""The fewest rounds of a case, and the most."""


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds on the device between what was queued before and the end of `call`."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rounds_of(setup: Setup, estimate: float) -> int:
    """How many rounds of so many seconds, and as long for the bare products, fill a case."""
    return max(ROUNDS[0], min(math.ceil(setup.seconds / 2 / max(estimate, 1e-6)), ROUNDS[-1]))


class Products:
    """The bare products of a batch, each in the way that is fastest here.

    Attributes:
        best: the fastest way to each of logits, dHidden and dWeight.
        seconds: of every way.
    """

    def __init__(self, batch: Batch) -> None:
        device = batch.rows.device.type
        rows, weight = batch.rows, batch.weight.detach()
        (n, width), vocabulary = rows.shape, len(weight)
        self.flop = 2.0 * n * width * vocabulary
        memory = rows.new_empty(n * vocabulary)
        by_row, by_token = memory.view(n, vocabulary), memory.view(vocabulary, n)
        torch.mm(rows, weight.T, out=by_row)
        hidden, whole = torch.empty_like(rows), torch.empty_like(weight)
        mm = torch.mm
        ways: dict[str, dict[str, Callable[[], object]]] = {
            "logits": {
                "rows @ weight.T": lambda: mm(rows, weight.T, out=by_row),
                "weight @ rows.T": lambda: mm(weight, rows.T, out=by_token),
            },
            "dHidden": {
                "logits @ weight": lambda: mm(by_row, weight, out=hidden),
                "logits.T.T @ weight": lambda: mm(by_token.T, weight, out=hidden),
            },
            "dWeight": {
                "logits.T @ rows": lambda: mm(by_row.T, rows, out=whole),
                "logits.T, contiguous, @ rows": lambda: mm(by_token, rows, out=whole),
            },
        }
        if device == "cuda":  # torch on the CPU forms none in another dtype
            wide = torch.float32
            wide_hidden, wide_weight = (torch.empty_like(m, dtype=wide) for m in (rows, weight))
            wide_logits = torch.empty_like(by_row, dtype=wide)
            ways["logits"]["rows @ weight.T, fp32"] = lambda: mm(
                rows, weight.T, out_dtype=wide, out=wide_logits
            )
            ways["dHidden"]["logits @ weight, fp32"] = lambda: mm(
                by_row, weight, out_dtype=wide, out=wide_hidden
            )
            ways["dWeight"]["logits.T @ rows, fp32"] = lambda: mm(
                by_row.T, rows, out_dtype=wide, out=wide_weight
            )
            ways["dWeight"]["logits.T @ rows, fp32, added"] = lambda: torch.addmm(
                wide_weight, by_row.T, rows, out_dtype=wide, out=wide_weight
            )
        self.seconds: dict[str, dict[str, float]] = {}
        self.best: list[Callable[[], object]] = []
        for product, of_product in ways.items():
            for way in of_product.values():
                way()
            # Round by round, so that none has the cool chip to itself.
            times = [[timed(way, device) for way in of_product.values()] for _ in range(5)]
            medians = [statistics.median(each) for each in zip(*times, strict=True)]
            self.seconds[product] = dict(zip(of_product, medians, strict=True))
            self.best.append(list(of_product.values())[medians.index(min(medians))])

    def run(self, mode: str) -> None:
        """1, 2 or 3 matrix products, with nothing between them."""
        for way in self.best[: MATRIX_PRODUCTS[mode]]:
            way()


def bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [timed(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * len(source) / statistics.median(times)


def measure_step(setup: Setup, batch: Batch, floor: Products, mode: str, name: str) -> Row:
    """One contender: rounds beside the floor, peak memory, errors against float64."""
    who = None if name == FLOOR else contender(name)
    loss = LOSSES["dpop" if who is None else who.losses[0]]

    def step() -> Tensor | None:
        if who is None:
            floor.run(mode)
            return None
        return who.run(batch, mode, loss)

    try:
        batch.start(mode)
        step()  # compiles
        batch.start(mode)
        gc.collect()
        peak, logps = peak_extra_bytes(step, setup.device)
        errors = {} if logps is None else batch.errors(logps, loss)
        batch.start(mode)
        rounds = rounds_of(setup, timed(step, setup.device))
        times, floors = [], []
        for _ in range(rounds):
            batch.start(mode)
            floors.append(timed(lambda: floor.run(mode), setup.device))
            times.append(timed(step, setup.device))
    finally:
        batch.start(mode)
    seconds = statistics.median(times)
    return {
        "loss": "" if who is None else loss.name,
        "rounds": rounds,
        "seconds": seconds,
        "floor_seconds": statistics.median(floors),
        "to_floor": statistics.median(t / f for t, f in zip(times, floors, strict=True)),
        "tflops": MATRIX_PRODUCTS[mode] * floor.flop / seconds / 1e12,
        "peak_extra_bytes": peak,
        **errors,
    }


def launches(batch: Batch, floor: Products, mode: str, name: str) -> list[Row]:
    """The kernels of one step, their time on the device and TFLOP/s, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    who, loss = contender(name), LOSSES["dpop"]
    batch.start(mode)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        who.run(batch, mode, loss)
        torch.cuda.synchronize()
    batch.start(mode)
    events = [e for e in recorded.key_averages() if e.self_device_time_total > 0]
    rows = [
        {"kernel": e.key, "launches": e.count, "seconds": e.self_device_time_total / 1e6}
        for e in sorted(events, key=lambda e: -e.self_device_time_total)[:16]
    ]
    # Each of our products is one kernel, in one launch or in many; what remains is cuBLAS's.
    ours = [row for row in rows if product_of(row["kernel"])]
    for row in ours:
        row["tflops"] = floor.flop / row["seconds"] / 1e12
    by_cublas = [row for row in rows if is_cublas(row["kernel"])]
    missing = MATRIX_PRODUCTS[mode] - len({product_of(row["kernel"]) for row in ours})
    if by_cublas and missing > 0:
        seconds = sum(row["seconds"] for row in by_cublas)
        for row in by_cublas:
            row["tflops"] = missing * floor.flop / seconds / 1e12
    return rows


def product_of(kernel: str) -> str | None:
    """Which of our products a kernel is, if any."""
    names = ("forward_kernel", "dhidden_kernel", "dweight_kernel")
    return next((name for name in names if name in kernel), None)


def is_cublas(kernel: str) -> bool:
    """Whether a kernel is a product by cuBLAS."""
    return any(part in kernel.lower() for part in ("gemm", "nvjet", "cutlass", "xmma"))


def repeated(batch: Batch, name: str, times: int) -> str:
    """dWeight and dHidden of a step with `name`, so many times, bit for bit.

    Raises:
        AssertionError: they differ.
    """
    who, loss, first = contender(name), LOSSES["dpop"], None
    for i in range(times):
        batch.start(TRAINED)
        who.run(batch, TRAINED, loss)
        found = [batch.weight.grad, batch.hidden.grad]
        assert all(one is not None for one in found)
        if first is None:
            first = found
        for one, two in zip(first, found, strict=True):
            if not torch.equal(one, two):
                raise AssertionError(f"gradients DIFFER in run {i + 1} of {times}")
    batch.start(TRAINED)
    return f"{name}: the same gradients in {times} runs, bit for bit"


def measure_setting(setup: Setup, floor: Products, name: str, launch: Callable[[], object]) -> Row:
    """Rounds beside the bare logits."""
    bare = floor.best[0]
    launch()
    rounds = max(3, rounds_of(setup, timed(launch, setup.device)) // 2)
    times = [(timed(bare, setup.device), timed(launch, setup.device)) for _ in range(rounds)]
    seconds = statistics.median(t for _, t in times)
    return {
        "setting": name,
        "seconds": seconds,
        "tflops": floor.flop / seconds / 1e12,
        "to_bare_logits": statistics.median(t / b for b, t in times),
    }
