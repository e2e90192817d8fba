"""What people put around and inside a model that FSDP2 shards: adapters, checkpointing, compilers, shared prefixes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastdpop.hf import attach
from fastdpop.hf.sharing_check import verdict_of
from tests.distributed.pool import Pool
from tests.distributed.sharded_models import (
    assert_gradients,
    assert_loss,
    expected,
    model,
    own_batch,
    references,
    shard,
)
from tests.tiny_models import DPOP

pytestmark = pytest.mark.filterwarnings("ignore")


def _given(rank: int, **options: Any) -> dict[str, Any]:
    return {**own_batch(rank), "preference": DPOP, "ref_logps": references(rank), **options}


def _assert_as_one(
    rank: int, whole: Any, layout: str, case: str, around: Callable[[Any], Any] = lambda m: m
) -> Any:
    """Attach, `around` and shard a model: loss and gradients of two reductions are those of one process."""
    losses, gradients = expected(whole)
    sharded = shard(around(attach(whole)), layout)
    for reduction in ("mean", "none"):
        out = sharded(**_given(rank, preference_options={"reduction": reduction}))
        assert_loss(out.loss.mean(), losses[rank], case)
        out.loss.mean().backward()
        assert_gradients(sharded, gradients, f"{case}, {layout}, {reduction}")
    return sharded


def _adapted(**options: Any) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **options)
    torch.manual_seed(1)
    adapted = get_peft_model(model(), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj"]},
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "a trained copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def _adapters(rank: int) -> None:
    for name, options in ADAPTERS.items():
        for layout in ("root", "tail", "head, freed"):
            sharded = _assert_as_one(rank, _adapted(**options), layout, name)
            if "copy" in name:  # the reference has the head that the adapter was made on
                continue
            with torch.no_grad(), sharded.disable_adapter():
                logps = sharded(**own_batch(rank), return_logps=True).logps
            with torch.no_grad():
                one = attach(model())(**own_batch(rank), return_logps=True).logps
            torch.testing.assert_close(logps, one, rtol=1e-6, atol=0)
    # Parts of the head that are groups of their own.
    parts = _adapted(target_modules=["lm_head"])
    losses, gradients = expected(parts)
    attach(parts)
    head = parts.get_base_model().lm_head
    for part in (head.base_layer, head.lora_A["default"], head.lora_B["default"]):
        fully_shard(part, reshard_after_forward=True)
    fully_shard(parts)
    out = parts(**_given(rank))
    assert_loss(out.loss, losses[rank], "parts")
    out.loss.backward()
    assert_gradients(parts, gradients, "parts of an adapted head")


def test_adapters(two: Pool) -> None:
    two.run(_adapters)


def _checkpointing(rank: int) -> None:
    def by_transformers(reentrant: bool) -> Callable[[Any], Any]:
        def turned_on(m: Any) -> Any:
            m.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
            m.enable_input_require_grads()
            return m

        return turned_on

    def by_torch(m: Any) -> Any:
        m.model.layers = nn.ModuleList([checkpoint_wrapper(layer) for layer in m.model.layers])
        return m

    for layout in ("root", "tail", "head, freed"):
        _assert_as_one(rank, model(), layout, "reentrant", by_transformers(True))
        _assert_as_one(rank, model(), layout, "not reentrant", by_transformers(False))
        _assert_as_one(rank, model(), layout, "wrapped layers", by_torch)


def test_checkpointing(two: Pool) -> None:
    two.run(_checkpointing)


def _compiled(rank: int) -> None:
    losses, gradients = expected(model())
    for layout, what in (("root", "model"), ("head, freed", "model"), ("tail", "layers")):
        torch._dynamo.reset()
        whole = attach(model())
        if what == "layers":
            for layer in whole.model.layers:
                layer.compile(backend="aot_eager")
        sharded = shard(whole, layout)
        if what == "model":
            sharded.compile(backend="aot_eager")
        out = sharded(**_given(rank))
        assert_loss(out.loss, losses[rank], what)
        out.loss.backward()
        assert_gradients(sharded, gradients, f"compiled {what}, {layout}")
    torch._dynamo.reset()


def test_compiled(two: Pool) -> None:
    two.run(_compiled)


def _pairs_that_share(rank: int) -> dict[str, Any]:
    given = _given(rank)
    given["input_ids"][2:, :8] = given["input_ids"][:2, :8]
    return given


def _holed(rank: int) -> dict[str, Any]:
    """The same, but that one process's batch is none that can be shared."""
    given = _pairs_that_share(rank)
    if rank == 0:
        given["attention_mask"][0, 4] = 0
        given["labels"][0, 4:6] = -100
    return given


def _shared(rank: int) -> None:
    for batch_of in (_pairs_that_share, _holed):
        one, losses = attach(model(), share_prefixes=True), []
        for other in range(2):
            loss = one(**batch_of(other)).loss
            (loss / 2).backward()
            losses.append(loss.item())
        gradients = {n: p.grad.clone() for n, p in one.named_parameters()}
        for layout in ("root", "head, freed"):
            case = f"{batch_of.__name__}, {layout}"
            sharded = shard(attach(model(), share_prefixes=True), layout)
            for _ in range(2):
                out = sharded(**batch_of(rank))
                assert_loss(out.loss, losses[rank], case)
                out.loss.backward()
                assert_gradients(sharded, gradients, case)
            found = verdict_of(sharded)
            assert found is not None  # in every process
            assert found.mode == "shared"


def test_shared_prefixes(two: Pool) -> None:
    two.run(_shared)


def _dropping_out(rank: int) -> None:
    """Attention that drops out in training is found by the check, not by the layers of some processes."""
    whole = attach(model(), share_prefixes=True).train()
    whole.config.attention_dropout = 0.5
    for layer in whole.model.layers:
        layer.self_attn.attention_dropout = 0.5
    sharded = shard(whole, "head, freed")
    holed = _holed(rank)
    with pytest.warns(UserWarning, match="share_prefixes has no effect"):
        sharded(**holed).loss.backward()
    sharded.eval()  # where nothing is dropped out
    with torch.no_grad():
        found = sharded(**holed).loss
        want = attach(model())(**holed).loss
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def test_attention_that_drops_out(two: Pool) -> None:
    two.run(_dropping_out)
