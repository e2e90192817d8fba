"""An estimate of what the kernels take on an H100, from their compiled code; nothing here was run.

    make estimate       # from what triton 3.6 compiles, which comes with torch 2.11

The assumptions about the GPU and the kernels stand at the top of :mod:`.h100`. Beside them, cuBLAS
products run at the GEMM rate; completions have 512 tokens, a pair 1,024 rows; chunks are whole
pairs that fit the workspace.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from fastdpop.engines import NeedsGrad, Problem
from fastdpop.engines.triton import TritonEngine
from fastdpop.kernels import config
from fastdpop.transform import LogitTransform
from tools.kernels.estimate_text import text
from tools.kernels.h100 import (
    HBM,
    LAUNCH,
    PROCESSORS,
    RATES,
    Product,
    Range,
    cycles,
    moving,
    product_time,
)
from tools.kernels.report import Entry

MODELS = {
    "Llama-3-8B": (4_096, 128_256),
    "Qwen3-8B": (4_096, 151_936),
    "Gemma-2-2B": (2_304, 256_000),
}
"""Width and vocabulary; of Gemma without its softcap."""
ROWS = (2_048, 8_192, 32_768)
MODES = {"log-probs only": 1, "frozen head": 2, "trained head": 3}
"""Matrix products, of 2 * N * V * H operations each."""
PAIR = 1_024
WORKSPACES = {"5.3 GB, the default on an H100": 85_000_000_000 // 16, "512 MiB": 2**29}


def plan(rows: int, vocabulary: int, width: int, workspace: int) -> int:
    """How many rows go through at once: the Triton engine's own answer on tensors without memory, as
    if there were an H100.
    """

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
    with config.assumed("sm_90a", PROCESSORS):
        return TritonEngine().chunk_rows(problem, (), NeedsGrad(hidden=True, weight=True))


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
        # Two launches of the repair and one more of the combination, which look at one number per row.
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
        # The loss needs the log-probs of a whole pair first: 4 matrix products.
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
        floor = MODES[mode] * 2.0 * rows * vocabulary * width / rate
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


def main() -> None:
    parser = argparse.ArgumentParser(description="An estimate for the H100 from compiled kernels.")
    parser.add_argument("report", type=Path, help="report.json of `make kernels-36`")
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
