"""Runs of ``fastdpop train`` in the processes of a pool, and all of their gradients."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any
from unittest import mock

from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from fastdpop.integrations.trl.process import keep_process_groups
from fastdpop.train import processes, run
from fastdpop.train.trainer import PairTrainer

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What ``accelerate launch --config_file examples/fsdp2.yaml`` says to the processes."""
FSDP1 = FSDP2 | {
    "FSDP_VERSION": "1",
    "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_USE_ORIG_PARAMS": "true",
}
Steps = list[dict[str, Tensor]]


class _Gradients(TrainerCallback):
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        found = {}
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            if grad is not None:
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                found[name.removeprefix("module.")] = whole.detach().clone()
        self.steps.append(found)


def gradients(argv: list[str]) -> tuple[Steps, bool]:
    """Of every step of ``fastdpop train``, whole; and whether parameters were sharded."""
    steps: Steps = []
    sharded = []

    class Recording(PairTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(_Gradients(steps))

        def save_at_the_end(self) -> None:
            # Of the model some are whole for a while, behind an evaluation.
            groups = self.optimizer.param_groups
            sharded.extend(isinstance(p, DTensor) for group in groups for p in group["params"])
            super().save_at_the_end()

    with mock.patch.object(run, "PairTrainer", Recording):
        assert run.run(argv[1:]) == 0
    return steps, all(sharded)


def in_process(rank: int, argv: list[str], environment: dict[str, str]) -> tuple[Steps, bool]:
    """:func:`gradients` in a process of a pool, which is as it was before behind it."""
    keep_process_groups()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        for name in ("_prepare_backend", "set_device"):
            stack.enter_context(mock.patch.object(PartialState, name, getattr(PartialState, name)))
        try:
            return gradients(argv)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def failure(rank: int, argvs: list[list[str]], environment: dict[str, str]) -> str:
    """What ``fastdpop train`` says where each process was told something else."""
    try:
        in_process(rank, argvs[rank], environment)
    except ValueError as error:
        return str(error)
    return "nothing"


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of any gradient, over its own largest entry; of one that is 0, as of a new adapter's A, from 0."""
    assert found.keys() == expected.keys()
    assert any(value.abs().max() > 0 for value in expected.values())
    errors = []
    for name, value in expected.items():
        size = value.abs().max().item() or 1.0
        errors.append((found[name] - value).abs().max().item() / size)
    return max(errors)


def without_saving(rank: int, argv: list[str], environment: dict[str, str]) -> str:
    """How FSDP1 has wrapped the model of a run that saves none at its end, as it cannot on CPUs."""
    kinds = []

    def note(trainer: Any) -> None:
        kinds.append(type(trainer.model_wrapped).__name__)

    with (
        mock.patch.object(processes, "check"),
        mock.patch.object(PairTrainer, "save_at_the_end", note),
    ):
        in_process(rank, argv, environment)
    return kinds[0]
