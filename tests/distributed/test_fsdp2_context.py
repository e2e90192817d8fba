"""Four processes: parameters sharded by FSDP2 over all of them, pairs over two, positions over two others.

A model whose tokens do not attend to each other is right on parts of sequences by itself.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpop import losses
from fastdpop.hf import attach
from tests.distributed.pool import Pool
from tests.distributed.sharded_models import assert_gradients, assert_loss, assert_sharded

V, PAIRS, LENGTH = 61, 3, 12


def _model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_hidden_layers=0, **sizes))


def _inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (2 * PAIRS, LENGTH), generator=draw)
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].clone()
    shifted[:, :3] = -100
    shifted[1, 8:] = -100
    return {"input_ids": ids, "shift_labels": shifted}


def _both(rank: int) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    data, context = mesh.get_coordinate()
    whole, inputs = _model(), _inputs()
    ref_logps = -20.0 - torch.arange(2.0 * PAIRS)
    own = [[0], [1, 2]][data]
    rows = torch.tensor([*own, *(PAIRS + p for p in own)])
    here = [slice(0, 5), slice(5, LENGTH)][context]
    part = {name: value[rows][:, here] for name, value in inputs.items()}
    for loss in (losses.get("dpop"), losses.get("aot"), losses.get("dpo") + losses.get("sft")):
        one = attach(copy.deepcopy(whole))
        expected = one(**inputs, preference=loss, ref_logps=ref_logps)
        expected.loss.backward()
        want = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        model = attach(copy.deepcopy(whole), group=mesh["dp"], cp_group=mesh["cp"])
        fully_shard(model)
        assert_sharded(model)
        out = model(**part, preference=loss, ref_logps=ref_logps[rows])
        out.loss.backward()
        assert_loss(out.loss, expected.loss.item(), repr(loss))
        assert_gradients(model, want, repr(loss))


def test_pairs_and_positions(four: Pool) -> None:
    four.run(_both)
