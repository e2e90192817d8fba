"""DeepSpeed's ZeRO on two processes. `make test-distributed` installs DeepSpeed and runs these."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor

import fastdpop
from fastdpop.hf import attach
from fastdpop.hf.zero import gathering
from tests.distributed.pool import Pool
from tests.distributed.sharded_models import model, own_batch, references
from tests.distributed.zero_models import (
    RANKS,
    Wanted,
    assert_gradients,
    assert_step,
    config,
    deepspeed,
    engine_of,
    gathers_of,
    given,
    wanted,
)
from tests.tiny_models import DPOP

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),  # read by PEFT
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed: make test-distributed",
    ),
]


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    """Two processes of their own: DeepSpeed replaces torch.nn.functional.linear for good."""
    pool = Pool(RANKS)
    yield pool
    pool.stop()


def _stage(rank: int, stage: int, name: str, wants: dict[str, Wanted], options: Any) -> None:
    engine = engine_of(attach(model(name)), stage, **options)
    for kind, want in wants.items():
        for step in range(2):  # the second follows the first one's trace
            assert_step(engine, rank, want, f"ZeRO-{stage}, {name}, {kind}, step {step}", kind)
    engine.destroy()


def _wants(name: str) -> dict[str, Wanted]:
    return {kind: wanted(model(name), kind) for kind in ("preference", "logps")}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_stages(two: Pool, stage: int, name: str) -> None:
    two.run(_stage, stage, name, _wants(name), {})


HEADS = ["phi, bias", "gemma2, softcap", "cohere, logit scale", "gpt2", "mixtral, router loss"]


@pytest.mark.parametrize("name", HEADS)
def test_other_heads(two: Pool, name: str) -> None:
    two.run(_stage, 3, name, {"preference": wanted(model(name))}, {})


DEFAULTS = {
    "stage3_max_reuse_distance": 10**9,
    "stage3_max_live_parameters": 10**9,
    "stage3_prefetch_bucket_size": 10**7,
}


@pytest.mark.parametrize("options", [DEFAULTS, {"memory_efficient_linear": False}])
def test_settings_of_deepspeed(two: Pool, options: Any) -> None:
    two.run(_stage, 3, "llama, tied", _wants("llama, tied"), options)


def _reference(rank: int, name: str, want: Wanted, options: Any) -> None:
    """A reference forward, with and without the engine, before every step; and how often the head is gathered."""
    engine = engine_of(attach(model(name)), 3, **options)
    most = 2 if "tied" in name else 1  # the embedding is gathered too
    gathers = gathers_of(engine, dict.__getitem__(engine.module.lm_head._parameters, "weight"))
    for _ in range(2):
        engine.eval()
        for caller in (engine, engine.module):
            gathers()
            with torch.no_grad():
                logps = caller(**own_batch(rank), return_logps=True).logps
            assert gathers() <= most
        engine.train()
        out = engine(**own_batch(rank), preference=DPOP, ref_logps=logps)
        assert gathers() <= most
        assert torch.equal(out.logps, logps)
        assert out.loss.item() == torch.tensor(2.0).log().item()
        engine.backward(out.loss)
        assert gathers() <= most
        engine.step()
        if not options:
            assert_step(engine, rank, want, f"after a reference, {name}")
    engine.destroy()


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_a_reference_in_between(two: Pool, name: str) -> None:
    two.run(_reference, name, wanted(model(name)), {})


def test_bfloat16(two: Pool) -> None:
    two.run(_reference, "llama", ([], {}), {"bf16": {"enabled": True}})


def _checkpointing(rank: int, want: Wanted) -> None:
    for reentrant in (False, True):
        whole = attach(model())
        whole.gradient_checkpointing_enable({"use_reentrant": reentrant})
        engine = engine_of(whole.train(), 3)
        for _ in range(2):
            assert_step(engine, rank, want, f"checkpointing, reentrant {reentrant}")
        engine.destroy()


def test_activation_checkpointing(two: Pool) -> None:
    two.run(_checkpointing, wanted(model()))


ADAPTERS: dict[str, dict[str, Any]] = {
    "trunk": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def _adapted(where: str) -> Any:
    torch.manual_seed(5)
    return get_peft_model(model(), LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[where]))


def _adapter(rank: int, where: str, want: Wanted) -> None:
    engine = engine_of(attach(_adapted(where)), 3)
    for _ in range(2):
        with torch.no_grad(), engine.module.disable_adapter():
            logps = engine(**own_batch(rank), return_logps=True).logps
        with torch.no_grad():
            own = attach(model())(**own_batch(rank), return_logps=True).logps
        assert (logps - own).abs().max() <= 1e-6 * own.abs().max()
        assert_step(engine, rank, want, f"LoRA on the {where}")
    engine.destroy()


@pytest.mark.parametrize("where", ADAPTERS)
def test_adapters(two: Pool, where: str) -> None:
    two.run(_adapter, where, wanted(_adapted(where)))


def _partly_frozen(part: str) -> Any:
    whole = model().requires_grad_(False)
    getattr(whole, part).requires_grad_(True)
    return whole


def _frozen(rank: int, part: str, wants: dict[str, Wanted]) -> None:
    engine = engine_of(attach(_partly_frozen(part)), 3)
    for kind, want in wants.items():
        for _ in range(2):
            assert_step(engine, rank, want, f"{part} alone is trained, {kind}", kind)
    engine.destroy()


@pytest.mark.parametrize("part", ["model", "lm_head"])
def test_frozen_parts(two: Pool, part: str) -> None:
    kinds = ("preference", "logps")
    two.run(_frozen, part, {kind: wanted(_partly_frozen(part), kind) for kind in kinds})


def _shared(rank: int, kind: str, want: Wanted) -> None:
    engine = engine_of(attach(model(), share_prefixes=True), 3)
    for _ in range(2):
        with torch.no_grad():
            logps = engine(**given(rank, "prompts, logps")).logps
        assert_step(engine, rank, want, f"share_prefixes, {kind}", kind)
        out = engine(**given(rank, "prompts") | {"ref_logps": logps})
        assert torch.equal(out.logps, logps)
    engine.destroy()


@pytest.mark.parametrize("kind", ["prompts", "prompts, logps"])
def test_shared_prefixes(two: Pool, kind: str) -> None:
    two.run(_shared, kind, wanted(model(), kind, share_prefixes=True))


def _in_pieces(rank: int, folder: str, want: Wanted) -> None:
    """A model that is never whole in any process."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed()
    keep = HfDeepSpeedConfig({**config(3), "train_batch_size": 2 * RANKS})
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert loaded.lm_head.weight.shape == (0,)
    attach(loaded)  # and the check of it
    assert all(p.numel() == 0 for p in loaded.parameters())
    assert "weight" not in vars(loaded.lm_head)
    with (
        pytest.raises(RuntimeError, match=r"is partitioned by ZeRO-3.*deepspeed\.initialize"),
        torch.no_grad(),
        gathering(loaded.model),
    ):
        loaded(**given(rank, "preference"))
    engine = engine_of(loaded, 3)
    assert_step(engine, rank, want, "made in pieces")
    attach(loaded, check=True)  # once more, under DeepSpeed's own hooks
    assert_step(engine, rank, want, "attached again")
    engine.destroy()
    del keep


def test_a_model_made_in_pieces(two: Pool, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    two.run(_in_pieces, str(tmp_path), wanted(model()))


def _accumulated(rank: int, want: Wanted) -> None:
    losses, gradients = want
    for stage in (2, 3):
        engine = engine_of(attach(model()), stage, gradient_accumulation_steps=2)
        for _ in range(2):  # the same micro-batch twice, each counted half
            loss = engine(**given(rank, "preference")).loss
            assert math.isclose(loss.item(), losses[rank], rel_tol=1e-6)
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary():
                assert_gradients(engine, gradients, f"accumulated, ZeRO-{stage}")
            engine.step()
        engine.destroy()


def test_gradient_accumulation(two: Pool) -> None:
    two.run(_accumulated, wanted(model()))


def _uneven(rank: int) -> dict[str, Any]:
    """One pair, or two."""
    rows = [0, 2] if rank == 0 else [0, 1, 2, 3]
    inputs: dict[str, Any] = {name: value[rows] for name, value in own_batch(rank).items()}
    return {**inputs, "preference": DPOP, "ref_logps": references(rank)[rows]}


def _joined() -> dict[str, Any]:
    given = [_uneven(rank) for rank in range(RANKS)]
    halves = [[x.chunk(2) if isinstance(x, Tensor) else x for x in one.values()] for one in given]
    found = {
        name: torch.cat([one[at][side] for side in range(2) for one in halves])
        for at, name in enumerate(given[0])
        if name != "preference"
    }
    return {**found, "preference": DPOP}


def _trained(rank: int, want: Wanted) -> None:
    for stage in (2, 3):
        engine = engine_of(attach(model(), group=dist.group.WORLD), stage)
        for _ in range(2):
            loss = engine(**_uneven(rank)).loss
            assert loss.item() == pytest.approx(want[0][0], rel=1e-6)
            engine.backward(loss)
            assert_gradients(engine, want[1], f"group, ZeRO-{stage}")
            engine.step()
        engine.destroy()


def test_uneven_numbers_of_pairs(two: Pool) -> None:
    one = attach(model())
    loss = one(**_joined()).loss
    loss.backward()
    gradients = {name: p.grad for name, p in one.named_parameters()}
    two.run(_trained, ([loss.item()], gradients))


def _refused(rank: int) -> None:
    whole = attach(model())
    engine = engine_of(whole, 3)
    hidden, labels = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight has shape \(0,\)"):
        fastdpop.fused_logps(hidden, whole.lm_head.weight, labels)
    ids = own_batch(rank)["input_ids"]
    whole.model.register_forward_hook(lambda *_: whole(input_ids=ids) and None)
    with pytest.raises(RuntimeError, match=r"in the middle of a call.*ZeRO-3 does not allow"):
        engine(**given(rank, "preference"))


def test_refused(two: Pool) -> None:
    two.run(_refused)
    two.stop()  # DeepSpeed does not expect to go on after a forward that failed
