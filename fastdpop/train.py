"""A small training loop for preference losses on one device.

The order of the batches depends on the seed alone, batches keep their composition from epoch to
epoch, and the reference is scored in those very batches by the same engine. A policy equal to its
reference therefore has log-ratios of exactly zero, and a resumed run repeats an uninterrupted one
bit for bit (on CPU; on GPUs, as far as the model's own kernels are deterministic).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdpop import checkpoint
from fastdpop.checkpoint import Metrics
from fastdpop.data import Batch, Batches, batch_numbers
from fastdpop.hf import attach, detach
from fastdpop.rows import wide_dtype
from fastdpop.settings import Settings

__all__ = ["Metrics", "Settings", "train"]


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
        The metrics, one dict per step and one per evaluation, as in ``metrics.jsonl``.

    Raises:
        ValueError: nothing to train on; `attach` refuses the model; the checkpoint cannot be read,
            or belongs to other settings or data.
        FileNotFoundError, FileExistsError: ``resume`` without a checkpoint; a fresh run into a
            folder that holds one.
        FloatingPointError: the loss or the gradient's norm is not finite.
    """
    if not len(batches):
        raise ValueError("there are no training pairs")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient")
    saved = checkpoint.open_run(output, resume, settings, batches, held_out)
    online = _online_reference(model, settings)
    with _attached(model, settings):
        _score_reference(model, batches, held_out, settings)
        optimizer = _optimizer(trained, settings)
        torch.manual_seed(settings.seed)
        first = checkpoint.restore(model, optimizer, saved) if saved else 0
        bar = tqdm(total=settings.steps, initial=first, desc=title, unit="step", dynamic_ncols=True)
        with bar, checkpoint.Log(output, first) as log, _mode(model, training=True):
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
                    checkpoint.save(output, model, optimizer, settings, batches, held_out, done)
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
    # One fused kernel per step where there is one: on a CPU the plain loop takes as long as a small
    # model's forward pass.
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
    options = {
        "ld_alpha": settings.loss.traits.ld_alpha,  # policy and reference are weighted alike
        "dtype": wide_dtype(batch["labels"].device),
    }
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
            _attach(model, settings)
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


def _attach(model: nn.Module, settings: Settings) -> None:
    try:
        attach(model, engine=settings.engine, workspace_bytes=settings.workspace_bytes)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"{type(model).__name__} cannot be trained: {error}") from error


@contextmanager
def _attached(model: nn.Module, settings: Settings) -> Iterator[None]:
    _attach(model, settings)
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
