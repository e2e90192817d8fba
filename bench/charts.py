"""Two charts of a run: time against the floor, and memory as batches and vocabularies grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.workloads import MODES

Row = dict[str, Any]

# Okabe and Ito: told apart with every kind of colour vision. Lines differ in their markers too.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#8c8c8c"
STYLES = {
    "gather, fp32 upcast": (ORANGE, "s"),
    "TRL, scored rows": (GREEN, "^"),
    "Liger": (PINK, "D"),
}
HEADS = {"gsm8k-like": "V 49,152, H 576", "Llama-3-8B, 8,192 rows": "V 128,256, H 4,096"}
"""The workloads that everybody gets, on CPUs and on GPUs, and what their titles say of the head."""


def time_against_floor(rows: list[Row], machine: str, path: Path) -> bool:
    """Bars for everybody on the workload of `HEADS` that was measured, in bf16, one panel for
    each of the modes; whether there was anything to draw.
    """
    of_everybody = [
        r
        for r in rows
        if r["kind"] == "step" and r["workload"] in HEADS and r["dtype"] == "bf16" and r["loss"]
    ]
    chosen = [[row for row in of_everybody if row["mode"] == mode] for mode in MODES]
    if not all(chosen):
        return False
    tallest = max(map(len, chosen))
    figure, axes = plt.subplots(1, 3, figsize=(15, 1.6 + 0.38 * tallest), layout="constrained")
    for axis, mode, of_mode in zip(axes, MODES, chosen, strict=True):
        of_mode.sort(key=lambda row: -row["to_floor"])
        names = [row["contender"] + _loss(row) for row in of_mode]
        values = [row["to_floor"] for row in of_mode]
        ours = [row["contender"].startswith("fastdpop") for row in of_mode]
        bars = axis.barh(names, values, color=[BLUE if own else GREY for own in ours])
        axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=9)
        for label, own in zip(axis.get_yticklabels(), ours, strict=True):
            label.set_fontweight("bold" if own else "normal")
        axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
        axis.set_xlim(0, 1.12 * max(*values, 1.0))
        axis.set_ylim(len(names) - 0.4 - tallest, len(names) - 0.4)
        axis.set_title(mode)
        axis.set_xlabel("time / time of the bare matrix products", loc="right")
        axis.spines[["top", "right"]].set_visible(False)
    count, head = chosen[0][0]["scored_rows"], HEADS[chosen[0][0]["workload"]]
    title = f"Forward and backward, {count:,} scored tokens, {head}, bf16 (less is better)"
    _save(figure, title, machine, path)
    return True


def _loss(row: Row) -> str:
    return "" if row["mode"] == MODES[-1] else f" ({row['loss'].upper()})"


def memory(rows: list[Row], machine: str, path: Path) -> bool:
    """Lines over scored rows and over vocabularies, log-log; whether there was anything to draw."""
    of_kind = [row for row in rows if row["kind"] == "memory"]
    if not of_kind:
        return False
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharey=True, layout="constrained")
    series = (
        ("rows", "scored_rows", "scored tokens (V 49,152)"),
        ("vocabulary", "vocabulary", "vocabulary (256 scored tokens)"),
    )
    for line, mode in zip(axes, MODES[:2], strict=True):
        for axis, (name, what, label) in zip(line, series, strict=True):
            chosen = [r for r in of_kind if (r["series"], r["mode"]) == (name, mode)]
            _lines(axis, chosen, what)
            axis.set_title(mode)
            axis.set_xlabel(label)
        line[0].set_ylabel("peak extra memory, MiB")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, "Peak memory beyond the inputs, gradients included, bf16", machine, path)
    return True


def _lines(axis: Axes, rows: list[Row], what: str) -> None:
    for name in dict.fromkeys(row["contender"] for row in rows):
        color, marker = STYLES.get(name, (BLUE, "o"))
        points = sorted((r[what], r["peak_extra_bytes"]) for r in rows if r["contender"] == name)
        axis.plot(
            [x for x, _ in points],
            [peak / 2**20 for _, peak in points],
            color=color,
            marker=marker,
            linewidth=3 if color == BLUE else 1.8,
            label=name,
        )
    ticks = sorted({row[what] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.minorticks_off()
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, title: str, machine: str, path: Path) -> None:
    figure.suptitle(f"{title}\n", fontsize=13)
    below_title = 1 - 0.34 / figure.get_figheight()
    figure.text(0.5, below_title, machine, ha="center", va="top", fontsize=8, color="#444444")
    figure.savefig(path, dpi=130)
    plt.close(figure)
