"""accelerate's own way to FSDP, which on a CPU it would silently replace by DDP."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

import fastdpop
from fastdpop.hf import attach
from tests.distributed.pool import Pool
from tests.distributed.sharded_models import (
    assert_gradients,
    assert_loss,
    assert_sharded,
    expected,
    model,
    own_batch,
    references,
)
from tests.tiny_models import DPOP

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
}


def _accelerator(version: int, precision: str, checkpointing: bool) -> Any:
    """With the device of a CPU and the kind of a job on several GPUs."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    os.environ |= SETTINGS | {
        "FSDP_VERSION": str(version),
        "FSDP_RESHARD_AFTER_FORWARD": "true" if version == 2 else "FULL_SHARD",
        "FSDP_ACTIVATION_CHECKPOINTING": str(checkpointing).lower(),
    }

    def kind(*args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def to_cpu(state: Any) -> None:
        state.device = torch.device("cpu")

    with (
        mock.patch.object(PartialState, "_prepare_backend", kind),
        mock.patch.object(PartialState, "set_device", to_cpu),
    ):
        accelerator = Accelerator(mixed_precision=precision)
    assert accelerator.distributed_type == DistributedType.FSDP
    return accelerator


def _prepared(
    version: int, precision: str = "no", name: str = "llama", checkpointing: bool = False
) -> tuple[Any, Any]:
    accelerator = _accelerator(version, precision, checkpointing)
    whole = attach(model(name))
    prepared, _ = accelerator.prepare(whole, torch.optim.SGD(whole.parameters(), lr=0.0))
    if version == 2:
        assert isinstance(whole.lm_head, FSDPModule)  # with the norm, and the embedding if tied
        assert_sharded(prepared)
    else:
        assert isinstance(prepared, FullyShardedDataParallel)
    return accelerator, prepared


def _cases(rank: int) -> None:
    given = {**own_batch(rank), "preference": DPOP, "ref_logps": references(rank)}
    try:
        for name in ("llama", "llama, tied"):
            losses, gradients = expected(model(name))
            for version in (1, 2):
                for checkpointing in (False, True):
                    case = f"{name}, FSDP{version}, checkpointing {checkpointing}"
                    accelerator, prepared = _prepared(version, "no", name, checkpointing)
                    with torch.no_grad():
                        assert_loss(prepared(**given).loss, losses[rank], case)
                    out = prepared(**given)
                    assert_loss(out.loss, losses[rank], case)
                    accelerator.backward(out.loss)
                    if version == 2:
                        assert_gradients(prepared, gradients, case)
                        continue
                    summon = FullyShardedDataParallel.summon_full_params
                    with summon(prepared, with_grads=True, writeback=False):
                        assert_gradients(prepared, gradients, case)
        for version in (1, 2):
            _in_bfloat16(rank, version)
    finally:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        for setting in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_"))]:
            del os.environ[setting]


def _in_bfloat16(rank: int, version: int) -> None:
    """Policy == reference bitwise, and the first loss is log 2."""
    accelerator, prepared = _prepared(version, "bf16")
    inputs = own_batch(rank)
    with torch.no_grad():
        logps = prepared(**inputs, return_logps=True).logps
    assert logps.dtype == torch.float32
    out = prepared(**inputs, preference=DPOP, ref_logps=fastdpop.exact(logps))
    assert torch.equal(out.logps, logps)
    assert out.loss.item() == torch.tensor(2.0).log().item()
    assert not torch.equal(out.logps, out.logps.bfloat16().float())
    accelerator.backward(out.loss)
    assert all(p.grad is not None for p in prepared.parameters() if p.numel() > 0)


def test_accelerate(two: Pool) -> None:
    two.run(_cases)
