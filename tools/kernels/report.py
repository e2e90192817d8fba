"""What is said of the compiled variants: their entries, ``report.json`` and the table."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fastdpop
from tools.kernels import sass

Entry = dict[str, Any]
"""A variant's line of the report; JSON."""


def read_code(code: sass.Code) -> Entry:
    """What the instructions say; a mix counts instructions of a warp by their kind."""
    steps = code.instructions()
    loops = code.main_loops()
    return {
        "instructions": len(steps),
        **{name.lower(): sass.count(steps, name) for name in ("HGMMA", "UTMALDG", "UTMASTG")},
        "handed_on_early": _names(code.handed_on_early()),
        "from_registers": sum(bool(step.multiplied) for step in steps),
        "mix": sass.mix(steps),
        "float64_names": _names([step for step in steps if step.kind == "float64"]),
        "main_loops": [_main_loop(code, loop) for loop in loops],
        "beside": sass.mix(code.beside_the_main_loops()),
        "beside_least": sass.mix(code.beside_the_main_loops(longest=False)),
        "beside_names": _names(code.beside_the_main_loops()),
    }


def _main_loop(code: sass.Code, loop: sass.Loop) -> Entry:
    steps = code.once_an_iteration(loop)
    return {
        "mix": sass.mix(steps),
        "names": _names(steps),
        "tensor": sorted({i.name for i in steps if sass.TENSOR.match(i.name)}),
        "hgmma": sass.count(steps, "HGMMA"),
        "in_flight": code.in_flight(loop) or 0,
        "never_waits": code.never_waits(loop),
        "rewritten": len(code.rewritten_in_flight(loop)),
    }


def _names(steps: Sequence[sass.Instruction]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for step in steps:
        counts[step.opcode] = counts.get(step.opcode, 0) + 1
    return dict(sorted(counts.items()))


def listed(names: Mapping[str, int]) -> str:
    """How often each occurs, in words."""
    return ", ".join(f"{count} {name}" for name, count in names.items())


_DOT = re.compile(r"tt\.dot ([^:]*): tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>", re.ASCII)
_PRECISION = re.compile(r"inputPrecision = (\w+)")
_GLUON_DOT = re.compile(
    r"ttng\.warp_group_dot .*? : (?:!ttg\.memdesc|tensor)<(\d+)x(\d+)x(\w+)\b[^>]*>"
    r" \* !ttg\.memdesc<\d+x(\d+)x\w+\b",
    re.ASCII,
)


def products(code: str) -> list[Entry]:
    """The matrix products of a kernel before it is compiled (in ttir, of Gluon in ttgir): their
    sizes, the dtype they read, and the precision of fp32 products, ieee, tf32 or tf32x3.
    """
    found = []
    for operands, m, k, dtype, n in _DOT.findall(code):
        precision = _PRECISION.search(operands)
        size = {"m": int(m), "n": int(n), "k": int(k)}
        entry = {**size, "dtype": dtype, "precision": precision[1] if precision else "ieee"}
        found.append(entry)
    for m, k, dtype, n in _GLUON_DOT.findall(code):
        size = {"m": int(m), "n": int(n), "k": int(k)}
        found.append({**size, "dtype": dtype, "precision": "tf32" if dtype == "f32" else "ieee"})
    return found


def finish(entries: list[Entry], out: Path) -> int:
    """Write ``report.json``, print the table and what is wrong; the exit code."""
    import triton

    entries = sorted(entries, key=lambda entry: (entry["target"], entry["name"]))
    versions = {"fastdpop": fastdpop.__version__, "triton": triton.__version__}
    # A triton may bring several, and choose by target.
    assemblers = {entry["target"]: entry["ptxas"] for entry in entries}
    report = {**versions, "ptxas": assemblers, "variants": entries}
    path = out / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    said = ", ".join(f"ptxas {version} for {target}" for target, version in assemblers.items())
    print(f"triton {versions['triton']}, {said}")
    print(table(entries))
    for entry in entries:
        for text in entry["errors"]:
            print(f"error: {entry['name']} ({entry['target']}): {text}", file=sys.stderr)
    bad = sum(bool(entry["errors"]) for entry in entries)
    print(f"{len(entries)} variants, {bad} with errors; {path}")
    return int(bad > 0)


_HEADER = ("variant", "", "warps", "stages", "regs", "stack", "local", "shared")
_HEADER_CODE = ("HGMMA", "in loop", "UTMALDG", "in flight", "per SM", "verdict")


def table(entries: Sequence[Entry]) -> str:
    """One line per variant; legible as it stands."""
    lines = [(*_HEADER, *_HEADER_CODE)]
    for e in entries:
        loops = e["main_loops"]
        lines.append(
            (
                e["name"],
                "default" if e["default"] else "",
                *(f"{e[k]:,}" for k in ("num_warps", "num_stages", "registers", "stack", "local")),
                f"{e['shared']:,}",
                str(e["hgmma"]),
                str(sum(loop["hgmma"] for loop in loops)),
                str(e["utmaldg"]),
                "/".join(str(loop["in_flight"]) for loop in loops if loop["hgmma"]) or "-",
                str(e["programs_per_sm"]),
                "ERROR" if e["errors"] else "ok",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
