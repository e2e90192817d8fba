"""``fastdpop pairs stats``: how much preference pairs share, as a table, as JSON and as a picture."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastdpop.installed import needs
from fastdpop.prefix.stats import PairStatistics, Work, pair_statistics
from fastdpop.train.model import Source, load_tokenizer, model_source, trusts
from fastdpop.train.parse import Asked, parse
from fastdpop.train.picture import BLUE, GREY, ORANGE
from fastdpop.train.run import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Ids = list[list[int]]

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}
PICTURES = (".png", ".svg", ".pdf")
_WINDOWS = {
    "attention": "sliding_window",  # of all layers, where they are not told apart
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
"""Kinds of layers that do not see all, and what in a configuration says how much."""
_NAMES_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def report(
    options: Sequence[str],
    name: str,
    batch_pairs: int,
    *,
    picture: Path | None = None,
    as_json: bool = False,
) -> None:
    """Read pairs, print their statistics, and draw them where `picture` says.

    Args:
        options: those of ``fastdpop train`` that say what is read, and how.
        name: what the pairs are called.

    Raises:
        ValueError, OSError, ImportError: with a message for the user.
    """
    if picture is not None:
        _check(picture)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        asked, source, pairs = read_pairs(options)
    revision = {} if source.adapter else {"revision": asked.model.model_revision}
    work, why = model_work(source.base, trust_remote_code=trusts(asked), **revision)
    statistics = pair_statistics(*pairs, batch_pairs, work)
    numbers = summary(statistics, batch_pairs, why)
    print(json.dumps(numbers, indent=1) if as_json else "\n" + table(numbers))
    if picture is not None:
        draw(statistics, numbers, name, picture)
        if not as_json:
            print(f"Picture: {picture}")


def read_pairs(options: Sequence[str]) -> tuple[Asked, Source, tuple[Ids, Ids, Ids]]:
    """What was asked for, whose tokens are meant, and the pairs' own: prompts, chosen and rejected
    completions.

    Raises:
        ValueError, OSError, ImportError: with a message for the user.
    """
    # Nothing is written there, and nothing computed.
    asked = parse([*options, "--output", ".", "--device", "cpu"])
    source = model_source(asked)
    pairs, _ = read(asked, load_tokenizer(asked, source), source)
    prompts, chosen, rejected = (
        list(pairs[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")
    )
    return asked, source, (prompts, chosen, rejected)


def _check(picture: Path) -> None:
    """Beforehand: numbers take a while."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(needs("--picture", "matplotlib", "train"))
    if picture.suffix.lower() not in PICTURES or picture.is_dir():
        raise ValueError(
            f"--picture is {str(picture)!r}, expected a name that ends with {PICTURES}"
        )
    if not picture.absolute().parent.is_dir():
        raise ValueError(f"--picture is {str(picture)!r}: there is no such folder")


def model_work(name: str, **options: Any) -> tuple[Work | None, str | None]:
    """What a model multiplies, from its configuration alone; or None, and why it gets no estimate.

    `options` are those of ``AutoConfig.from_pretrained``, which raises OSError or ValueError.
    """
    config = AutoConfig.from_pretrained(name, **options).get_text_config()
    code = {"trust_remote_code": options.get("trust_remote_code", False)}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **code)
    except Exception as error:  # a model's own code may raise anything
        return None, f"it cannot be made from its configuration: {error}"
    heads = getattr(config, "num_attention_heads", None)
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    other = [kind for kind in kinds if "linear" in kind or "attention" not in kind]
    # Convolutions stand before states that run along the sequence, in layers that may have no name.
    if other or any(isinstance(m, torch.nn.Conv1d) for m in model.modules()) or not heads:
        kind = f" ({other[0]})" if other else ""
        return None, f"{config.model_type} has layers{kind} whose state runs along the sequence"
    own_attention = not getattr(type(model), "_can_set_attn_implementation", lambda: True)()
    if own_attention or "position_ids" not in inspect.signature(model.forward).parameters:
        return None, f"{config.model_type} cannot share prefixes: its attention is its own"
    windows = {kind: getattr(config, option, None) for kind, option in _WINDOWS.items()}
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    head = model.get_output_embeddings().weight
    attention = tuple((width, windows.get(kind)) for kind in kinds)
    return Work(_linear(model, config, head), head.numel(), attention), None


def _linear(model: torch.nn.Module, config: Any, head: torch.Tensor) -> int:
    """Weights that a token goes through: all matrices but embeddings and the head, of its experts only."""
    experts = next((n for n in (getattr(config, x, None) for x in _NAMES_OF_EXPERTS) if n), 1)
    active = getattr(config, "num_experts_per_tok", None) or experts
    total = 0.0
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        routed = "experts" in path.split(".")
        for weight in module.parameters(recurse=False):
            if weight.dim() > 1 and weight is not head:
                total += weight.numel() * (active / experts if routed else 1)
    return round(total)


def summary(statistics: PairStatistics, batch_pairs: int, why: str | None) -> dict[str, Any]:
    """The numbers, for JSON. `why` there is no estimate of a step's speed-up, where there is none."""
    batches = statistics.batches
    speedups = [batch.speedup for batch in batches if batch.speedup is not None]
    distances = {"positional": statistics.positional, "levenshtein": statistics.levenshtein}
    tokens = {name: statistics.total(name) for name in ("padded", "real", "tree")}
    return {
        "pairs": len(statistics.positional),
        "prompts": statistics.prompts,
        "batch_pairs": batch_pairs,
        "batches": len(batches),
        "tokens": tokens,
        "completion_tokens_shared": statistics.shared,
        "edit_distance": {
            name: {"mean": float(np.mean(values)), "median": float(np.median(values))}
            for name, values in distances.items()
        },
        "gain": {"all": tokens["padded"] / tokens["tree"]}
        | _quantiles([batch.gain for batch in batches]),
        "estimated_speedup": {"all": statistics.speedup} | _quantiles(speedups)
        if speedups
        else None,
        "no_estimate": why,
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}


def table(numbers: dict[str, Any]) -> str:
    """The numbers for a reader."""
    tokens, distances = numbers["tokens"], numbers["edit_distance"]
    lines = [
        f"{'pairs':38}{numbers['pairs']:>12,}",
        f"{'distinct prompts':38}{numbers['prompts']:>12,}",
        f"{'batches of ' + format(numbers['batch_pairs'], ',') + ' pairs':38}{numbers['batches']:>12,}",
        f"{'tokens, padded':38}{tokens['padded']:>12,}",
        f"{'tokens, real':38}{tokens['real']:>12,}",
        f"{'tokens, in the trees':38}{tokens['tree']:>12,}",
        f"{'completions, in a beginning they share':38}{numbers['completion_tokens_shared']:>12.1%}",
        "",
        f"{'edit distance, of the longer completion':40}{'mean':>10}{'median':>10}",
    ]
    for title, name in (
        ("  by position (Hamming)", "positional"),
        ("  Levenshtein", "levenshtein"),
    ):
        row = distances[name]
        lines.append(f"{title:40}{row['mean']:>10.1%}{row['median']:>10.1%}")
    columns = "".join(f"{name:>10}" for name in ("all", *QUANTILES))
    lines += ["", f"{'of each batch':30}{columns}"]
    for title, name in (
        ("tokens, padded / in the tree", "gain"),
        ("speed-up of a step, estimate", "estimated_speedup"),
    ):
        if numbers[name] is not None:
            values = "".join(f"{value:>8.2f} x" for value in numbers[name].values())
            lines.append(f"{title:30}{values}")
    if numbers["no_estimate"]:
        lines.append(f"no estimate of a step's speed-up: {numbers['no_estimate']}")
    else:
        lines.append(
            "(estimate: floating-point operations of policy and reference, padded / in the tree; not measured)"
        )
    return "\n".join(lines)


def draw(statistics: PairStatistics, numbers: dict[str, Any], name: str, path: Path) -> None:
    """Histograms of each batch's gain and of each pair's edit distance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    gains, distances = figure.subplots(1, 2)
    _gains(gains, [batch.gain for batch in statistics.batches], numbers)
    _distances(distances, statistics)
    for axes in (gains, distances):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    tokens = numbers["tokens"]
    figure.suptitle(
        f"What preference pairs share: {numbers['gain']['all']:.2f} x fewer tokens to compute",
        fontsize=15,
        fontweight="bold",
    )
    figure.supxlabel(
        f"{Path(name).name[-60:]}: {numbers['pairs']:,} pairs of {numbers['prompts']:,} prompts, "
        f"{tokens['padded']:,} tokens padded, {tokens['tree']:,} in trees.",
        fontsize=9,
        color=GREY,
        parse_math=False,
    )
    figure.savefig(path)


def _gains(axes: Axes, gains: Sequence[float], numbers: dict[str, Any]) -> None:
    low, high, overall = min(gains), max(gains), numbers["gain"]["all"]
    bins = min(24, round(len(gains) ** 0.5) + 1)
    edges = np.linspace(low, high, bins + 1) if high > low else np.array([low - 0.05, low + 0.05])
    axes.hist(gains, bins=list(edges), color=BLUE, edgecolor="white", linewidth=0.5)
    axes.axvline(overall, color=ORANGE, linewidth=2)
    axes.margins(y=0.12)  # room for the label
    left = overall > (low + high) / 2
    axes.annotate(
        f"all together: {overall:.2f}",
        (overall, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-8 if left else 8, -12),
        textcoords="offset points",
        ha="right" if left else "left",
        color=ORANGE,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    axes.set_title(f"Batches of {numbers['batch_pairs']:,} pairs", loc="left", pad=10)
    axes.set_xlabel("tokens padded for each one in the tree", fontsize=11)
    axes.set_ylabel("batches", fontsize=11)


def _distances(axes: Axes, statistics: PairStatistics) -> None:
    edges = [i / 25 for i in range(26)]
    for values, label, colour in (
        (statistics.positional, "by position (Hamming)", BLUE),
        (statistics.levenshtein, "Levenshtein", ORANGE),
    ):
        axes.hist(values, bins=edges, histtype="stepfilled", color=colour, alpha=0.15)
        axes.hist(values, bins=edges, histtype="step", color=colour, linewidth=2)
        axes.plot([], [], color=colour, linewidth=2, label=f"{label}, mean {np.mean(values):.1%}")
    axes.legend(framealpha=1, edgecolor="none", labelcolor="linecolor")
    axes.set_title("Chosen against rejected", loc="left", pad=10)
    axes.set_xlabel("edit distance, of the longer completion", fontsize=11)
    axes.set_ylabel("pairs", fontsize=11)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
