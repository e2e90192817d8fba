"""FSDP1: a head in the root's flat parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
)
from torch.distributed.fsdp.wrap import CustomPolicy

pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import fastdpop
from fastdpop.hf import attach
from tests.distributed.pool import Pool
from tests.distributed.sharded_models import (
    assert_gradients,
    assert_loss,
    expected,
    model,
    own_batch,
    references,
)
from tests.tiny_models import DPOP

pytestmark = pytest.mark.filterwarnings("ignore")


def _wrapped(whole: Any, *, own_head: bool = False, **options: Any) -> Any:
    head = whole.lm_head

    def is_unit(module: Any) -> bool:
        return isinstance(module, LlamaDecoderLayer) or (own_head and module is head)

    # A CPU counts only if it is named.
    options = {"device_id": torch.device("cpu"), "use_orig_params": True, **options}
    policy = CustomPolicy(is_unit)
    wrapped = FullyShardedDataParallel(whole, auto_wrap_policy=policy, **options)
    units = [m for m in wrapped.modules() if isinstance(m, FullyShardedDataParallel)]
    parts = [unit._handle.flat_param for unit in units]
    assert len(parts) == 3 + own_head
    sharded = options.get("sharding_strategy") is not ShardingStrategy.NO_SHARD
    assert all(part.numel() < part._unpadded_unsharded_size.numel() for part in parts) == sharded
    return wrapped


def _one_step(wrapped: Any, gradients: dict[str, Any]) -> None:
    """Where gradients have no names of their own, steps of 1 along them tell what they were."""
    torch.optim.SGD(wrapped.parameters(), lr=1.0).step()
    before = dict(model().named_parameters())
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        for name, parameter in wrapped.named_parameters():
            name = name.replace("_fsdp_wrapped_module.", "")
            found, want = before[name] - parameter, gradients[name]
            # Differences of numbers of about 1.
            assert (found - want).abs().max() <= 1e-6 * (1 + want.abs().max()), name


def _layouts(rank: int) -> None:
    given = {**own_batch(rank), "preference": DPOP, "ref_logps": references(rank)}
    for name in ("llama", "llama, tied"):
        losses, gradients = expected(model(name))
        for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")[: 1 if "tied" in name else 3]:
            for reduction in ("mean", "none"):
                options = {"preference_options": {"reduction": reduction}}
                whole = attach(model(name))
                wrapped = _wrapped(whole, sharding_strategy=ShardingStrategy[strategy])
                with torch.no_grad():
                    assert_loss(wrapped(**given).loss, losses[rank], strategy)
                out = wrapped(**given, **options)
                assert_loss(out.loss.mean(), losses[rank], strategy)
                out.loss.mean().backward()
                summon = FullyShardedDataParallel.summon_full_params
                with summon(wrapped, with_grads=True, writeback=False):
                    assert_gradients(wrapped, gradients, f"{name}, {strategy}, {reduction}")
    losses, gradients = expected(model())
    wrapped = _wrapped(attach(model()), use_orig_params=False)
    out = wrapped(**given)
    assert_loss(out.loss, losses[rank], "flat")
    out.loss.backward()
    _one_step(wrapped, gradients)


def test_layouts(two: Pool) -> None:
    two.run(_layouts)


def _accumulated(rank: int) -> None:
    given = {**own_batch(rank), "preference": DPOP, "ref_logps": references(rank)}
    _, gradients = expected(model())
    wrapped = _wrapped(attach(model()))
    with wrapped.no_sync():
        wrapped(**given).loss.backward()
    wrapped(**given).loss.backward()
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True, writeback=False):
        assert_gradients(wrapped, gradients, "no_sync", times=2.0)


def test_gradient_accumulation(two: Pool) -> None:
    two.run(_accumulated)


def _mixed_precision(rank: int) -> None:
    precision = MixedPrecision(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_root_forward_inputs=True
    )
    wrapped = _wrapped(attach(model()), mixed_precision=precision)
    inputs = own_batch(rank)
    with torch.no_grad():
        logps = wrapped(**inputs, return_logps=True).logps
    out = wrapped(**inputs, preference=DPOP, ref_logps=fastdpop.exact(logps.chunk(2)))
    assert torch.equal(out.logps, logps)
    assert out.loss.item() == torch.tensor(2.0).log().item()
    out.loss.backward()
    with pytest.raises(ValueError, match=r"ref_logps has dtype torch\.bfloat16.*fastdpop\.exact"):
        wrapped(**inputs, preference=DPOP, ref_logps=logps)


def test_mixed_precision(two: Pool) -> None:
    two.run(_mixed_precision)


def _refused(rank: int) -> None:
    given = {**own_batch(rank), "preference": DPOP, "ref_logps": references(rank)}
    wrapped = _wrapped(attach(model()), own_head=True)
    with pytest.raises(
        RuntimeError, match=r"lm_head .* is a FullyShardedDataParallel .* unit of its own"
    ):
        wrapped(**given)
    wrapped = _wrapped(model())
    with pytest.raises(TypeError, match="attach before wrapping"):
        attach(wrapped)
    with pytest.raises(RuntimeError, match="a piece of FSDP's flat parameter: attach before"):
        attach(wrapped.module, check=False)


def test_refused(two: Pool) -> None:
    two.run(_refused)
