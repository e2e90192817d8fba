"""Peak memory of a call, from what PyTorch's allocator reports.

Every allocation that PyTorch's CPU allocator makes or frees, temporaries inside operators included, is an event of the
profiler, so the peak is exact and the same on every run. Scratch that oneDNN or a BLAS allocates for itself is not
seen: on the GSM8K-like log-probs it was 11 MiB at most (peak resident memory less this figure, under
MALLOC_MMAP_THRESHOLD_=MALLOC_TRIM_THRESHOLD_=1048576). With malloc's defaults up to 75 MiB more stayed resident: freed
memory that malloc keeps, which is why resident memory is not what is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_extra_bytes(call: Callable[[], Result], device: str) -> tuple[int, Result]:
    """The most memory that a call held at once beyond what was held before, its results included; and its result."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events), default=0), result
