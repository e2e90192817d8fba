"""The estimate in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tools.kernels.h100 import RATES
from tools.kernels.report import Entry

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


def text(found: Entry) -> str:
    """In Markdown."""
    parts = [
        "# An estimate for the H100",
        f"From code compiled by triton {found['triton']} (ptxas {found['ptxas']}); **nothing was run on a GPU**. "
        "Ranges: everything "
        "overlaps, to nothing that is not shown to. The assumptions are those at the top of "
        "`tools/kernels/h100.py`.",
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
