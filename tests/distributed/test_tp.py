"""Heads whose vocabulary is split over processes: loss and gradients are those of one process, without its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

import fastdpop
from fastdpop.hf import attach, detach
from tests.distributed.pool import Pool
from tests.distributed.sharded_models import (
    assert_gradients,
    assert_loss,
    expected,
    model,
    own_batch,
    references,
)
from tests.tiny_models import DPOP, V

pytestmark = pytest.mark.filterwarnings("ignore")


def _given(rank: int, **options: Any) -> dict[str, Any]:
    return {**own_batch(rank), "preference": DPOP, "ref_logps": references(rank), **options}


def _assert_as_one(split: Any, whole: Any, case: str, batch: int = 0, batches: int = 1) -> None:
    """With the very same batch on all processes that share the head."""
    losses, gradients = expected(whole, batches)
    inputs = own_batch(batch)
    with torch.no_grad():
        one = attach(whole)(**inputs, return_logps=True).logps
        found = split(**inputs, return_logps=True).logps
    detach(whole)
    torch.testing.assert_close(found, one, rtol=1e-6, atol=0)
    for reduction in ("mean", "none"):
        out = split(**_given(batch, preference_options={"reduction": reduction}))
        assert_loss(out.loss.mean(), losses[batch], f"{case}, {reduction}")
        out.loss.mean().backward()
        # Gemma's norms are float32's, whatever the model is.
        bound = 1e-6 if "gemma" in case else 0.0
        assert_gradients(split, gradients, f"{case}, {reduction}", bound=bound)
    out = split(**inputs, preference=DPOP, ref_logps=found)
    assert torch.equal(out.logps, found), case  # policy == reference, bitwise
    assert out.loss == torch.tensor(2.0, dtype=out.loss.dtype).log(), case


def _by_torch(whole: Any, mesh: Any, plan: dict[str, Any]) -> Any:
    parallelize_module(whole, mesh, plan)
    weight = whole.lm_head.weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape[0] < V
    return whole


def _colwise(**options: Any) -> ColwiseParallel:
    return ColwiseParallel(output_layouts=Replicate(), **options)


def _torch_plans(rank: int) -> None:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("llama", "phi, bias", "granite, logit scale"):
        # Of large logits float32 loses more on the way through the trunk.
        dtype = torch.float32 if name == "llama" else torch.float64
        split = _by_torch(model(name, dtype), mesh, {"lm_head": _colwise()})
        own = split(**{k: v for k, v in own_batch(0).items() if k != "labels"}).logits
        _assert_as_one(attach(split), model(name, dtype), name)
        # Plain calls are what they were.
        again = split(**{k: v for k, v in own_batch(0).items() if k != "labels"}).logits
        assert torch.equal(own, again)
    for output in (Shard(-1), Replicate()):
        plan = {"lm_head": ColwiseParallel(output_layouts=output, use_local_output=False)}
        _assert_as_one(attach(_by_torch(model(), mesh, plan)), model(), f"a DTensor, {output}")
    plan = {"lm_head": ColwiseParallel()}
    with pytest.raises(RuntimeError, match=r"logits of \d+ of its 97 tokens, so it cannot be che"):
        attach(_by_torch(model(), mesh, plan))
    _assert_as_one(attach(_by_torch(model(), mesh, plan), check=False), model(), "local logits")
    before = attach(model())
    _assert_as_one(_by_torch(before, mesh, {"lm_head": _colwise()}), model(), "attached before")


def test_torch_plans(two: Pool, four: Pool) -> None:
    two.run(_torch_plans)
    four.run(_torch_plans)


def _sequence_parallel(rank: int) -> None:
    """The hidden states of a head are split along the sequence."""
    mesh = dist.init_device_mesh("cpu", (2,))
    plan = {
        "model.layers.1": PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1)
        ),
        "model.norm": SequenceParallel(),
        "lm_head": _colwise(input_layouts=Shard(1)),
    }
    _assert_as_one(attach(_by_torch(model(), mesh, plan)), model(), "sequence parallel")


def test_sequence_parallel(two: Pool) -> None:
    two.run(_sequence_parallel)


_OF_TRANSFORMERS = ("llama", "llama, tied", "gemma2, softcap")


def _transformers_plan(rank: int, folder: Path) -> None:
    dtype = torch.float64  # the trunk is split too, and rounds otherwise
    for name in _OF_TRANSFORMERS:
        loaded = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto", dtype=dtype)
        split = loaded.eval()
        assert isinstance(split.lm_head.weight, DTensor)
        assert split.lm_head.weight.to_local().shape[0] < V
        ids = own_batch(0)["input_ids"]
        own, gathering = split(input_ids=ids).logits, split.lm_head.forward
        attach(split)
        _assert_as_one(split, model(name, dtype), name)
        assert torch.equal(split(input_ids=ids).logits, own)
        assert split.lm_head.forward is not gathering
        detach(split)
        assert split.lm_head.forward is gathering


def test_transformers_plan(two: Pool, tmp_path: Path) -> None:
    for name in _OF_TRANSFORMERS:
        model(name, torch.float64).save_pretrained(tmp_path / name)
    two.run(_transformers_plan, tmp_path)


def _two_dimensions(rank: int) -> None:
    """A head that is split over two processes, and FSDP2 over two others."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    place = mesh["dp"].get_local_rank()
    for layout in ("root", "tail", "head, freed"):
        split = _by_torch(model(), mesh["tp"], {"lm_head": _colwise()})
        if layout == "root":
            attach(split)
        for layer in split.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        if layout == "tail":
            fully_shard(
                [split.model.norm, split.lm_head], mesh=mesh["dp"], reshard_after_forward=False
            )
        if layout == "head, freed":
            fully_shard(split.lm_head, mesh=mesh["dp"])
        fully_shard(split, mesh=mesh["dp"])
        assert len(split.lm_head.weight.placements) == 2
        _assert_as_one(attach(split), model(), f"TP x FSDP2, {layout}", place, 2)


def test_tensor_parallel_with_fsdp(four: Pool) -> None:
    four.run(_two_dimensions)


def _refused(rank: int) -> None:
    mesh = dist.init_device_mesh("cpu", (2,))
    rowwise = {"lm_head": RowwiseParallel(input_layouts=Replicate())}
    with pytest.raises(RuntimeError, match=r"expected rows of the vocabulary over one dimension"):
        attach(_by_columns(model(), mesh, rowwise), check=False)(**_given(0))
    split = attach(_by_torch(model(), mesh, {"lm_head": _colwise()}))
    weight = split.lm_head.weight
    hidden, labels = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight is a DTensor \(97, 32\).*weight\.to_local\(\)"):
        fastdpop.fused_logps(hidden, weight, labels)
    by_hand = fastdpop.fused_logps(hidden, weight.to_local(), labels, tp_group=mesh)
    torch.testing.assert_close(by_hand, fastdpop.fused_logps(hidden, weight.full_tensor(), labels))
    attach(split, tp_group=mesh, check=False)
    with pytest.raises(ValueError, match="tp_group is given to attach, expected None"):
        split(**_given(0))
    with pytest.raises(TypeError, match="tp_group is 3, expected a process group"):
        attach(model(), tp_group=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preference_options contains 'tp_group'"):
        split(**_given(0, preference_options={"tp_group": mesh}))


def _by_columns(whole: Any, mesh: Any, plan: dict[str, Any]) -> Any:
    parallelize_module(whole, mesh, plan)
    return whole


def test_refused(two: Pool) -> None:
    two.run(_refused)


def _groups(rank: int) -> None:
    """Groups that attach passes on: gradients are those of the joined batch, on every process."""
    losses, gradients = expected(model())
    one = attach(model(), group=dist.group.WORLD, grad_reduction="sum")
    out = one(**_given(rank))
    assert_loss(out.loss, sum(losses) / len(losses), "group")
    out.loss.backward()
    for parameter in one.parameters():
        dist.all_reduce(parameter.grad)
    assert_gradients(one, gradients, "group")


def test_groups(two: Pool) -> None:
    two.run(_groups)
