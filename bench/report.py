"""Results of the benchmarks as files for people.

python bench/report.py build/bench.json         # pytest-benchmark's JSON; writes bench/results/
python bench/report.py --bars bench/results/cpu.json
python bench/report.py --chart h200-time.png h200.json   # of what bench/h100.sh has measured
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"


def compact(raw: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of pytest-benchmark's JSON; compact results pass unchanged."""
    if "rows" in raw:
        return raw
    machine = raw["machine_info"]
    return {
        "device": machine["gpu"] or "cpu",
        "cpu": machine["cpu"].get("brand_raw", machine["machine"]),
        "capability": machine["capability"],
        "threads": machine["threads"],
        "versions": machine["versions"],
        "malloc": machine["malloc"],
        "date": raw["datetime"][:10],
        "auto": machine["auto"],
        "quick": machine["quick"],
        "rows": [rounded(b["extra_info"]) for b in raw["benchmarks"] if b["extra_info"]],
    }


def rounded(row: Row) -> Row:
    """Four digits are more than the measurements have."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def machine_line(results: dict[str, Any]) -> str:
    """Where, with what and when."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    cpu = f"{results['cpu']} ({results['capability']})"
    where = cpu if results["device"] == "cpu" else f"{results['device']}, {cpu}"
    threads = f"{results['threads']} thread{'s' if results['threads'] != 1 else ''}"
    quick = ". Made with --quick: the numbers mean nothing" if results["quick"] else ""
    malloc = "malloc keeps freed memory" if results["malloc"] == "keep" else "default malloc"
    return f"{where}, {threads}, {malloc}; {versions}; {results['date']}{quick}"


def tables(rows: list[Row]) -> str:
    """Markdown, legible as it stands."""
    parts = []
    steps = [row for row in rows if row["kind"] == "step"]
    for group in dict.fromkeys((r["workload"], r["dtype"], r["mode"]) for r in steps):
        of_group = [r for r in steps if (r["workload"], r["dtype"], r["mode"]) == group]
        first = of_group[0]
        count = f"{first['scored_rows']:,} scored rows"
        if first["distinct_rows"] != first["scored_rows"]:
            count += f", {first['distinct_rows']:,} of them distinct"
        header = [
            "",
            "seconds",
            "x floor",
            "peak MiB",
            "log-prob error, nat",
            "relative",
            "dWeight",
        ]
        body = [
            [
                row["contender"] + _loss(row),
                f"{row['seconds']:.3g}",
                f"{row['to_floor']:.2f}",
                # The floor's products go to memory that is there already.
                _mib(row["peak_extra_bytes"]) if row["contender"] != "bare products" else "",
                *(
                    _error(row.get(name))
                    for name in ("logp_error_nat", "logp_error_relative", "dweight_error")
                ),
            ]
            for row in of_group
        ]
        parts.append(f"### {', '.join(group)}\n\n{count}\n\n{table(header, body)}")

    pairs = [row for row in rows if row["kind"] == "gradient"]
    if pairs:
        header = ["", "dWeight", "log-prob error, nat"]
        body = [
            [r["contender"], _error(r["dweight_error"]), _error(r["logp_error_nat"])] for r in pairs
        ]
        title = f"### dWeight of {pairs[0]['pairs']} pairs, bf16, DPO"
        parts.append(f"{title}\n\n{table(header, body)}")

    parts += _of_trainers(rows)
    for series, what in (("rows", "scored_rows"), ("vocabulary", "vocabulary")):
        of_series = [r for r in rows if r["kind"] == "memory" and r["series"] == series]
        points = sorted({row[what] for row in of_series})
        if not points:
            continue
        peaks = {(r["contender"], r["mode"], r[what]): r["peak_extra_bytes"] for r in of_series}
        header = [what.replace("_", " "), *(f"{point:,}" for point in points)]
        body = []
        for contender, mode in dict.fromkeys((r["contender"], r["mode"]) for r in of_series):
            found = [peaks.get((contender, mode, point)) for point in points]
            body.append([f"{contender}, {mode}", *("" if n is None else _mib(n) for n in found)])
        parts.append(f"### Peak extra memory, MiB, over {header[0]}, bf16\n\n{table(header, body)}")
    return "\n\n".join(parts) + "\n"


def _of_trainers(rows: list[Row]) -> list[str]:
    """Whole training steps."""
    parts = []
    steps = [row for row in rows if row["kind"] == "trainer"]
    if steps:
        header = ["", "seconds", "x TRL", "peak MiB"]
        body = [
            [
                f"{row['contender']}, {row['trained']}",
                f"{row['seconds']:.3g}",
                f"{row['to_trl']:.2f}",
                _mib(row["peak_extra_bytes"]),
            ]
            for row in steps
        ]
        count = f"{steps[0]['positions']:,} positions, {steps[0]['scored_rows']:,} of them scored"
        title = f"### A training step of TRL's DPOTrainer\n\n{count}"
        parts.append(f"{title}\n\n{table(header, body)}")

    loops = [row for row in rows if row["kind"] == "loop"]
    if loops:
        header = ["pairs a step", "trainer, seconds", "bare loop", "x bare loop"]
        body = [
            [
                str(r["pairs"]),
                f"{r['seconds']:.3g}",
                f"{r['bare_seconds']:.3g}",
                f"{r['to_bare']:.3f}",
            ]
            for r in loops
        ]
        parts.append(f"### A step through FastDPOTrainer\n\n{table(header, body)}")
    shared = [row for row in rows if row["kind"] == "sharing"]
    if shared:
        header = ["", "seconds", "over padded", "over TRL", "peak MiB", "padded", "TRL"]
        header += ["tokens in the tree", "padded"]
        table_rows = [
            [
                r["workload"],
                f"{r['seconds']:.3g}",
                *(f"{r[f'over_{name}']:.2f} x" for name in ("padded", "trl")),
                *(_mib(r["peak_extra_bytes"][name]) for name in ("shared", "padded", "TRL")),
                *(f"{r['tokens'][name]:,}" for name in ("tree", "padded")),
            ]
            for r in shared
        ]
        title = "### A training step with shared prefixes, without, and TRL's"
        parts.append(f"{title}\n\n{table(header, table_rows)}")
    return parts


def _loss(row: Row) -> str:
    """Which loss, where that makes a difference."""
    return f", {row['loss'].upper()}" if row["loss"] and row["mode"] != "log-probs only" else ""


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def table(header: list[str], body: list[list[str]]) -> str:
    """A table in Markdown, aligned."""
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]

    def text(line: list[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = f"| {'-' * widths[0]} | " + " | ".join("-" * (w - 1) + ":" for w in widths[1:]) + " |"
    return "\n".join([text(header), rule, *map(text, body)])


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """The JSON, the tables and the charts of one machine; returns their paths."""
    from bench import charts

    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    if stem == "cpu" and results["malloc"] == "default":
        stem = "cpu-default-malloc"
    data, text = folder / f"{stem}.json", folder / f"{stem}.md"
    lines = ",\n".join(f"    {json.dumps(row)}" for row in results["rows"])
    head = json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=2)
    data.write_text(f'{head[:-2]},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    title = f"# Speed and memory on {'a CPU' if results['device'] == 'cpu' else results['device']}"
    intro = "What the columns mean, and who the contenders are: docs/bench.md."
    text.write_text(
        f"{title}\n\n{machine_line(results)}\n\n{intro}\n\n{tables(results['rows'])}",
        encoding="utf-8",
    )
    pictures = {"time": charts.time_against_floor, "memory": charts.memory}
    paths = [data, text]
    for name, draw in pictures.items():
        path = folder / f"{stem}-{name}.png"
        if draw(results["rows"], machine_line(results), path):
            paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON of pytest-benchmark, or of this script")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--bars", action="store_true", help="print what was to be reached instead")
    parser.add_argument("--chart", type=Path, help="draw the times to this file instead")
    options = parser.parse_args()
    # Run as a script, Python looks for modules beside it only.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from bench import bars

    results = compact(json.loads(options.results.read_text(encoding="utf-8")))
    if options.bars:
        print(machine_line(results))
        print(bars.text(results))
    elif options.chart:
        from bench import charts

        if not charts.time_against_floor(results["rows"], machine_line(results), options.chart):
            raise SystemExit(f"{options.results} has no times of a workload that everybody gets")
    else:
        for path in write(results, options.output):
            print(path)


if __name__ == "__main__":
    main()
