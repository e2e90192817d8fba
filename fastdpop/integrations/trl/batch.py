"""The batch of all processes of a trainer: which of them have pairs of their own, and which pairs are there only to
fill up a batch.

At the end of an epoch accelerate repeats pairs from its beginning, so that every process has a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpop.rows import wide_dtype
from fastdpop.unrounded import Exact, opened

Inputs = Mapping[str, Any]
KEY = "pair_values"
"""Of a batch, where there are any: an :class:`~fastdpop.unrounded.Exact` of ``(B,)`` float64 tensors by name."""


class Part(NamedTuple):
    """A process's part of a batch.

    Attributes:
        inputs: of the model, and the reference's log-probs.
        options: further ``preference_options`` of the call.
    """

    inputs: Inputs
    options: dict[str, Any]


def check(trainer: Any) -> None:
    """
    Raises:
        ValueError: a trainer that is to take the losses of all processes' pairs has data that it cannot.
    """
    if trainer._fastdpop.global_batch and not trainer.accelerator.even_batches:
        raise ValueError(
            "accelerator_config has even_batches=False, expected True with global_batch: a process without a batch at "
            "an epoch's end would leave the others waiting (repeated pairs do not count)"
        )


def part(trainer: Any, inputs: Inputs) -> Part:
    """What this process computes of its batch; all of it, unless losses are those of all processes' pairs."""
    group = _data_parallel(trainer) if trainer._fastdpop.global_batch else None
    pairs = count(inputs)
    if group is None:
        return Part(inputs, _values(inputs, pairs))
    own = kept(trainer, pairs)
    options: dict[str, Any] = {"group": group, **_values(inputs, own)}
    if own == 0:
        # A model must run all the same, where its parameters or its gradients are the others' too.
        device = inputs["input_ids"].device
        options["pairs"] = torch.empty((0, 2), dtype=torch.int64, device=device)
    if own == pairs:
        return Part(inputs, options)
    return Part({n: _first(value, pairs, max(own, 1)) for n, value in inputs.items()}, options)


def _values(inputs: Inputs, own: int) -> dict[str, Any]:
    """The option with the numbers that the data give for the first `own` pairs, where they give any."""
    if KEY not in inputs:
        return {}
    device = inputs["input_ids"].device
    dtype = wide_dtype(device)
    values = opened(inputs[KEY]).items()
    return {KEY: Exact({name: value[:own].to(dtype).to(device) for name, value in values})}


def _first(value: Any, pairs: int, own: int) -> Any:
    """Of an entry of a batch, what belongs to its first `own` pairs; chosen sequences stand before rejected ones."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if len(value) == 2 * pairs:
        return torch.cat([value[:own], value[pairs : pairs + own]])
    return value[:own] if len(value) == pairs else value


def _data_parallel(trainer: Any) -> Any:
    """The processes that have other pairs than this one; None if there are none."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return None
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is None:
        return dist.group.WORLD
    return mesh["dp"] if accelerator.parallelism_config.dp_dim_names else None


def count(inputs: Inputs) -> int:
    """How many pairs a process's batch has, repeated ones too."""
    return len(inputs["input_ids"]) // 2


def kept(trainer: Any, pairs: int) -> int:
    """How many of the `pairs` of this process's batch, from its start, are not repetitions."""
    before = trainer.accelerator.process_index // _copies(trainer) * pairs
    return min(max(total(trainer, pairs) - before, 0), pairs)


def counted(trainer: Any, pairs: int) -> int:
    """The same; 0 where another process with the same batch counts them."""
    first = trainer.accelerator.process_index % _copies(trainer) == 0
    return kept(trainer, pairs) if first else 0


def total(trainer: Any, pairs: int, final: bool | None = None) -> int:
    """How many pairs the batches of all processes have, without repetitions, if each has `pairs` with them.

    Args:
        final: whether they are the last of an optimizer's step in training, for batches that nobody computes yet.
    """
    state = trainer.accelerator.gradient_state
    training = trainer.model.training or final is not None
    if final is None:
        final = not training or state.sync_gradients
    batches = trainer.accelerator.num_processes // _copies(trainer)
    # Trainer fetches all batches of a step before the first of them is computed: the last of them is the epoch's.
    if state.end_of_dataloader and final and batches > 1:
        remainder = _remainder(trainer, batches * pairs, training)
        return remainder if remainder > 0 else batches * pairs
    return batches * pairs


def _remainder(trainer: Any, whole: int, training: bool) -> int:
    """How many pairs the last batches of an epoch have, where all others have `whole`; 0 or below if they are full."""
    remainder: int = trainer.accelerator.gradient_state.remainder
    data = trainer.train_dataset
    if remainder < 0 and training and hasattr(data, "__len__"):
        # accelerate's loader of the rest of an epoch, in which a run goes on, does not know it.
        return 0 if trainer.args.dataloader_drop_last else len(data) % whole
    return remainder


def _copies(trainer: Any) -> int:
    """How many processes have the same batch: those of tensor parallelism."""
    copies: int = getattr(trainer, "_tp_size", 1)
    return copies
