"""One run: train, watch, and write down what came of it."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdpop
from fastdpop.doctor import cpu
from recipes.smaug.data import Sets, Source, load_sets
from recipes.smaug.measure import (
    Numbers,
    answer_questions,
    pair_numbers,
    position_numbers,
    score,
    sums_of,
)
from recipes.smaug.runs import UNTRAINED, Run

Loader = Callable[[], tuple[Any, Any]]
"""Gives a model and its tokenizer."""
WATCHED = ("held_out", "train")
PACKAGES = ("fastdpop", "torch", "transformers", "trl", "datasets")


def result_file(folder: Path, run: Run) -> Path:
    """Where a run's numbers are; it is there once the run is finished."""
    return folder / f"{run.key}.json"


def perform(run: Run, source: Source, folder: Path, load: Loader, threads: int) -> float:
    """Do a run and write its file; the seconds that it took.

    An untrained run comes first: it leaves the reference's log-probs, which all losses share, beside its file.

    Raises:
        FloatingPointError: a loss or a gradient's norm is not finite.
    """
    torch.set_num_threads(threads)
    start, cpu_start = time.monotonic(), time.process_time()
    model, tokenizer, initial = _loaded(load)
    model.load_state_dict(initial)
    sets = load_sets(run, source, tokenizer)
    references = folder / "references" / f"{run.untrained().key}.pt"
    if run.loss == UNTRAINED:
        numbers = _untrained(model, run, sets, references)
    else:
        known = torch.load(references, weights_only=True)
        numbers = _trained(model, run, sets, known)
    if sets.questions:
        model.eval()
        with torch.no_grad(), _precision(run):
            numbers["questions"] = answer_questions(model, sets.questions)
    wall = time.monotonic() - start
    everything = {
        "name": run.name,
        "settings": asdict(run),
        **numbers,
        "seconds": {"wall": wall, "cpu": time.process_time() - cpu_start},
        "versions": {**{p: version(p) for p in PACKAGES}, "python": platform.python_version()},
        "host": {"processor": cpu()[0], "cores": os.cpu_count(), "threads": threads},
    }
    write(result_file(folder, run), json.dumps(rounded(everything)) + "\n")
    return wall


def write(path: Path, text: str) -> None:
    """All of a file, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_text(text)
    draft.replace(path)


def rounded(value: Any) -> Any:
    """Numbers to five digits, which is more than the seeds agree in."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


@functools.lru_cache(maxsize=1)
def _loaded(load: Loader) -> tuple[Any, Any, dict[str, Tensor]]:
    """A process loads the model once."""
    model, tokenizer = load()
    fastdpop.attach(model)
    return model, tokenizer, {name: w.clone() for name, w in model.state_dict().items()}


def _precision(run: Run) -> contextlib.AbstractContextManager[Any]:
    """For forward passes with the same weights: autocast keeps rounded copies of them until its end."""
    if run.precision == "bfloat16":
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def _packed(sets: Sets) -> Iterator[Any]:
    for groups in sets.batches:
        rows = [row for group in groups for row in group]
        sides = ("prompt_ids", "chosen_ids", "rejected_ids")
        yield fastdpop.pack(*([row[side] for row in rows] for side in sides))[0]


def _untrained(model: Any, run: Run, sets: Sets, references: Path) -> Numbers:
    """Score everything with the reference, which is the model before training."""
    model.eval()
    known: dict[str, Any] = {"batches": []}
    evaluation: Numbers = {"step": 0}
    with torch.no_grad(), _precision(run):
        for batch in _packed(sets):
            known["batches"].append(model(**batch, return_logps=True).logps)
        for name in WATCHED:
            scores = score(model, getattr(sets, name))
            known[name] = sums_of(scores)
            evaluation[name] = pair_numbers(scores, known[name])
            evaluation[name]["by_position"] = position_numbers(scores)
    references.parent.mkdir(parents=True, exist_ok=True)
    draft = references.with_name(f"{references.name}.{os.getpid()}.part")
    torch.save(known, draft)
    draft.replace(references)
    return {"evaluations": [evaluation]}


def _trained(model: Any, run: Run, sets: Sets, known: dict[str, Any]) -> Numbers:
    """Train the model in place."""
    plan, loss = run.schedule, run.make_loss()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, weight_decay=0.0, fused=True
    )
    training, evaluations = [], []
    batches = zip(_packed(sets), known["batches"], strict=True)
    for step, (batch, reference) in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * min(1.0, step / plan.warmup)
        model.train()
        with _precision(run):
            out = model(**batch, preference=loss, ref_logps=fastdpop.exact(reference))
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        training.append(_step_numbers(step, out, norm, reference))
        optimizer.step()
        optimizer.zero_grad()
        if step % plan.every == 0 or step == plan.steps:
            with _precision(run):
                evaluations.append(_evaluation(model, step, sets, known, last=step == plan.steps))
    return {"training": training, "evaluations": evaluations}


def _step_numbers(step: int, out: Any, norm: Tensor, reference: Tensor) -> Numbers:
    """Of a step's batch, before the step."""
    chosen, rejected = (out.logps - reference).chunk(2)
    numbers = {
        "step": step,
        "loss": out.loss.item(),
        "norm": norm.item(),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "hinge_on": float((chosen < 0).double().mean()),
    }
    for name in ("loss", "norm"):
        if not math.isfinite(numbers[name]):
            raise FloatingPointError(f"step {step}: the {name} is {numbers[name]}")
    return numbers


def _evaluation(model: Any, step: int, sets: Sets, known: dict[str, Any], *, last: bool) -> Numbers:
    found: Numbers = {"step": step}
    for name in WATCHED:
        scores = score(model, getattr(sets, name))
        found[name] = pair_numbers(scores, known[name])
        if last:
            found[name]["by_position"] = position_numbers(scores)
    return found
