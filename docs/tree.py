"""Draws docs/assets/tree.png: python docs/tree.py"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

# Okabe and Ito: told apart with every kind of colour vision.
PROMPT, COMMON, CHOSEN, REJECTED = "#56B4E9", "#009E73", "#E69F00", "#D55E00"
INK, PADDING = "#222222", "#E4E4E4"


class Box(NamedTuple):
    """A run of tokens: where it starts and ends, in tokens, its line, and what it says."""

    start: float
    stop: float
    line: float
    colour: str
    text: str = ""


QUESTION = "Angela slept 6.5 hours every night ..."
COMMON_TEXT = "8.5 - 6.5 ="
GOOD, BAD = "2 more hours, so 62", "5 more hours, so 62"
AS_BATCH = [
    Box(0, 48, 3, PROMPT, QUESTION),
    Box(48, 63, 3, COMMON, COMMON_TEXT),
    Box(63, 89, 3, CHOSEN, GOOD),
    Box(89, 100, 3, PADDING),
    Box(0, 30, 2, PROMPT, "Sam buys 3 pens ..."),
    Box(30, 45, 2, COMMON, "3 x 4 ="),
    Box(45, 64, 2, CHOSEN, "12 dollars"),
    Box(64, 100, 2, PADDING, "padding"),
    Box(0, 48, 1, PROMPT, QUESTION),
    Box(48, 63, 1, COMMON, COMMON_TEXT),
    Box(63, 89, 1, REJECTED, BAD),
    Box(89, 100, 1, PADDING),
    Box(0, 30, 0, PROMPT, "Sam buys 3 pens ..."),
    Box(30, 45, 0, COMMON, "3 x 4 ="),
    Box(45, 64, 0, REJECTED, "11 dollars"),
    Box(64, 100, 0, PADDING, "padding"),
]
AS_TREE = [
    Box(0, 48, 2.5, PROMPT, QUESTION),
    Box(48, 63, 2.5, COMMON, COMMON_TEXT),
    Box(63, 89, 3, CHOSEN, GOOD),
    Box(63, 89, 2, REJECTED, BAD),
    Box(0, 30, 0.5, PROMPT, "Sam buys 3 pens ..."),
    Box(30, 45, 0.5, COMMON, "3 x 4 ="),
    Box(45, 64, 1, CHOSEN, "12 dollars"),
    Box(45, 64, 0, REJECTED, "11 dollars"),
]


def draw(axes: Axes, boxes: list[Box], title: str) -> None:
    for box in boxes:
        axes.add_patch(
            FancyBboxPatch(
                (box.start + 0.5, box.line - 0.34),
                box.stop - box.start - 1,
                0.68,
                boxstyle="round,pad=0,rounding_size=0.12",
                mutation_aspect=0.08,
                facecolor=box.colour,
                edgecolor="none",
            )
        )
        axes.text(
            (box.start + box.stop) / 2,
            box.line,
            box.text,
            ha="center",
            va="center",
            fontsize=8.5,
            color="#777777" if box.colour == PADDING else INK,
        )
    for box in boxes:
        for below in boxes:
            if below.start == box.stop and 0 < abs(below.line - box.line) < 1:
                axes.plot(
                    [box.stop - 0.5, below.start + 0.5],
                    [box.line, below.line],
                    color=INK,
                    linewidth=1.2,
                    zorder=0,
                )
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.6, 3.6)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 2.6), dpi=150)
    draw(left, AS_BATCH, "Two pairs as a padded batch")
    draw(right, AS_TREE, "The same as a tree: half of the tokens")
    figure.tight_layout(w_pad=3)
    figure.savefig(Path(__file__).with_name("assets") / "tree.png", facecolor="white")


if __name__ == "__main__":
    main()
