"""MkDocs hook: the benchmarks' results, from bench/results at every build.

Pictures there are files of the site, too. In a page,

    <!-- results: tables cpu -->      becomes all tables of bench/results/cpu.md, each to be unfolded,
    <!-- results: steps cpu -->       fastdpop, the fastest in plain PyTorch and TRL as bars, of cpu.json,
    <!-- results: sharing cpu -->     the speed of shared prefixes as bars.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "bench" / "results"

_DIRECTIVE = re.compile(r"^<!-- results: (\w+) (\w+) -->$", re.MULTILINE)
_PICTURE = re.compile(r"\]\(\.\./bench/results/([\w-]+\.png)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """The pictures."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"assets/bench/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """Directives become HTML or Markdown; links to pictures lead to the site's copies."""

    def generated(match: re.Match[str]) -> str:
        what, device = match.groups()
        kinds = {"tables": tables, "steps": steps, "sharing": sharing}
        if what not in kinds or not (RESULTS / f"{device}.json").exists():
            raise PluginError(
                f"{page.file.src_uri} has {match[0]!r}, expected {', '.join(kinds)} and a device "
                "with results in bench/results"
            )
        return kinds[what](device)

    return _PICTURE.sub(r"](assets/bench/\1)", _DIRECTIVE.sub(generated, markdown))


def tables(device: str) -> str:
    """All tables, with the time over the floor drawn beside its number."""
    text = (RESULTS / f"{device}.md").read_text(encoding="utf-8")
    intro, *sections = re.split(r"^### ", text, flags=re.MULTILINE)
    machine = next(line for line in intro.splitlines()[1:] if line)
    parts = [machine, ""]
    for section in sections:
        title, _, body = section.partition("\n")
        lines = body.strip().splitlines()
        rows = [line for line in lines if line.startswith("|")]
        shown = [*(line for line in lines if not line.startswith("|")), "", *_with_bars(rows)]
        parts += [f'??? results "{title}"', "", *(f"    {line}" for line in shown), ""]
    return "\n".join(parts)


def _with_bars(rows: list[str]) -> list[str]:
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    if not cells or "x floor" not in cells[0]:
        return rows
    column = cells[0].index("x floor")
    most = max(float(line[column]) for line in cells[2:])
    cells[1][column] = "---"
    for line in cells[2:]:
        if line[0].startswith("fastdpop"):
            line[0] = f"**{line[0]}**"
        line[column] = _bar(float(line[column]) / most, line[column])
    return [f"| {' | '.join(line)} |" for line in cells]


def _bar(share: float, text: str) -> str:
    return f'<span class="bar" style="--share: {share:.3f}"><i></i>{html.escape(text)}</span>'


def _steps_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a step in bf16 with a trained head that everybody got: the first workload."""
    rows = [r for r in results["rows"] if r["kind"] == "step" and r["mode"] == "trained head"]
    return [r for r in rows if r["workload"] == rows[0]["workload"] and r["dtype"] == "bf16"]


def three(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """fastdpop on the engine that it takes by itself, the fastest of what plain PyTorch offers, and TRL."""
    rows = _steps_of(results)
    ours = results["auto"]
    plain = [
        r for r in rows if r["loss"] and not r["contender"].startswith(("fastdpop", "TRL", "Liger"))
    ]
    fastest = min(plain, key=lambda r: r["seconds"])
    trl = next(r for r in rows if r["contender"].startswith("TRL"))
    return [
        (f"{ours}, DPOP", next(r for r in rows if (r["contender"], r["loss"]) == (ours, "dpop"))),
        (f"the fastest in plain PyTorch: {fastest['contender']}, DPOP", fastest),
        (f"{trl['contender'].replace('TRL', _trl(results))}, DPO", trl),
    ]


def _trl(results: dict[str, Any]) -> str:
    return "TRL " + ".".join(results["versions"]["trl"].split(".")[:2])


def steps(device: str) -> str:
    """Three rows: time, memory and error of a step."""
    results = json.loads((RESULTS / f"{device}.json").read_text(encoding="utf-8"))
    rows = three(results)
    seconds = max(r["seconds"] for _, r in rows)
    memory = max(r["peak_extra_bytes"] for _, r in rows)
    body = [
        (
            name,
            _bar(r["seconds"] / seconds, time(r["seconds"])),
            _bar(r["peak_extra_bytes"] / memory, f"{r['peak_extra_bytes'] / 2**20:,.0f} MiB"),
            _error(r["logp_error_nat"]),
        )
        for name, r in rows
    ]
    return _race(("", "time of a step", "peak memory", "worst log-prob error"), body)


def _error(nats: float) -> str:
    return f"{nats:.2g} nat" if nats >= 0.01 else f"{nats:.0e} nat".replace("e-0", "e-")


def time(seconds: float) -> str:
    """In the unit that fits."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def sharing(device: str) -> str:
    """How many times as fast shared prefixes make a whole step."""
    results = json.loads((RESULTS / f"{device}.json").read_text(encoding="utf-8"))
    rows = [r for r in results["rows"] if r["kind"] == "sharing"]
    most = max(r["over_trl"] for r in rows)
    names = {
        "GSM8K, zero-shot": "GSM8K pairs",
        "GSM8K, four-shot": "GSM8K, four worked examples in the prompt",
        "ARC-Challenge": "ARC, three pairs a question",
    }
    body = [
        (
            names[r["workload"]],
            _bar(r["over_padded"] / most, f"{r['over_padded']:.1f} x"),
            _bar(r["over_trl"] / most, f"{r['over_trl']:.1f} x"),
        )
        for r in rows
    ]
    return _race(
        ("", "as fast as without", "as fast as TRL's trainer"), body, ours=range(len(body))
    )


def _race(header: tuple[str, ...], body: Sequence[tuple[str, ...]], ours: Any = (0,)) -> str:
    """A table of bars, in one line: Markdown leaves it alone."""
    head = "".join(f"<th>{name}</th>" for name in header)
    rows = "".join(
        f"<tr{' class=ours' * (i in ours)}>"
        + "".join(
            f'<td data-label="{name}">{cell}</td>' for name, cell in zip(header, row, strict=True)
        )
        + "</tr>"
        for i, row in enumerate(body)
    )
    return f'<table class="race"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
