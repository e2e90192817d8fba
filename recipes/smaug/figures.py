"""The counterparts of the paper's figures 2 to 6, and of an ablation of lambda that it does not have."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpop.train.picture import BLUE, GREY, ORANGE
from recipes.smaug.runs import BETA, BETAS, LAMBDAS, UNTRAINED
from recipes.smaug.tables import TITLES, Arm, Result, Results, Spread, course, last, side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREEN = "#009E73"
COLOURS = {UNTRAINED: GREY, "dpo": ORANGE, "ipo": GREEN, "dpop": BLUE}
MODEL = "SmolLM2-135M-Instruct"
PER_TOKEN = "log-probability per token (nats)"
MINUS = "\N{MINUS SIGN}"


def draw(results: Results, folder: Path) -> Iterator[Path]:
    """Each picture whose runs are finished."""
    for name, (painter, needs) in FIGURES.items():
        if not all(results.get(arm) for arm in needs):
            continue
        path = folder / f"{name}.png"
        _save(painter(results), path)
        yield path


def _save(figure: Figure, path: Path) -> None:
    """With 256 colours, in a third of the bytes."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)


def _figure(title: str, below: str, size: tuple[float, float] = (10, 4.6)) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    figure.supxlabel(below, fontsize=9, color=GREY)
    return figure


def _plain(axes: Axes, title: str, ylabel: str = "", xlabel: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, pad=8)
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _line(
    axes: Axes, xs: Sequence[float], ys: Sequence[Spread], colour: str, label: str, style: str = "-"
) -> None:
    """The mean over seeds, in the band from the least to the greatest."""
    axes.fill_between(
        xs, [y.low for y in ys], [y.high for y in ys], color=colour, alpha=0.18, linewidth=0
    )
    axes.plot(
        xs,
        [y.mean for y in ys],
        style,
        color=colour,
        label=label,
        linewidth=2,
        marker="o",
        markersize=3.5,
    )


def _seeds(results: Sequence[Result]) -> str:
    count = len(results)
    return "One seed." if count == 1 else f"Means over {count} seeds; bands and dots: each seed."


def _bars(axes: Axes, spreads: dict[str, Spread], form: str) -> None:
    """A bar for each loss, with a dot for each seed and the mean in figures."""
    for i, (loss, spread) in enumerate(spreads.items()):
        axes.bar(i, spread.mean, color=COLOURS[loss], width=0.66, alpha=0.85)
        axes.plot([i] * len(spread.values), spread.values, "o", color="black", markersize=3.5)
        end = spread.low if spread.mean < 0 else spread.high
        axes.annotate(
            format(spread.mean, form).replace("-", MINUS),
            (i, end),
            xytext=(0, -6 if spread.mean < 0 else 6),
            textcoords="offset points",
            ha="center",
            va="top" if spread.mean < 0 else "bottom",
            fontsize=10,
        )
    axes.set_xticks(range(len(spreads)), [TITLES[loss] for loss in spreads])
    axes.margins(y=0.16)


def _of_losses(
    results: Results, data: str, pick: Callable[[Any], float], losses: Sequence[str]
) -> dict[str, Spread]:
    return {loss: last(results[Arm.of(data, loss)], pick) for loss in losses}


def figure2(results: Results) -> Figure:
    """Task scores of the three losses."""
    arc = all(results.get(Arm.of("arc", loss)) for loss in TITLES)
    trained = list(TITLES)[1:]
    figure = _figure(
        "After training: DPO, IPO and DPOP against the untrained model",
        f"{MODEL}, held-out problems of GSM8K{' and all test questions of ARC-Challenge' if arc else ''}. "
        + _seeds(results[Arm.of("gsm8k", "dpo")]),
        (12 if arc else 8.5, 4.6),
    )
    axes = figure.subplots(1, 3 if arc else 2, width_ratios=[4, 3, 4.6] if arc else [4, 3])
    _plain(axes[0], "GSM8K: correct solution after the edit", PER_TOKEN)
    _bars(
        axes[0],
        _of_losses(results, "gsm8k", side("held_out", "chosen", "after_text"), [*TITLES]),
        ".2f",
    )
    _plain(axes[1], "GSM8K: pairs told apart", "share of held-out pairs")
    _bars(
        axes[1], _of_losses(results, "gsm8k", lambda e: e["held_out"]["told_apart"], trained), ".0%"
    )
    if arc:
        _plain(axes[2], "ARC-Challenge: questions answered", "accuracy (pale: acc_norm)")
        for i, loss in enumerate(TITLES):
            for shift, name, alpha in ((-0.2, "acc", 0.9), (0.2, "acc_norm", 0.45)):
                found = Spread([r["questions"][name] for r in results[Arm.of("arc", loss)]])
                axes[2].bar(i + shift, found.mean, 0.38, color=COLOURS[loss], alpha=alpha)
                axes[2].plot(
                    [i + shift] * len(found.values), found.values, "o", color="black", markersize=3
                )
                axes[2].annotate(
                    f"{100 * found.mean:.1f}", (i + shift, found.high), xytext=(0, 5),
                    textcoords="offset points", ha="center", fontsize=9,
                )  # fmt: skip
        axes[2].set_xticks(range(len(TITLES)), list(TITLES.values()))
        axes[2].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes[2].margins(y=0.12)
    axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return figure


def figure3(results: Results) -> Figure:
    """Chosen log-probs of training pairs against the step, and of held-out ones by place around the edit."""
    figure = _figure(
        "GSM8K: when and where training changes correct solutions",
        f"{MODEL}. Middle and right: held-out pairs after training; place 0 is the first token that differs. "
        + _seeds(results[Arm.of("gsm8k", "dpo")]),
        (13, 4.8),
    )
    axes = figure.subplots(1, 3)
    place = "place relative to the first differing token"
    _plain(axes[0], "Correct solutions of the training set", PER_TOKEN, "training step")
    _plain(axes[1], f"Log-probability, less that at place {MINUS}1", "nats", place)
    _plain(axes[2], "Change of the log-probability by training", "nats", place)
    for loss in list(TITLES)[1:]:
        arm = Arm.of("gsm8k", loss)
        steps, ys = course(results, arm, side("train", "chosen", "per_token"))
        _line(axes[0], steps, ys, COLOURS[loss], TITLES[loss])
    untrained = results[Arm.of("gsm8k", UNTRAINED)]
    for loss in TITLES:
        own = results[Arm.of("gsm8k", loss)]
        style = ":" if loss == UNTRAINED else "-"
        _line(axes[1], *_relative(own, None), COLOURS[loss], TITLES[loss], style)
        if loss != UNTRAINED:
            _line(axes[2], *_relative(own, untrained), COLOURS[loss], TITLES[loss])
    axes[0].legend(frameon=False)
    axes[1].legend(frameon=False, fontsize=9)
    for panel in axes[1:]:
        panel.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
    axes[2].axhline(0, color=GREY, linewidth=0.8)
    return figure


def _relative(
    results: Sequence[Result], untrained: Sequence[Result] | None
) -> tuple[list[int], list[Spread]]:
    """By place, relative to the place before the edit or to the untrained model; places that fewer than half
    of the pairs have are left out.
    """
    positions = [r["evaluations"][-1]["held_out"]["by_position"] for r in results]
    places, pairs = positions[0]["places"], positions[0]["pairs"]
    kept = [i for i in range(len(places)) if 2 * pairs[i] >= max(pairs)]
    if untrained is None:
        before = places.index(-1)
        bases = [[p["means"][before]] * len(places) for p in positions]
    else:
        # The held-out pairs are the same for all seeds.
        own = untrained[0]["evaluations"][-1]["held_out"]["by_position"]["means"]
        bases = [own] * len(positions)
    return [places[i] for i in kept], [
        Spread([p["means"][i] - base[i] for p, base in zip(positions, bases, strict=True)])
        for i in kept
    ]


def figure4(results: Results) -> Figure:
    """Held-out solutions after the edit for several beta."""
    figure = _figure(
        "GSM8K: DPO and DPOP with several beta",
        f"{MODEL}, correct solutions to held-out problems, tokens after the edit. "
        + _seeds(results[Arm.of("gsm8k", "dpo")]),
    )
    panels = figure.subplots(1, 2, sharey=True)
    for axes, loss in zip(panels, ("dpo", "dpop"), strict=True):
        _plain(axes, TITLES[loss], PER_TOKEN if loss == "dpo" else "", "training step")
        for beta, style in zip(BETAS, (":", "-", "--"), strict=True):
            arm = Arm.of("gsm8k", loss, beta=beta)
            steps, ys = course(results, arm, side("held_out", "chosen", "after"))
            _line(axes, steps, ys, COLOURS[loss], f"beta {beta:g}", style)
        axes.legend(frameon=False, loc="lower left", handlelength=3.2)
    return figure


def _train_and_held_out(data: str, title: str) -> Callable[[Results], Figure]:
    def paint(results: Results) -> Figure:
        figure = _figure(title, f"{MODEL}. {_seeds(results[Arm.of(data, 'dpo')])}", (11, 4.6))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name, said in zip(
            panels, ("train", "held_out"), ("Training set", "Held out"), strict=True
        ):
            _plain(axes, said, PER_TOKEN if name == "train" else "", "training step")
            for loss in list(TITLES)[1:]:
                for of, style in (("chosen", "-"), ("rejected", "--")):
                    steps, ys = course(
                        results,
                        Arm.of(data, loss),
                        side(name, of, "per_token"),
                    )
                    label = f"{TITLES[loss]}, {of}"
                    _line(axes, steps, ys, COLOURS[loss], label, style)
        lines = panels[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside right center", frameon=False, handlelength=3.2)
        return figure

    return paint


def figure_lambda(results: Results) -> Figure:
    """The end of training against lambda."""
    figure = _figure(
        "GSM8K: lambda of DPOP",
        f"{MODEL}, held-out pairs at the end; lambda 0 is DPO. "
        + _seeds(results[Arm.of("gsm8k", "dpo")]),
    )
    left, right = figure.subplots(1, 2)
    runs = [
        results[Arm.of("gsm8k", "dpo")],
        *(results[Arm.of("gsm8k", "dpop", lam=x)] for x in LAMBDAS),
    ]
    xs = list(range(len(runs)))
    _plain(left, "Change of log-probability", "nats per solution, mean", "lambda")
    for of, colour, style in (("chosen", BLUE, "-"), ("rejected", ORANGE, "--")):
        ys = [last(found, side("held_out", of, "change")) for found in runs]
        _line(left, xs, ys, colour, {"chosen": "correct", "rejected": "corrupted"}[of], style)
    left.axhline(0, color=GREY, linewidth=1, zorder=0)
    left.legend(frameon=False)
    _plain(right, "Correct solution after the edit", PER_TOKEN, "lambda")
    after = side("held_out", "chosen", "after")
    _line(right, xs, [last(found, after) for found in runs], BLUE, "trained")
    before = last(results[Arm.of("gsm8k", UNTRAINED)], after).mean
    right.axhline(before, color=GREY, linestyle=":", label="untrained")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(xs, ["0", *(f"{x:g}" for x in LAMBDAS)])
    return figure


_GSM8K, _ARC = ([Arm.of(data, loss) for loss in TITLES] for data in ("gsm8k", "arc"))
_BETAS = [Arm.of("gsm8k", loss, beta=b) for loss in ("dpo", "dpop") for b in BETAS if b != BETA]
FIGURES: dict[str, tuple[Callable[[Results], Figure], list[Arm]]] = {
    "figure2": (figure2, _GSM8K),
    "figure3": (figure3, _GSM8K),
    "figure4": (figure4, [*_GSM8K, *_BETAS]),
    "figure5": (
        _train_and_held_out("gsm8k", "GSM8K: correct and corrupted solutions during training"),
        _GSM8K,
    ),
    "figure6": (
        _train_and_held_out("arc", "ARC-Challenge: right and wrong answers during training"),
        _ARC,
    ),
    "lambda": (figure_lambda, [*_GSM8K, *(Arm.of("gsm8k", "dpop", lam=x) for x in LAMBDAS)]),
}
"""Each picture, and the runs that it needs."""
