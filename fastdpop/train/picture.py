"""The picture of a run: its loss, log-ratios and hinge over its steps, from what was logged."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpop.train.report import Moved, by_step, moved

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "training.png"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"  # of Okabe and Ito: safe for colour-blind eyes
MINUS = "\N{MINUS SIGN}"

Rows = Sequence[dict[str, Any]]
"""Lines of what a trainer has logged, in the order of their steps."""


def drawn(history: Rows, folder: Path) -> str | None:
    """Draw a run into its folder, and say where; or why there is no picture. None where nothing was logged."""
    train, held_out = by_step(history, "loss"), by_step(history, "eval_loss")
    if not train:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        return "No picture of the run, for want of matplotlib: pip install matplotlib"
    try:
        draw(train, held_out, folder / PICTURE)
    except OSError as error:  # the run is not lost
        return f"No picture of the run: {error}"
    return f"Picture: {folder / PICTURE}"


def draw(train: Rows, held_out: Rows, path: Path) -> None:
    """Three panels side by side.

    Args:
        train: what steps logged; at least one line.
        held_out: what evaluations logged, if there were any.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    loss, logratios, shares = figure.subplots(1, 3)
    loss.set_title("Loss", loc="left")
    _curve(loss, train, held_out, "loss", "loss", GREY)
    last = max(row["step"] for row in (*train, *held_out))
    logratios.set_title(_verdict(held_out, last), loc="left")
    logratios.set_ylabel(f"log-ratio, policy {MINUS} reference (nats)")
    logratios.axhline(0, color=GREY, linewidth=1, zorder=0)
    _curve(logratios, train, held_out, "logratios/chosen", "chosen", BLUE)
    _curve(logratios, train, held_out, "logratios/rejected", "rejected", ORANGE, "--")
    shares.set_title("Share of pairs", loc="left")
    shares.set_ylim(-0.03, 1.03)
    _curve(shares, train, held_out, "hinge_on", "hinge on", BLUE)
    _curve(shares, train, held_out, "rewards/accuracies", "told apart", GREY, "--")
    for axes in (loss, logratios, shares):
        plain(axes)
        axes.set_xlabel("training step")
        axes.set_xlim(-0.03 * last, 1.03 * last)
        axes.xaxis.get_major_locator().set_params(integer=True)
        columns = 2 if held_out else 1
        axes.legend(
            frameon=False,
            fontsize=9,
            loc="upper left",
            bbox_to_anchor=(0, -0.16),
            ncols=columns,
        )
    figure.savefig(path)


def _verdict(held_out: Rows, last: int) -> str:
    """What became of held-out chosen completions, and up to which step where a run was not evaluated at its end."""
    if not held_out:
        return "Log-ratios"
    name = "eval_logratios/chosen"
    said = {
        Moved.NOT: "Chosen completions are as likely as before",
        Moved.UNCLEAR: "What chosen completions became may be chance",
        Moved.UP: "Chosen completions became more likely",
        Moved.DOWN: "Chosen completions became less likely",
    }[moved(held_out[-1][name], held_out[-1][f"{name}_standard_error"])]
    step = held_out[-1]["step"]
    return said if step == last else f"{said} (step {step})"


def plain(axes: Axes) -> None:
    """Horizontal lines behind the curves, and no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _curve(
    axes: Axes, train: Rows, held_out: Rows, name: str, label: str, colour: str, line: str = "-"
) -> None:
    """A metric of training, and where there are held-out pairs, theirs before it."""
    steps, values = _of(train, name)
    behind = bool(held_out)
    axes.plot(
        steps,
        values,
        line,
        color=colour,
        linewidth=1.2 if behind else 2,
        alpha=0.45 if behind else 1,
        marker="o" if len(steps) < 2 else None,
        label=f"{label}, training" if behind else label,
    )
    if not behind:
        return
    steps, values = _of(held_out, f"eval_{name}")
    _, errors = _of(held_out, f"eval_{name}_standard_error")
    if errors:
        low, high = ([v + s * e for v, e in zip(values, errors, strict=True)] for s in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        steps,
        values,
        line,
        color=colour,
        linewidth=2.2,
        marker="o",
        markersize=4,
        label=f"{label}, held out",
    )


def _of(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric."""
    there = [row for row in rows if name in row]
    return [row["step"] for row in there], [row[name] for row in there]
