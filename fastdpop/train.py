"""A small training loop for preference losses on one device.

The order of the batches depends on the seed alone, batches keep their composition from epoch to
epoch, and the reference is scored in those very batches by the same engine. A policy equal to its
reference therefore has log-ratios of exactly zero, and a resumed run repeats an uninterrupted one
bit for bit (on CPU; on GPUs, as far as the model's own kernels are deterministic).
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdpop import losses
from fastdpop.data import Batch, Batches, batch_numbers
from fastdpop.hf import attach, detach
from fastdpop.losses import PreferenceLoss

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"

Metrics = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """How to train; checked when it is made, so that a bad value fails before a model is loaded.

    Attributes:
        loss: the preference loss, as :func:`fastdpop.losses.get` gives it.
        steps: optimizer steps.
        batch_pairs: pairs in one forward pass.
        accumulate: forward passes in one step; their gradients are averaged.
        learning_rate, weight_decay: of AdamW.
        warmup: steps over which the learning rate rises linearly to its full value.
        schedule: after that: ``"constant"``, or ``"cosine"`` down to zero at the last step.
        max_grad_norm: gradients are clipped to this global norm.
        reference: ``"precomputed"`` once before training, or ``"online"`` from a frozen copy (of a
            PEFT model: with its adapter disabled) in every step: the same numbers for more time and
            memory.
        bf16: autocast to bfloat16; the weights that are trained stay in their own type.
        seed: orders the data and seeds dropout.
        eval_every, save_every: steps between evaluations and between checkpoints; 0 for never.
        engine, workspace_bytes: passed to :func:`fastdpop.attach`.
    """

    loss: PreferenceLoss = field(default_factory=lambda: losses.get("dpop"))
    steps: int = 1000
    batch_pairs: int = 4
    accumulate: int = 1
    learning_rate: float = 5e-6
    weight_decay: float = 0.0
    warmup: int = 10
    schedule: str = "constant"
    max_grad_norm: float = 1.0
    reference: str = "precomputed"
    bf16: bool = False
    seed: int = 0
    eval_every: int = 50
    save_every: int = 100
    engine: str = "auto"
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_pairs": 1, "accumulate": 1}
        least |= {"warmup": 0, "eval_every": 0, "save_every": 0, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {bound}")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, expected a positive number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}, expected a number >= 0")
        choices = {"schedule": ("constant", "cosine"), "reference": ("precomputed", "online")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


def train(
    model: nn.Module,
    batches: Batches,
    settings: Settings,
    *,
    held_out: Batches | None = None,
    output: Path | None = None,
    resume: bool = False,
    title: str = "train",
) -> list[Metrics]:
    """Train a causal language model in place; every parameter that requires a gradient is trained.

    Args:
        model: a Hugging Face causal LM or a PEFT model around one, on its device, at the
            reference's weights.
        batches: training data, from :meth:`fastdpop.data.Batches.shuffled`.
        settings: how to train.
        held_out: pairs to evaluate on before the first step, every ``eval_every`` steps and after
            the last.
        output: a folder for ``metrics.jsonl`` and ``checkpoint.pt``; None writes nothing.
        resume: continue from the checkpoint in ``output``.
        title: of the progress bar.

    Returns:
        The metrics, one dict a step and one an evaluation, as in ``metrics.jsonl``.

    Raises:
        ValueError: nothing to train on; the checkpoint belongs to other settings or data.
        FileNotFoundError, FileExistsError: ``resume`` without a checkpoint; a fresh run into a
            folder that holds one.
        FloatingPointError: the loss or the gradient's norm is not finite.
    """
    if not len(batches):
        raise ValueError("there are no training pairs")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient")
    saved = _open_run(output, resume, settings, batches, held_out)
    online = _online_reference(model, settings)
    with _attached(model, settings):
        _score_reference(model, batches, held_out, settings)
        optimizer = _optimizer(trained, settings)
        torch.manual_seed(settings.seed)
        first = _restore(model, optimizer, saved) if saved else 0
        bar = tqdm(total=settings.steps, initial=first, desc=title, unit="step", dynamic_ncols=True)
        with bar, _Log(output, first) as log, _mode(model, training=True):
            if held_out is not None and first == 0:
                log.add(_evaluate(model, held_out, settings, 0))
            for step in range(first, settings.steps):
                metrics = _step(model, optimizer, batches, settings, step, online)
                log.add(metrics)
                bar.set_postfix_str(_summary(metrics), refresh=False)
                bar.update()
                done = step + 1
                last = done == settings.steps
                if held_out is not None and (last or _due(done, settings.eval_every)):
                    log.add(_evaluate(model, held_out, settings, done))
                if output is not None and _due(done, settings.save_every):
                    _save(output, model, optimizer, settings, batches, held_out, done)
    return log.rows


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# ------------------------------------------------------------------------------------------- a step


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    settings: Settings,
    step: int,
    online: _OnlineReference | None,
) -> Metrics:
    sums: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    for number in _batch_numbers(batches, settings, step):
        batch = _on_device(batches[number], model)
        ref_logps = online(batch) if online else batches.ref_logps.get(number)
        if not settings.loss.traits.needs_reference:
            ref_logps = None
        with _autocast(model, settings):
            out = model(
                **batch,
                preference=settings.loss,
                ref_logps=None if ref_logps is None else ref_logps.to(batch["labels"].device),
            )
        (out.loss / settings.accumulate).backward()
        values = {
            "loss": out.loss,
            "chosen_logps": out.chosen_logps.mean(),
            "rejected_logps": out.rejected_logps.mean(),
            "margin": out.margins.mean(),
            "accuracy": out.accuracy,
        }
        if ref_logps is not None:
            chosen, rejected = ref_logps.to(out.chosen_logps).chunk(2)
            values["chosen_logratio"] = (out.chosen_logps - chosen).mean()
            values["rejected_logratio"] = (out.rejected_logps - rejected).mean()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() / settings.accumulate
    rate = settings.learning_rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
    if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step + 1}: the loss is {sums['loss']} and the gradient's norm {norm}; "
            "the weights were not changed by this step"
        )
    optimizer.step()
    return {"step": step + 1, **sums, "grad_norm": norm, "learning_rate": rate}


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    # One fused kernel a step where there is one: on CPU the plain loop takes as long as a small model's forward pass.
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=fused
    )


def _evaluate(model: nn.Module, batches: Batches, settings: Settings, step: int) -> Metrics:
    """Log-ratios ``log pi - log ref`` over all pairs: means, standard errors, and how often chosen leads."""
    differences = []
    with _mode(model, training=False):
        for number in range(len(batches)):
            logps = _logps(model, batches[number], settings).cpu()
            differences.append((logps - batches.ref_logps[number]).view(2, -1))
    chosen, rejected = torch.cat(differences, dim=1).double()
    root = math.sqrt(len(chosen))
    return {
        "step": step,
        "eval_chosen_logratio": chosen.mean().item(),
        "eval_rejected_logratio": rejected.mean().item(),
        "eval_chosen_standard_error": chosen.std(correction=0).item() / root,
        "eval_rejected_standard_error": rejected.std(correction=0).item() / root,
        "eval_accuracy": (chosen > rejected).double().mean().item(),
    }


def _summary(metrics: Metrics) -> str:
    shown = [f"loss {metrics['loss']:.3g}"]
    if "chosen_logratio" in metrics:
        shown.append(
            f"log-ratio chosen {metrics['chosen_logratio']:+.1f} rejected {metrics['rejected_logratio']:+.1f}"
        )
    return ", ".join(shown)


# ---------------------------------------------------------------------------------- the model's side


@torch.no_grad()
def _logps(model: nn.Module, batch: Batch, settings: Settings) -> Tensor:
    alpha = settings.loss.traits.ld_alpha  # policy and reference are weighted alike
    options = None if alpha is None else {"ld_alpha": alpha}
    with _autocast(model, settings):
        logps: Tensor = model(
            **_on_device(batch, model), return_logps=True, preference_options=options
        ).logps
    return logps


class _OnlineReference:
    """The reference's log-probabilities of a batch, computed when they are needed."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.adapter_off = getattr(model, "disable_adapter", None)
        if self.adapter_off is None:
            model = copy.deepcopy(model).requires_grad_(False)
            attach(model, engine=settings.engine, workspace_bytes=settings.workspace_bytes)
        self.model = model

    def __call__(self, batch: Batch) -> Tensor:
        with self.adapter_off() if self.adapter_off else nullcontext(), _mode(self.model, False):
            return _logps(self.model, batch, self.settings)


def _online_reference(model: nn.Module, settings: Settings) -> _OnlineReference | None:
    wanted = settings.reference == "online" and settings.loss.traits.needs_reference
    return _OnlineReference(model, settings) if wanted else None


def _score_reference(
    model: nn.Module, batches: Batches, held_out: Batches | None, settings: Settings
) -> None:
    """Score the reference, while the model still has its weights, on the batches that will be met."""
    needed = [(held_out, number) for number in range(len(held_out))] if held_out else []
    if settings.reference == "precomputed" and settings.loss.traits.needs_reference:
        steps = range(settings.steps)
        met = {n for s in steps for n in _batch_numbers(batches, settings, s)}
        needed += [(batches, number) for number in sorted(met)]
    unknown = [(whose, number) for whose, number in needed if number not in whose.ref_logps]
    with _mode(model, training=False):
        bar = tqdm(unknown, desc="reference", unit="batch", dynamic_ncols=True, disable=not unknown)
        for whose, number in bar:
            whose.ref_logps[number] = _logps(model, whose[number], settings).cpu()


def _batch_numbers(batches: Batches, settings: Settings, step: int) -> list[int]:
    return batch_numbers(len(batches), step, settings.accumulate, settings.seed)


@contextmanager
def _attached(model: nn.Module, settings: Settings) -> Iterator[None]:
    attach(model, engine=settings.engine, workspace_bytes=settings.workspace_bytes)
    try:
        yield
    finally:
        detach(model)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _on_device(batch: Batch, model: nn.Module) -> Batch:
    return {name: value.to(_device(model)) for name, value in batch.items()}


def _autocast(model: nn.Module, settings: Settings) -> AbstractContextManager[Any]:
    return torch.autocast(_device(model).type, torch.bfloat16, enabled=settings.bf16)


# ------------------------------------------------------------------------------ checkpoints and logs


class _Log:
    """Metrics, kept and written as JSONL. Lines past the step of the checkpoint are not part of the resumed run."""

    def __init__(self, output: Path | None, first: int) -> None:
        self.rows: list[Metrics] = []
        self._file = None
        if output is None:
            return
        path = output / METRICS
        if first and path.exists():
            self.rows = [
                row
                for row in map(json.loads, path.read_text().splitlines())
                if row["step"] <= first
            ]
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  closed by __exit__
        for row in self.rows:
            self._write(row)

    def add(self, row: Metrics) -> None:
        self.rows.append(row)
        self._write(row)

    def _write(self, row: Metrics) -> None:
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()


def _identity(settings: Settings, batches: Batches, held_out: Batches | None) -> dict[str, str]:
    """What a checkpoint must agree on with the run that resumes it."""
    free = {"eval_every", "save_every"}
    if settings.schedule == "constant":
        free.add("steps")  # more steps at a constant rate only lengthen the run
    own = {f.name: repr(getattr(settings, f.name)) for f in fields(settings) if f.name not in free}
    own["training pairs"] = batches.digest()
    own["held-out pairs"] = held_out.digest() if held_out is not None else "none"
    return own


def _open_run(
    output: Path | None,
    resume: bool,
    settings: Settings,
    batches: Batches,
    held_out: Batches | None,
) -> dict[str, Any] | None:
    """Make the folder; when resuming, read and check its checkpoint."""
    if output is None:
        if resume:
            raise ValueError("resume needs the output folder of the run to continue")
        return None
    output.mkdir(parents=True, exist_ok=True)
    path = output / CHECKPOINT
    if not resume:
        if path.exists() or (output / METRICS).exists():
            raise FileExistsError(
                f"{output} already holds a run: resume it, or choose another folder"
            )
        return None
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: there is nothing to resume")
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    now = _identity(settings, batches, held_out)
    different = [name for name in now if saved["identity"].get(name) != now[name]]
    if different:
        changes = [
            f"{name}: {saved['identity'].get(name)} then, {now[name]} now" for name in different
        ]
        raise ValueError(f"{path} belongs to another run; " + "; ".join(changes))
    batches.ref_logps |= saved["ref_logps"]
    if held_out is not None:
        held_out.ref_logps |= saved["held_out_ref_logps"]
    return saved


def _save(
    output: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    batches: Batches,
    held_out: Batches | None,
    step: int,
) -> None:
    frozen = _frozen(model)
    state = {
        "step": step,
        "identity": _identity(settings, batches, held_out),
        "model": {k: v for k, v in model.state_dict().items() if k not in frozen},
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "ref_logps": batches.ref_logps,
        "held_out_ref_logps": held_out.ref_logps if held_out is not None else {},
    }
    # Written beside and renamed: an interruption leaves the previous checkpoint whole.
    partial = output / (CHECKPOINT + ".partial")
    torch.save(state, partial)
    os.replace(partial, output / CHECKPOINT)


def _frozen(model: nn.Module) -> set[str]:
    every_name = model.named_parameters(remove_duplicate=False)  # tied weights have two
    return {name for name, p in every_name if not p.requires_grad}


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> int:
    """Load a checkpoint into model, optimizer and random generators; the number of steps done."""
    frozen = _frozen(model)
    found = model.load_state_dict(saved["model"], strict=False)
    wrong = [*found.unexpected_keys, *(k for k in found.missing_keys if k not in frozen)]
    if wrong:
        raise ValueError(f"the checkpoint does not fit this model: {wrong[:5]}")
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    if saved["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
    step: int = saved["step"]
    return step
