"""Small models under DeepSpeed's ZeRO, on CPUs, and what one process computes."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdpop.hf import attach
from tests.distributed.sharded_models import own_batch, references
from tests.tiny_models import DPOP

RANKS = 2
Wanted = tuple[list[float], dict[str, Tensor]]


def deepspeed() -> Any:
    """DeepSpeed as it is used here: on the CPU, with nothing compiled, and quiet."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def given(rank: int, kind: str) -> dict[str, Any]:
    """The arguments of a process's call, whose sequences share prompts if `kind` says so."""
    inputs = own_batch(rank)
    if "prompts" in kind:
        half = len(inputs["input_ids"]) // 2
        inputs["input_ids"][half:, :5] = inputs["input_ids"][:half, :5]
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["labels"] == -100, -100)
    if "logps" in kind:
        return {**inputs, "return_logps": True}
    return {**inputs, "preference": DPOP, "ref_logps": references(rank)}


def loss_of(output: Any, kind: str) -> Tensor:
    loss: Tensor = -output.logps.mean() if "logps" in kind else output.loss
    return loss


def wanted(whole: Any, kind: str = "preference", **settings: Any) -> Wanted:
    """The loss of every process and the gradients of their mean, from one process and a model that is whole."""
    one = attach(copy.deepcopy(whole), **settings)
    losses = []
    for rank in range(RANKS):
        loss = loss_of(one(**given(rank, kind)), kind)
        (loss / RANKS).backward()
        losses.append(loss.item())
    return losses, {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}


def config(stage: int, **options: Any) -> dict[str, Any]:
    """Of an engine in which nothing stays whole by luck; `options` of ZeRO, or of the engine itself."""
    own = {name: options.pop(name) for name in list(options) if name in _OF_THE_ENGINE}
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        zero |= {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": zero | options,
        **own,
    }


_OF_THE_ENGINE = ("bf16", "gradient_accumulation_steps")


def engine_of(model: Any, stage: int, **options: Any) -> Any:
    """DeepSpeed's engine around a model, with parameters of which this process holds a part only, if the stage is 3."""
    library = deepspeed()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    engine, *_ = library.initialize(
        model=model, optimizer=optimizer, config=config(stage, **options)
    )
    deepspeed()
    assert engine.zero_optimization_stage() == stage
    for parameter in model.parameters():
        assert hasattr(parameter, "ds_id") is (stage == 3)
        if stage == 3:
            assert parameter.numel() == 0
            assert parameter.ds_tensor.numel() < 0.75 * parameter.ds_numel + 2
    return engine


def assert_step(engine: Any, rank: int, want: Wanted, case: str, kind: str = "preference") -> None:
    """A step's loss, and every gradient, on every rank."""
    losses, gradients = want
    loss = loss_of(engine(**given(rank, kind)), kind)
    assert abs(loss.item() - losses[rank]) <= 1e-6 * abs(losses[rank]), f"{case}: {loss.item()}"
    engine.backward(loss)
    assert_gradients(engine, gradients, case)
    engine.step()


def assert_gradients(engine: Any, gradients: dict[str, Tensor], case: str) -> None:
    """Every one, whole, to 1e-6 of its largest value."""
    from deepspeed.utils import safe_get_full_grad

    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    assert set(trained) == set(gradients), case
    for name, parameter in trained.items():
        found, gradient = safe_get_full_grad(parameter), gradients[name]
        error = (found - gradient).abs().max() / gradient.abs().max()
        assert error <= 1e-6, f"{case}: the gradient of {name} is off by {error:.2e}"


def gathers_of(engine: Any, weight: Any) -> Callable[[], int]:
    """Counts how often a parameter is gathered; the function gives the number since it was last called."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    name = "_PartitionedParameterCoordinator__all_gather_params"
    own, own_of_one, count = getattr(coordinator, name), weight.all_gather, [0]

    def gather(params: Any, forward: bool) -> Any:
        partitioned = weight.ds_status.name == "NOT_AVAILABLE"
        count[0] += partitioned and any(p is weight for p in params)
        return own(params, forward)

    def gather_one(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return own_of_one(*args, **kwargs)

    def taken() -> int:
        found, count[0] = count[0], 0
        return found

    setattr(coordinator, name, gather)
    weight.all_gather = gather_one
    return taken
