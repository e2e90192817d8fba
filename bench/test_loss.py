"""Time and memory of a DPOP step through the head, against plain PyTorch: `make bench`."""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import Line
from bench.memory import peak_extra_bytes
from bench.workloads import CONTENDERS, GSM8K_LIKE, LONG, MODES, Batch, fused
from fastdpop.engines import DEFAULT_WORKSPACE_BYTES

ROUNDS = 2  # after a warm-up; the faster one counts, since a busy machine only ever adds time
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.lru_cache(maxsize=1)
def gsm8k_like(dtype: str, device: str) -> Batch:
    return Batch.random(GSM8K_LIKE, DTYPES[dtype], device, exact=True, jitter=20)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gsm8k_like(
    benchmark: BenchmarkFixture,
    lines: list[Line],
    device: str,
    dtype: str,
    mode: str,
    contender: str,
) -> None:
    """16 pairs, prompts of 64 tokens, completions of 60 to 100; the bare products come first in each case."""
    batch = gsm8k_like(dtype, device)
    benchmark.group = f"{mode}, {dtype}"
    run = CONTENDERS[contender]

    def step() -> torch.Tensor | None:
        logps = run(batch, mode)
        if device == "cuda":
            torch.cuda.synchronize()
        return logps

    batch.start(mode)
    peak, logps = peak_extra_bytes(step, device)  # also the warm-up
    error = None if logps is None else (logps - batch.exact_logps).abs().max().item()
    benchmark.pedantic(step, setup=lambda: batch.start(mode), rounds=ROUNDS)
    if benchmark.disabled:
        return

    seconds = benchmark.stats.stats.min
    of_case = [line for line in lines if line.case == benchmark.group]
    to_floor = seconds / of_case[0].seconds if of_case else 1.0
    lines.append(Line(benchmark.group, contender, seconds, to_floor, peak, error))
    benchmark.extra_info.update(
        scored_tokens=len(batch.rows),
        to_floor=to_floor,
        peak_extra_bytes=peak,
        worst_error_nat=error,
    )


def test_memory_of_long_pairs(benchmark: BenchmarkFixture, notes: list[str], device: str) -> None:
    """Peak extra memory of the loss on 8 pairs of 1,024 scored tokens a completion, V 49,152, bf16, head trained."""
    batch = Batch.random(LONG, torch.bfloat16, device, exact=False)
    batch.start("trained head")
    peak, _ = benchmark.pedantic(
        lambda: peak_extra_bytes(lambda: fused(batch, "trained head"), device), rounds=1
    )
    # dHidden and dWeight in fp32 while they are summed, then rounded to the inputs' dtype.
    summed = 4 * (batch.rows.numel() + batch.weight.numel())
    rounded = sum(t.grad.nbytes for t in (batch.hidden, batch.weight) if t.grad is not None)
    rows = batch.rows.nbytes
    bound = DEFAULT_WORKSPACE_BYTES + summed + rounded + rows
    logits = 4 * len(batch.rows) * len(batch.weight)
    benchmark.extra_info.update(peak_extra_bytes=peak, bound_bytes=bound, fp32_logits_bytes=logits)

    def mib(count: int) -> str:
        return f"{count / 2**20:,.0f} MiB"

    notes.append(
        f"memory, {LONG.pairs} pairs x {LONG.completion:,} scored tokens x {LONG.vocabulary:,}, bf16, trained head\n"
        f"  peak beyond the inputs              {mib(peak):>12}\n"
        f"  workspace                           {mib(DEFAULT_WORKSPACE_BYTES):>12}\n"
        f"  + gradients, summed in fp32         {mib(summed):>12}\n"
        f"  + gradients, rounded to bf16        {mib(rounded):>12}\n"
        f"  + hidden states of the scored rows  {mib(rows):>12}\n"
        f"  = bound                             {mib(bound):>12}\n"
        f"  fp32 logits alone would take        {mib(logits):>12}"
    )
    assert peak <= bound
