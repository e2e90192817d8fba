"""How long compiled products take on an H100, by the counts of their instructions.

Every figure is a range: the low end is what the counted work allows if everything overlaps, the
high end what it takes if nothing overlaps that is not shown to. Verdicts go by the high end.

Assumed of the chip (H100 SXM, 132 multiprocessors; NVIDIA's data sheet where nothing else is said):

- Tensor cores: 4,096 operations of 16 bits per cycle and multiprocessor, which is 989 TFLOP/s at 1.83
  GHz. Under that load the power limit lowers the clock: bare GEMMs were measured at 728 TFLOP/s (the
  TRL issue in :mod:`.estimate_text`) and are quoted at about 800. Everything on a multiprocessor is counted in cycles
  of the clock that such a rate implies.
- HBM: 3.35 TB/s, of which 90% are reached.
- L2 to the multiprocessors: every tile loads its operands itself (triton emits no multicast), 48
  bytes per cycle and multiprocessor for 128 x 256 tiles at full rate. Low end: never a limit. High end:
  8.1 TB/s, the most that is known to have been reached that way over a whole product: bf16 tiles of
  192 x 192 without clusters at 777.5 TFLOP/s (kernel 6 of pranjalssh/fast.cu, N 8,192, H100 SXM).
- Other instructions, cycles of a scheduler per warp: by the throughput table for compute capability 9.0
  in the CUDA C++ Programming Guide (`CYCLES`). Low end: the kinds overlap, the busiest counts. High end: they
  do not, branches go the longer way (in the forward product no more often than there are targets), and a
  tile waits 1,500 cycles more to fill and drain its pipeline.

Assumed of the kernels:

- A main loop that keeps products in flight (read from the code) overlaps everything else in it; one
  that does not adds it up at the high end.
- One program per multiprocessor (as registers and shared memory have it) does not overlap its
  prologue and epilogue with anything; with two, the other's main loop covers them.
- Programs start in waves of 132 (or 264); the last one may be nearly empty.
- HBM traffic: each operand once for each group of row tiles that shares it (L2 holds what a group
  walks through), once more where a wave cannot hold a group; results once. It overlaps with the rest,
  but not what an epilogue reads and adds to: low end at 64 bytes per cycle, high end at a
  multiprocessor's share of HBM.
- Small kernels move their bytes at 90% of HBM. A launch costs 2 to 5 microseconds that are not
  overlapped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from tools.kernels.report import Entry

PROCESSORS = 132
OPERATIONS_PER_CYCLE = 4_096
HBM = 0.9 * 3.35e12
L2 = 8.1e12
FILL_CYCLES = 1_500
LAUNCH = (2e-6, 5e-6)
RATES = {"989": 989.4e12, "800": 800e12, "728": 728e12}
"""Tensor-core peak, and rates of bare GEMMs, in operations per second."""

CYCLES = {
    "fma": 1.0,
    "alu": 2.0,
    "uniform": 1.0,
    "convert": 2.0,
    "shuffle": 4.0,
    "mufu": 8.0,
    "shared": 8.0,
    "global": 8.0,
    "spill": 8.0,
    "tma load": 1.0,
    "tma store": 1.0,
    "branch": 1.0,
}
"""Of a scheduler, for one instruction of a warp."""
WAIT_CYCLES = 20.0
"""Of a barrier, for all warps at once."""


class Range(NamedTuple):
    """Low and high end, in seconds."""

    low: float
    high: float

    def __add__(self, other: tuple[Any, ...]) -> Range:
        return Range(self.low + other[0], self.high + other[1])


@dataclass(frozen=True)
class Product:
    """One launch of a matrix product: a result of lines x columns, summed over depth.

    Attributes:
        group: line tiles that walk along the columns together.
        result_bytes: of an element that is written.
        added_bytes: of an element that the epilogue reads first.
        long_way: at most this share of the tiles goes the longer way through branches.
    """

    lines: int
    columns: int
    depth: int
    group: int
    result_bytes: float
    added_bytes: float = 0.0
    long_way: float = 1.0


def issue(mix: dict[str, int], warps: int) -> tuple[float, float]:
    """Cycles of a scheduler for its share of a program's warps, without the tensor cores: kinds
    overlapped, and one after the other.
    """
    each = [CYCLES[kind] * count * warps / 4 for kind, count in mix.items() if kind in CYCLES]
    instructions = sum(count for kind, count in mix.items() if kind in CYCLES) * warps / 4
    low = max([instructions, *each])
    return low, sum(each) + WAIT_CYCLES * mix.get("wait", 0)


def once(entry: Entry, long_way: float = 1.0) -> tuple[float, float]:
    """Cycles of a tile's prologue and epilogue, on average: all the shortest way through branches,
    kinds overlapped; and that share the longest way, one kind after the other.
    """
    low, short = issue(entry["beside_least"], entry["num_warps"])
    _, long = issue(entry["beside"], entry["num_warps"])
    return low, long_way * long + (1.0 - long_way) * short


def product_time(entry: Entry, work: Product, rate: float) -> Range:
    """Of one launch of a compiled product."""
    (loop,) = entry["main_loops"]
    tile = entry["products"][0]
    m, n, k = tile["m"], tile["n"], tile["k"]
    clock = rate / (PROCESSORS * OPERATIONS_PER_CYCLE)
    warps = entry["num_warps"]

    tensor = 2.0 * m * n * k / OPERATIONS_PER_CYCLE
    beside_low, beside_high = issue(loop["mix"], warps)
    from_l2 = (m + n) * k * 2 / (L2 / PROCESSORS / clock)
    together = max(tensor, beside_high) if loop["in_flight"] else tensor + beside_high
    steps = math.ceil(work.depth / k)
    step = (max(tensor, beside_low), max(together, from_l2))

    once_low, once_high = once(entry, work.long_way)
    added = work.added_bytes * m * n
    rest = (once_low + added / 64, once_high + FILL_CYCLES + added * clock * PROCESSORS / HBM)
    at_once = max(1, entry["programs_per_sm"])
    if at_once > 1:
        rest = (0.0, 0.0)

    tiles = math.ceil(work.lines / m) * math.ceil(work.columns / n)
    # Programs of a multiprocessor share its tensor cores.
    waves = math.ceil(tiles / (PROCESSORS * at_once)) * at_once
    low, high = (waves * (steps * s + o) / clock for s, o in zip(step, rest, strict=True))
    moved = traffic(work, m, n, at_once) / HBM
    return Range(max(low, moved), max(high, moved)) + LAUNCH


def traffic(work: Product, m: int, n: int, at_once: int) -> float:
    """Bytes between HBM and L2."""
    line_tiles = math.ceil(work.lines / m)
    groups = math.ceil(line_tiles / work.group)
    columns = math.ceil(work.columns / n)
    running = PROCESSORS * at_once
    # A wave holds so many column tiles of a group at once; the group's lines are read once a wave.
    # Long sums: neither operand stays in L2. Short ones: the group's lines do.
    a_wave = max(1, running // min(work.group, line_tiles))
    lines_fit = min(work.lines, work.group * m) * work.depth * 2 < 30e6
    passes = 1 if lines_fit else math.ceil(columns / a_wave)
    lines = work.lines * work.depth * 2 * passes
    other = work.columns * work.depth * 2 * groups
    return lines + other + work.lines * work.columns * (work.result_bytes + work.added_bytes)


def moving(count: float) -> Range:
    """A small kernel that moves so many bytes."""
    return Range(count / HBM, count / HBM) + LAUNCH


def cycles(entry: Entry, rate: float) -> Entry:
    """What a step of the main loop and a tile's rest are made of, in cycles at a rate."""
    (loop,) = entry["main_loops"]
    tile = entry["products"][0]
    m, n, k = tile["m"], tile["n"], tile["k"]
    clock = rate / (PROCESSORS * OPERATIONS_PER_CYCLE)
    return {
        "tensor": 2.0 * m * n * k / OPERATIONS_PER_CYCLE,
        "l2": (m + n) * k * 2 / (L2 / PROCESSORS / clock),
        "other": list(issue(loop["mix"], entry["num_warps"])),
        "in_flight": loop["in_flight"],
        "once": list(once(entry)),
        "spills": entry["mix"].get("spill", 0),
        "programs_per_sm": entry["programs_per_sm"],
    }
