"""The pictures of a report: each one as SVG in the colours of the page's theme, and all of them as one PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdpop.analysis.gradients import PAPERS_LAMBDA
from fastdpop.analysis.numbers import BEFORE, Numbers, Scored
from fastdpop.analysis.score import PARTS
from fastdpop.analysis.words import signed
from fastdpop.train.picture import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID, CARD = "#1f1f1f", "#e6e6e6", "#ffffff"
SERIES = (BLUE.lower(), ORANGE.lower(), "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of models, in their order: Okabe and Ito's. The reference is grey."""
THEME = {INK: "ink", GREY.lower(): "muted", GRID: "grid", CARD: "card"} | {
    colour: f"series-{i}" for i, colour in enumerate(SERIES)
}
"""What the page calls these colours; it has others where the reader's theme is dark."""
_MARKERS = ("o", "s", "^", "D", "v", "P")
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastdpop",
    "font.size": 11,
    "axes.titlesize": 12,
    "legend.fontsize": 10,
} | dict.fromkeys(
    (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    ),
    INK,
)


@dataclass(frozen=True)
class Chart:
    """A picture of a report.

    Attributes:
        title: what it shows, in few words.
        about: what to see in it.
        draw: onto axes that are empty.
    """

    title: str
    about: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Line:
    """A model in a picture: its numbers, its colour and its marker."""

    numbers: Numbers
    scored: Scored
    colour: str
    marker: str


def lines_of(numbers: Numbers, models: Sequence[Scored], reference: Scored | None) -> list[Line]:
    """The models in their order, then the reference."""
    lines = [
        Line(own, scored, SERIES[i], _MARKERS[i])
        for i, (own, scored) in enumerate(zip(numbers["models"], models, strict=True))
    ]
    if reference is not None:
        lines.append(Line(numbers["reference"], reference, GREY.lower(), "x"))
    return lines


def charts(lines: Sequence[Line]) -> dict[str, Chart]:
    """By name. Those of changes are there if there is a reference."""
    changed = [line for line in lines if line.numbers["change"] is not None]
    found = {}
    if changed:
        found["parts"] = Chart(
            "Where the chosen log-prob changed",
            "Bars: nats by which chosen completions changed against the reference, before, at and after the edit.",
            lambda axes: _parts(axes, changed),
        )
        found["change"] = Chart(
            "Change by place around the edit",
            "Mean change of a chosen token's log-prob against the reference, by its place from the first difference.",
            lambda axes: _places(axes, changed, "change"),
        )
    found["around"] = Chart(
        "Log-probs before, at and after the edit",
        "Mean log-prob of a token: filled, of chosen completions; hollow, of rejected ones.",
        lambda axes: _around(axes, lines),
    )
    found["position"] = Chart(
        "Log-probs by place, from the one before the edit",
        "Mean log-prob of chosen tokens by place, less the mean at place \N{MINUS SIGN}1, as figure 3 of the paper.",
        lambda axes: _places(axes, lines, "relative"),
    )
    found["lambda"] = Chart(
        "Tokens that DPOP pushes the right way",
        "Share of the aligned tokens after the edit whose correct logit goes up, by lambda; at the left, all but DPO.",
        lambda axes: _lambdas(axes, lines),
    )
    found["ches"] = (
        Chart(
            "CHES before, and the change",
            "Each point is a pair: the reference's length-normalised CHES, and the change of the chosen log-prob.",
            lambda axes: _displacement(axes, changed, lines[-1]),
        )
        if changed
        else Chart(
            "CHES",
            "Pairs by their length-normalised CHES: the higher, the likelier the chosen log-prob falls.",
            lambda axes: _ches(axes, lines),
        )
    )
    return found


def as_svg(chart: Chart) -> str:
    """As an element of a page; colours are the page's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(5.2, 3.7), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        _plain(axes)
        chart.draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, name in THEME.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def draw(found: dict[str, Chart], title: str, note: str, path: Path) -> None:
    """All of them as one PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 3 if len(found) > 4 else 2
    rows = -(-len(found) // columns)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(5.2 * columns, 3.9 * rows + 0.8), dpi=100)
        figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)
        FigureCanvasAgg(figure)
        for axes, chart in zip(
            np.ravel(figure.subplots(rows, columns)), found.values(), strict=True
        ):
            _plain(axes)
            chart.draw(axes)
            axes.set_title(chart.title, loc="left", pad=10)
        figure.suptitle(title, fontsize=15, fontweight="bold", parse_math=False)
        figure.supxlabel(note, fontsize=9, color=GREY, parse_math=False)
        figure.savefig(path)


def _plain(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(axes: Axes, lines: Sequence[Line], **where: Any) -> None:
    if len(lines) > 1:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles, labels, frameon=False, labelcolor="linecolor", **where)
        for text in axes.get_legend().get_texts():  # type: ignore[union-attr]
            text.set_parse_math(False)


def _zero(axes: Axes) -> None:
    axes.axhline(0, color=GREY.lower(), linewidth=1, zorder=1)


def _parts(axes: Axes, lines: Sequence[Line]) -> None:
    width = 0.8 / len(lines)
    for i, line in enumerate(lines):
        parts = line.numbers["change"]["chosen"]["parts"]
        x = np.arange(len(PARTS)) + (i - (len(lines) - 1) / 2) * width
        heights = [parts[part] for part in PARTS]
        bars = axes.bar(x, heights, width * 0.92, color=line.colour, label=line.numbers["name"])
        axes.bar_label(bars, [signed(h, 1) for h in heights], fontsize=10, color=INK, padding=2)
    axes.margins(y=0.15)
    _zero(axes)
    _ticks(axes)
    axes.set_ylabel("nats a pair, chosen")
    _legend(axes, lines)


def _ticks(axes: Axes) -> None:
    axes.set_xticks(range(len(PARTS)), [f"{part} the edit" for part in PARTS])


def _around(axes: Axes, lines: Sequence[Line]) -> None:
    step = 0.7 / max(len(lines), 2)
    for i, line in enumerate(lines):
        for side, filled in (("chosen", True), ("rejected", False)):
            means = line.numbers["around_edit"][side]
            x = (
                np.arange(len(PARTS))
                + (i - (len(lines) - 1) / 2) * step
                + (0 if filled else step / 3)
            )
            axes.errorbar(
                x,
                [_number(means[part]["mean"]) for part in PARTS],
                [means[part]["standard_error"] or 0 for part in PARTS],
                fmt="o" if filled else "D",
                color=line.colour,
                markerfacecolor=line.colour if filled else CARD,
                capsize=3,
                label=line.numbers["name"] if filled else None,
            )
    axes.set_xlim(-0.5, len(PARTS) - 0.5)
    _ticks(axes)
    axes.set_ylabel("nats a token (hollow: rejected)")
    _legend(axes, lines)


def _places(axes: Axes, lines: Sequence[Line], what: str) -> None:
    """Log-probs by place from that at -1, or their change against the reference."""
    for line in lines:
        found = line.numbers["by_position"]
        if what == "change":
            found = line.numbers["change"]["by_position"]
        values = found["mean" if what == "change" else what]
        mean = np.array([_number(x) for x in values])
        error = np.array([x or 0.0 for x in found["standard_error"]])
        style: dict[str, Any] = {"marker": line.marker, "markersize": 3.5, "linewidth": 1.8}
        axes.plot(found["place"], mean, color=line.colour, label=line.numbers["name"], **style)
        axes.fill_between(
            found["place"], mean - error, mean + error, color=line.colour, alpha=0.15, linewidth=0
        )
    axes.axvline(0, color=GREY.lower(), linewidth=1, linestyle="--", zorder=1)
    _zero(axes)
    axes.set_xticks(range(-BEFORE, 21, 5))
    axes.set_xlabel("place from the first token that differs")
    axes.set_ylabel(
        "change, nats a token" if what == "change" else "nats a token, from place \N{MINUS SIGN}1"
    )
    _legend(axes, lines)


def _lambdas(axes: Axes, lines: Sequence[Line]) -> None:
    grid = np.logspace(-2, 4, 200)
    for line in lines:
        needed = torch.cat([*line.scored.push.smallest_lambda, torch.empty(0)]).numpy()
        if len(needed):
            share = [float((needed < lam).mean()) for lam in grid]
            axes.plot(grid, share, color=line.colour, linewidth=2, label=line.numbers["name"])
    axes.axvline(PAPERS_LAMBDA, color=GREY.lower(), linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        f"the paper's {PAPERS_LAMBDA:g}",
        (PAPERS_LAMBDA, 0.02),
        xytext=(5, 0),
        textcoords="offset points",
        color=GREY.lower(),
    )
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ticks = [0.01, 0.1, 1, 10, 100, 1000, 10000]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("lambda")
    axes.set_ylabel("of the tokens after the edit")
    _legend(axes, lines, loc="center right")


def _displacement(axes: Axes, lines: Sequence[Line], reference: Line) -> None:
    ches = reference.scored.scores.ches_normalised
    assert ches is not None
    for line in lines:
        change = line.scored.scores.sums("chosen") - reference.scored.scores.sums("chosen")
        axes.scatter(
            ches.numpy(),
            change.numpy(),
            s=16,
            color=line.colour,
            marker=line.marker,
            alpha=0.75,
            linewidths=0,
            label=line.numbers["name"],
        )
    _zero(axes)
    axes.set_xlabel("length-normalised CHES of the reference")
    axes.set_ylabel("change of the chosen log-prob")
    _legend(axes, lines)


def _ches(axes: Axes, lines: Sequence[Line]) -> None:
    values = [line.scored.scores.ches_normalised for line in lines]
    known = [x.numpy() for x in values if x is not None]
    edges = np.histogram_bin_edges(np.concatenate(known), bins=20)
    for line, ches in zip(lines, known, strict=True):
        style: dict[str, Any] = {"histtype": "step", "linewidth": 2, "color": line.colour}
        axes.hist(ches, bins=list(edges), label=line.numbers["name"], **style)
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel("length-normalised CHES")
    axes.set_ylabel("pairs")
    _legend(axes, lines)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
