"""Peak memory of a call: the larger of two figures.

- PyTorch's: every allocation that its CPU allocator makes or frees, temporaries inside operators
  included, is an event of the profiler, so this peak is exact and the same on every run.
- The C library's: what malloc has handed out, read again and again while the call runs. It also has
  what PyTorch does not see, the scratch of fastdpop's C++ engine, of oneDNN and of a BLAS, and may
  miss what lives for less than a millisecond.

Resident memory is not reported: it depends on what malloc keeps of freed memory, which
:func:`keep_freed_memory` changes.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")

_C = ctypes.CDLL(None) if sys.platform == "linux" else None
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed, for whoever asks next; whether there is a glibc.

    By default it gives large blocks back to the system at once, and gets them again a page fault
    every 4 KiB: on two cores that is half of the time of a loss that builds logits.
    """
    mallopt = getattr(_C, "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Give what malloc keeps back to the system, before blocks of other sizes are asked for."""
    trim = getattr(_C, "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class _MallocWatch:
    """The most that malloc had handed out, beyond what it had at the start; 0 without glibc."""

    def __init__(self) -> None:
        self.read = getattr(_C, "mallinfo2", None)
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _used(self) -> int:
        assert self.read is not None
        info = self.read()
        return int(info.uordblks + info.hblkhd)

    def _watch(self) -> None:
        while not self._stop.wait(0.0002):
            self.peak = max(self.peak, self._used() - self.before)

    def __enter__(self) -> _MallocWatch:
        if self.read is not None:
            self.read.restype = _Mallinfo2
            self.before = self._used()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.read is not None:
            self.peak = max(self.peak, self._used() - self.before)
            self._stop.set()
            self._thread.join()


def peak_extra_bytes(call: Callable[[], Result], device: str) -> tuple[int, Result]:
    """The most memory that a call held at once beyond what was held before, its results included;
    and its result.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    with _MallocWatch() as malloc:
        peak, result = allocator_peak(call)
    return max(peak, malloc.peak), result


def allocator_peak(call: Callable[[], Result]) -> tuple[int, Result]:
    """The first of the two figures alone, on a CPU: tensors, and nothing of Python's; and the call's
    result.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events), default=0), result
