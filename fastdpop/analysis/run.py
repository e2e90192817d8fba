"""``fastdpop analyze``: from models and pairs to a page, a picture and a file of numbers."""

from __future__ import annotations

import gc
import importlib.util
import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastdpop
from fastdpop.analysis.charts import SERIES, charts, draw, lines_of
from fastdpop.analysis.numbers import Numbers, Scored, of_model, of_pairs, per_pair
from fastdpop.analysis.page import page
from fastdpop.analysis.score import score_pairs
from fastdpop.analysis.words import summary
from fastdpop.hf import attach
from fastdpop.installed import needs
from fastdpop.train.checkpoint import make
from fastdpop.train.model import Source, load_model, load_tokenizer, model_source
from fastdpop.train.parse import Asked, parse
from fastdpop.train.run import read

REFERENCE = "reference"
NAMES = ("analysis.html", "analysis.png", "analysis.json")


@dataclass(frozen=True)
class Job:
    """What is to be analysed.

    Attributes:
        models: paths or names of models or adapters; `names` of them, as many or none.
        reference: path or name of the reference; None for the base model of adapters, if there is one.
        pairs: where the pairs are; `reading` how they are read: options of ``fastdpop train``.
        limit: the most pairs that are scored, drawn with `seed`.
        batch_pairs: in one forward pass.
        device, dtype: of the models; None for an accelerator, if there is one.
        examples: pairs that are shown of each kind.
        output: the folder of the results.
    """

    models: Sequence[str]
    names: Sequence[str]
    reference: str | None
    pairs: str
    reading: Sequence[str]
    limit: int
    seed: int
    batch_pairs: int
    device: str | None
    dtype: str
    examples: int
    output: Path


@dataclass(frozen=True)
class _Named:
    name: str
    path: str
    asked: Asked
    source: Source


def analyze(job: Job) -> None:
    """Read, score, write the results, and say what they are.

    Raises:
        ValueError, OSError, ImportError: with a message for the user.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(needs("fastdpop analyze", "matplotlib", "train"))
    names = _names(job)
    if "--model_revision" in job.reading and len(job.models) > 1:
        raise ValueError(
            f"--model-revision is given for {len(job.models)} models, expected one --model: give folders instead"
        )
    make(job.output)
    named = [_look(job, name, path) for name, path in zip(names, job.models, strict=True)]
    base = _reference(job, named)
    tokenizer = load_tokenizer(named[0].asked, named[0].source)
    everyone = [*named, *([base] if base else [])]
    for other in everyone[1:]:
        _check_tokens(tokenizer, named[0], other)
    dataset, _ = read(named[0].asked, tokenizer, named[0].source)
    pairs = list(dataset.select(_drawn(len(dataset), job.limit, job.seed)))
    for other in everyone[1:]:
        _check_vocabulary(pairs, other)
    scored = [_score(job, model, pairs) for model in everyone]
    models, reference = scored[: len(named)], scored[len(named)] if base else None
    numbers: Numbers = {
        "fastdpop": fastdpop.__version__,
        "dtype": job.dtype,
        "pairs": {"source": job.pairs, "read": len(dataset), "seed": job.seed, **of_pairs(pairs)},
        "reference": of_model(reference, None) if reference else None,
        "models": [of_model(model, reference) for model in models],
        "by_pair": per_pair(pairs, models, reference),
    }
    numbers["summary"] = summary(numbers)
    _write(job, numbers, pairs, models, reference, tokenizer)


def _write(
    job: Job,
    numbers: Numbers,
    pairs: Sequence[Any],
    models: Sequence[Scored],
    reference: Scored | None,
    tokenizer: Any,
) -> None:
    html, picture, values = (job.output / name for name in NAMES)
    found = charts(lines_of(numbers, models, reference))
    names = ", ".join(model.name for model in models)
    against = f", against {Path(reference.path).name[-60:]}" if reference else ""
    note = f"{Path(job.pairs).name[-60:]}: {len(pairs):,} pairs{against}. Bands and bars: ± 1 standard error."
    draw(found, f"Log-probs around the edit: {names}", note, picture)
    text = page(numbers, found, pairs, models, reference, tokenizer, job.examples)
    html.write_text(text, encoding="utf-8")
    values.write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print("\n" + "\n".join(numbers["summary"]))
    print(f"\nReport: {html}, picture: {picture}, numbers: {values}")


def _names(job: Job) -> list[str]:
    """What the models are called: as was said, or else by their folders' names, or else by their whole paths."""
    if len(job.models) > len(SERIES):
        raise ValueError(
            f"--model is given {len(job.models)} times, expected at most {len(SERIES)}"
        )
    if job.names and len(job.names) != len(job.models):
        raise ValueError(
            f"--name is given {len(job.names)} times, expected once for each of {len(job.models)} --model"
        )
    names = list(job.names) or [Path(path).name or path for path in job.models]
    if len({*names, REFERENCE}) <= len(names) and not job.names:
        names = list(job.models)
    if len({*names, REFERENCE}) <= len(names):
        raise ValueError(
            f"the models are called {names}, expected names of which no two are the same and none is {REFERENCE!r}: "
            "give each a --name"
        )
    return names


def _look(job: Job, name: str, path: str, reading: Sequence[str] | None = None) -> _Named:
    """The options of a model, and its configuration."""
    device = [] if job.device is None else ["--device", job.device]
    asked = parse(
        [
            *("--pairs", job.pairs, "--model", path, "--dtype", job.dtype, "--output", "."),
            *device,
            *(job.reading if reading is None else reading),
        ]
    )
    try:
        return _Named(name, path, asked, model_source(asked))
    except ValueError as error:
        option = "--reference is" if name == REFERENCE else "--model is"
        raise ValueError(str(error).replace("--model is", option, 1)) from None


def _reference(job: Job, named: Sequence[_Named]) -> _Named | None:
    """The reference model; without one, the base of the models that are adapters, if it is one."""
    path = job.reference
    if path is None:
        bases = {model.source.base for model in named if model.source.adapter is not None}
        if len(bases) > 1:
            raise ValueError(
                f"the models are adapters of {sorted(bases)}, expected one base, or a --reference"
            )
        if not bases:
            return None
        (path,) = bases
        print(f"Reference: {path}, the adapters' base")
    reading = list(job.reading)
    if "--model_revision" in reading:  # of --model
        at = reading.index("--model_revision")
        del reading[at : at + 2]
    return _look(job, REFERENCE, path, reading)


def _check_tokens(tokenizer: Any, first: _Named, other: _Named) -> None:
    """
    Raises:
        ValueError: another model has another vocabulary. One without a tokenizer is taken at its word.
    """
    if first.asked.own.tokenizer:
        return
    try:
        own = load_tokenizer(other.asked, other.source)
    except (ValueError, OSError):
        return
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{other.path}: its tokenizer is not that of {first.path}, expected models of one tokenizer, whose "
            "log-probs can be compared token by token"
        )
    if own.chat_template != tokenizer.chat_template:
        warnings.warn(
            f"{other.path}: its chat template is not that of {first.path}, with which all pairs are written",
            stacklevel=2,
        )


def _check_vocabulary(pairs: Sequence[Any], model: _Named) -> None:
    """
    Raises:
        ValueError: a token has no embedding in another model than the first.
    """
    rows = model.source.vocab_size
    highest = max(
        max(pair[f"{side}_ids"], default=0)
        for pair in pairs
        for side in ("prompt", "chosen", "rejected")
    )
    if rows is not None and highest >= rows:
        raise ValueError(
            f"{model.path}: its embedding has {rows} rows, and the pairs have a token of id {highest}: expected "
            "models of one tokenizer"
        )


def _drawn(count: int, limit: int, seed: int) -> list[int]:
    """Places of the pairs that are scored, in their order."""
    return sorted(random.Random(seed).sample(range(count), min(count, limit)))


def _score(job: Job, model: _Named, pairs: Sequence[Any]) -> Scored:
    loaded, _, _ = load_model(model.asked, model.source)
    device = torch.device("cpu")
    if not model.asked.config.use_cpu:
        kind = torch.accelerator.current_accelerator()
        device = torch.device(str(kind), torch.accelerator.current_device_index())
    loaded = loaded.to(device)
    try:
        attach(loaded)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(f"{model.path} cannot be analysed: {error}") from error
    print(f"{model.name}: {model.path}", flush=True)
    scores = score_pairs(loaded, pairs, batch_pairs=job.batch_pairs, progress=True)
    del loaded
    gc.collect()  # before the next one is loaded
    found = Scored.of(model.name, model.path, scores, pairs)
    bad = [
        i
        for i, x in enumerate(scores.chosen_logps + scores.rejected_logps)
        if not x.isfinite().all()
    ]
    if bad:
        place = pairs[bad[0] % len(pairs)]["place"]
        raise ValueError(
            f"{model.path}: its log-probs of {place} are not finite, expected a model that has not diverged"
        )
    return found
