"""What a training run keeps in its folder: ``metrics.jsonl``, and ``checkpoint.pt`` to go on from.

A checkpoint has the trained weights, the optimizer, the random state and the reference's log-probs.
It says which settings and data it belongs to, and no other run may continue from it.
"""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdpop.data import Batches
from fastdpop.settings import Settings

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"

Metrics = dict[str, float]
"""One line of ``metrics.jsonl``."""


class Log:
    """Metrics, kept in ``rows`` and written as JSONL; without a folder only kept.

    Of a resumed run's file, lines past the checkpoint's step ``first`` are dropped: those steps are
    made again.
    """

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
        """One more line."""
        self.rows.append(row)
        self._write(row)

    def _write(self, row: Metrics) -> None:
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def __enter__(self) -> Log:
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


def open_run(
    output: Path | None,
    resume: bool,
    settings: Settings,
    batches: Batches,
    held_out: Batches | None,
) -> dict[str, Any] | None:
    """Make the folder; when resuming, read its checkpoint, and give the batches their reference.

    Returns:
        The checkpoint, or None for a fresh run.

    Raises:
        ValueError: ``resume`` without a folder; the checkpoint cannot be read, or belongs to other
            settings or data.
        FileNotFoundError, FileExistsError: ``resume`` without a checkpoint; a fresh run into a
            folder that holds one.
    """
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
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
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


def save(
    output: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    batches: Batches,
    held_out: Batches | None,
    step: int,
) -> None:
    """Write the checkpoint of a run that has done ``step`` steps, in place of the previous one."""
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


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> int:
    """Load a checkpoint into model, optimizer and random generators.

    Returns:
        The number of steps done.

    Raises:
        ValueError: the checkpoint has other parameters than the model.
    """
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
