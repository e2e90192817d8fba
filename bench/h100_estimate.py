"""An estimate of what the kernels take on an H100, from their compiled code; nothing here was run.

    make estimate       # from what triton 3.6 compiles, which comes with torch 2.11

Every figure is a range: the low end is what the counted work allows if everything overlaps, the
high end what it takes if nothing overlaps that is not shown to. Verdicts go by the high end.

Assumed of the chip (H100 SXM, 132 multiprocessors; NVIDIA's data sheet where nothing else is said):

- Tensor cores: 4,096 operations of 16 bits a cycle and multiprocessor, which is 989 TFLOP/s at 1.83
  GHz. Under that load the power limit lowers the clock: bare GEMMs were measured at 728 TFLOP/s (the
  TRL issue below) and are quoted at about 800. Everything on a multiprocessor is counted in cycles
  of the clock that such a rate implies.
- HBM: 3.35 TB/s, of which 90% are reached.
- L2 to the multiprocessors: every tile loads its operands itself (triton emits no multicast), 48
  bytes a cycle and multiprocessor for 128 x 256 tiles at full rate. Low end: never a limit. High end:
  8.1 TB/s, the most that is known to have been reached that way over a whole product: bf16 tiles of
  192 x 192 without clusters at 777.5 TFLOP/s (kernel 6 of pranjalssh/fast.cu, N 8,192, H100 SXM).
- Other instructions, cycles of a scheduler a warp: by the throughput table for compute capability 9.0
  in the CUDA C++ Programming Guide (`CYCLES`). Low end: the kinds overlap, the busiest counts. High end: they
  do not, branches go the longer way (in the forward product no more often than there are targets), and a
  tile waits 1,500 cycles more to fill and drain its pipeline.

Assumed of the kernels:

- A main loop that keeps products in flight (read from the code) overlaps everything else in it; one
  that does not adds it up at the high end.
- One program a multiprocessor (as registers and shared memory have it) does not overlap its
  prologue and epilogue with anything; with two, the other's main loop covers them.
- Programs start in waves of 132 (or 264); the last one may be nearly empty.
- HBM traffic: each operand once for each group of row tiles that shares it (L2 holds what a group
  walks through), once more where a wave cannot hold a group; results once. It overlaps with the rest,
  but not what an epilogue reads and adds to: low end at 64 bytes a cycle, high end at a
  multiprocessor's share of HBM.
- cuBLAS products run at the GEMM rate. Small kernels move their bytes at 90% of HBM. A launch costs
  2 to 5 microseconds that are not overlapped.
- Completions have 512 tokens, a pair 1,024 rows; chunks are whole pairs that fit the workspace.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

# Run as a script, Python looks for modules beside it only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Entry = dict[str, Any]

MODELS = {
    "Llama-3-8B": (4_096, 128_256),
    "Qwen3-8B": (4_096, 151_936),
    "Gemma-2-2B": (2_304, 256_000),
}
"""Width and vocabulary; of Gemma without its softcap."""
ROWS = (2_048, 8_192, 32_768)
MODES = {"log-probs only": 2, "frozen head": 4, "trained head": 6}
"""Units of N * V * H operations."""
PAIR = 1_024
WORKSPACES = {"5.3 GB, the default on an H100": 85_000_000_000 // 16, "512 MiB": 2**29}
RATES = {"989": 989.4e12, "800": 800e12, "728": 728e12}
"""Tensor-core peak, and rates of bare GEMMs, in operations a second."""

PROCESSORS = 132
OPERATIONS_A_CYCLE = 4_096
HBM = 0.9 * 3.35e12
L2 = 8.1e12
FILL_CYCLES = 1_500
LAUNCH = (2e-6, 5e-6)

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

PUBLISHED = {
    ("Qwen3-8B", 8_192, "trained head"): (
        "huggingface/trl issue 7244, H100, forward and backward: bare GEMMs 42 ms, naive 59 ms, TRL "
        "chunked as it was then 167 ms, Liger's fused linear cross-entropy 192 ms"
    ),
    ("Llama-3-8B", 8_192, "trained head"): (
        "Liger's CuTe scaled cross-entropy, H100, 8,192 rows, V 131,072: 50.4 ms. On an H200, 4,096 "
        "rows, V 128,256: Liger CuTe 18.06 ms, quack 17.33 ms, Liger Triton 141 ms"
    ),
}


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
    clock = rate / (PROCESSORS * OPERATIONS_A_CYCLE)
    warps = entry["num_warps"]

    tensor = 2.0 * m * n * k / OPERATIONS_A_CYCLE
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


def plan(rows: int, vocabulary: int, width: int, workspace: int) -> int:
    """How many rows go through at once: the Triton engine's own answer on tensors without memory, as
    if there were an H100.
    """
    from fastdpop.engines import Problem
    from fastdpop.engines.triton_pass import Pass
    from fastdpop.kernels import config
    from fastdpop.transform import LogitTransform

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    problem = Problem(
        hidden=meta(rows, width),
        weight=meta(vocabulary, width),
        bias=None,
        targets=meta(rows, dtype=torch.int64),
        groups=list(range(0, rows + 1, PAIR)),
        transform=LogitTransform(),
        compute_dtype=torch.bfloat16,
        workspace_bytes=workspace,
    )
    with mock.patch.object(config, "target_of", return_value="sm_90a"):
        return Pass(problem, (), "auto", "plain").kept_rows


PRODUCTS = ("cublas", "kernels")
"""Who forms the gradients: the engine's choice for bfloat16, and the other."""


class Kernels:
    """The compiled variants of a report that the estimate is made of."""

    def __init__(self, report: Entry) -> None:
        self.entries = [
            e for e in report["variants"] if e["target"] == "sm_90a" and "/bf16/" in e["name"]
        ]
        self.group = self["forward"]["constants"]["GROUP_N"]
        self.tokens = self["forward"]["constants"]["BLOCK_V"]

    def __getitem__(self, kernel: str) -> Entry:
        """The variant whose name begins with this, up to the first slash."""
        found = [e for e in self.entries if e["name"].split("/")[0] == kernel]
        if len(found) != 1:
            names = sorted({e["name"].split("/")[0] for e in self.entries})
            raise ValueError(f"the report has {len(found)} variants of {kernel!r}, of {names}")
        return found[0]

    def forward(self, rows: int, vocabulary: int, width: int, rate: float, keep: bool) -> Range:
        # A row has one target, in a quarter of one tile; only such quarters have more to do.
        targets = self["forward"]["products"][0]["m"] / (vocabulary // (self.tokens // 4))
        kept = 2.0 if keep else 0.0
        work = Product(rows, vocabulary, width, self.group, kept, long_way=min(1.0, targets))
        time = product_time(self["forward_keep" if keep else "forward"], work, rate)
        time += moving(2 * 2 * rows * width)  # the targets' logits
        partials = 4 * math.ceil(vocabulary / self.tokens) * rows
        time += moving(2 * partials)
        # Two launches of the repair and one more of the combination, which look at a number a row.
        return time + moving(4 * rows) + moving(4 * rows) + moving(4 * rows)

    def hidden(self, rows: int, vocabulary: int, width: int, rate: float, direction: bool) -> Range:
        work = Product(rows, width, vocabulary, self.group, 2.0 if direction else 4.0)
        return product_time(self["dlogp_dhidden" if direction else "dhidden"], work, rate)

    def weight(self, rows: int, vocabulary: int, width: int, rate: float, add: bool) -> Range:
        work = Product(vocabulary, width, rows, self.group, 4.0, 4.0 if add else 0.0)
        return product_time(self["dweight_accumulate" if add else "dweight"], work, rate)


def step_time(
    kernels: Kernels,
    model: str,
    rows: int,
    mode: str,
    rate: float,
    workspace: int,
    products: str = "cublas",
) -> Range:
    """A step through the head, with gradients by cuBLAS or by our own products."""
    width, vocabulary = MODELS[model]
    if mode == "log-probs only":
        return kernels.forward(rows, vocabulary, width, rate, keep=False)
    trained = mode == "trained head"
    size = plan(rows, vocabulary, width, workspace)
    total = Range(0.0, 0.0)
    if trained and size < PAIR:
        # The loss needs the log-probs of a whole pair first: 8 units.
        total += kernels.forward(rows, vocabulary, width, rate, keep=False)
    elif trained:
        size -= size % PAIR
    for start in range(0, rows, size):
        n, add = min(size, rows - start), start > 0
        total += kernels.forward(n, vocabulary, width, rate, keep=True)
        total += moving(4 * n) + moving(4 * n)  # the pairs' loss, the rows' factors
        if products == "cublas":
            gemm = 2.0 * n * vocabulary * width / rate
            total += Range(gemm, gemm) + LAUNCH
            total += moving((4 + (4 if trained else 2)) * n * width)  # scaled
            if trained:
                # What is added to is read beside the products, or before.
                total += Range(gemm, gemm + 4 * vocabulary * width * add / HBM) + LAUNCH
        else:
            total += kernels.hidden(n, vocabulary, width, rate, direction=not trained)
            if trained:
                total += kernels.weight(n, vocabulary, width, rate, add)
        if trained:
            total += moving(2 * 2 * n * width)  # hidden states, scaled for dWeight
    if trained:
        total += moving((4 + 2) * (vocabulary + rows) * width)  # gradients in the dtype of the head
    return total


def line_of(kernels: Kernels, model: str, rows: int, mode: str, workspace: int) -> Entry:
    """One case at every rate, with the products that the engine chooses and with the others."""
    width, vocabulary = MODELS[model]
    found: Entry = {"model": model, "rows": rows, "mode": mode, "rates": {}}
    for name, rate in RATES.items():
        floor = MODES[mode] * rows * vocabulary * width / rate
        times = {
            products: step_time(kernels, model, rows, mode, rate, workspace, products)
            for products in PRODUCTS
        }
        chosen = times[PRODUCTS[0]]
        found["rates"][name] = {
            "floor_seconds": floor,
            "seconds": list(chosen),
            "to_floor": [t / floor for t in chosen],
            "to_floor_by_products": {
                products: [t / floor for t in time] for products, time in times.items()
            },
        }
    return found


def goals(lines: Sequence[Entry], rate: str) -> list[str]:
    """What was to be shown, and whether it was, for the models of H 4,096 at 8,192 rows."""
    said = []
    for mode, limit, what in (
        ("log-probs only", 1.25, "forward within 1.25 times the bare products"),
        ("trained head", 1.2, "trained head within 1.2 times the bare products"),
    ):
        of_goal = [
            line["rates"][rate]["to_floor"]
            for line in lines
            if line["mode"] == mode and line["rows"] == 8_192 and MODELS[line["model"]][0] == 4_096
        ]
        low, high = (max(ends) for ends in zip(*of_goal, strict=True))
        verdict = "shown" if high <= limit else "open" if low <= limit else "missed"
        said.append(
            f"{what}: {verdict}, {low:.2f} to {high:.2f} times the bare products "
            f"({1 / high:.0%} to {1 / low:.0%} of {rate} TFLOP/s)"
        )
    return said


def estimate(report: Entry) -> Entry:
    """Everything, for JSON."""
    kernels = Kernels(report)
    tables = []
    for name, size in WORKSPACES.items():
        lines = [
            line_of(kernels, model, rows, mode, size)
            for model in MODELS
            for rows in ROWS
            for mode in MODES
        ]
        judged = {rate: goals(lines, rate) for rate in RATES}
        tables.append({"workspace": name, "goals": judged, "lines": lines})
    names = (
        "forward",
        "forward_keep",
        "forward_keep_bias_softcap",
        "dhidden",
        "dlogp_dhidden",
        "dweight",
        "dweight_accumulate",
    )
    return {
        "what": "an estimate from compiled code; nothing was run on a GPU",
        "triton": report["triton"],
        "ptxas": report["ptxas"]["sm_90a"],
        "cycles": {name: cycles(kernels[name], RATES["800"]) for name in names},
        "tables": tables,
    }


def cycles(entry: Entry, rate: float) -> Entry:
    """What a step of the main loop and a tile's rest are made of, in cycles at a rate."""
    (loop,) = entry["main_loops"]
    tile = entry["products"][0]
    m, n, k = tile["m"], tile["n"], tile["k"]
    clock = rate / (PROCESSORS * OPERATIONS_A_CYCLE)
    return {
        "tensor": 2.0 * m * n * k / OPERATIONS_A_CYCLE,
        "l2": (m + n) * k * 2 / (L2 / PROCESSORS / clock),
        "other": list(issue(loop["mix"], entry["num_warps"])),
        "in_flight": loop["in_flight"],
        "once": list(once(entry)),
        "spills": entry["mix"].get("spill", 0),
        "programs_per_sm": entry["programs_per_sm"],
    }


def text(found: Entry) -> str:
    """In Markdown."""
    parts = [
        "# An estimate for the H100",
        f"From code compiled by triton {found['triton']} (ptxas {found['ptxas']}); **nothing was run on a GPU**. "
        "Ranges: everything "
        "overlaps, to nothing that is not shown to. The assumptions are those at the top of "
        "`bench/h100_estimate.py`.",
        "## Of what a tile is made",
        "Cycles at the clock of 800 TFLOP/s. A step is one pass of the main loop; *once* is the "
        "prologue and epilogue of a tile, exposed where one program fits a multiprocessor.",
        _table(
            ["kernel", "tensor", "L2, high end", "other", "in flight", "once", "spills", "per SM"],
            [
                [
                    name,
                    f"{c['tensor']:,.0f}",
                    f"{c['l2']:,.0f}",
                    f"{c['other'][0]:,.0f} to {c['other'][1]:,.0f}",
                    str(c["in_flight"]),
                    f"{c['once'][0]:,.0f} to {c['once'][1]:,.0f}",
                    str(c["spills"]),
                    str(c["programs_per_sm"]),
                ]
                for name, c in found["cycles"].items()
            ],
        ),
    ]
    for table in found["tables"]:
        parts.append(f"## Estimate with a workspace of {table['workspace']}")
        parts.append(
            "*open*: met at the low end of the range only. cuBLAS forms the gradients, as the engine "
            "chooses for bfloat16; *otherwise* our own products do."
        )
        parts.append("\n".join(f"- {goal}" for said in table["goals"].values() for goal in said))
        header = ["", "rows", "bare products, ms at 800", "estimate, ms at 800"]
        header += [f"x at {rate}" for rate in RATES]
        parts.append(_table([*header, "otherwise, x at 800"], list(map(_line, table["lines"]))))
    parts.append("## Published, measured by others")
    parts.append(
        "\n".join(f"- {m}, {r:,} rows, {mode}: {x}" for (m, r, mode), x in PUBLISHED.items())
    )
    return "\n\n".join(parts) + "\n"


def _line(line: Entry) -> list[str]:
    at = line["rates"]["800"]
    own = line["mode"] == "log-probs only"
    return [
        f"{line['model']}, {line['mode']}",
        f"{line['rows']:,}",
        f"{at['floor_seconds'] * 1e3:.1f}",
        _range([t * 1e3 for t in at["seconds"]], 1),
        *(_range(line["rates"][rate]["to_floor"], 2) for rate in RATES),
        "" if own else _range(at["to_floor_by_products"]["kernels"], 2),
    ]


def _range(ends: Sequence[float], digits: int) -> str:
    low, high = (f"{end:,.{digits}f}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _table(header: list[str], body: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def main() -> None:
    parser = argparse.ArgumentParser(description="An estimate for the H100 from compiled kernels.")
    parser.add_argument("report", type=Path, help="report.json of `fastdpop kernels`")
    parser.add_argument("--output", type=Path, help="folder for h100-estimate.{md,json}")
    options = parser.parse_args()
    found = estimate(json.loads(options.report.read_text(encoding="utf-8")))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        data, page = (options.output / f"h100-estimate.{suffix}" for suffix in ("json", "md"))
        # Four digits are more than an estimate has.
        short = json.loads(json.dumps(found), parse_float=lambda x: float(f"{float(x):.4g}"))
        data.write_text(json.dumps(short) + "\n", encoding="utf-8")
        page.write_text(text(found), encoding="utf-8")
    print(text(found))


if __name__ == "__main__":
    main()
