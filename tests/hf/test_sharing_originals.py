"""A model that can share does all else by the implementation that it had."""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("transformers")

import transformers.modeling_flash_attention_utils as flash_utils
from transformers.models.llama.modeling_llama import LlamaAttention

import fastdpop
from fastdpop import attach
from fastdpop.hf import tree_attention
from fastdpop.hf.sharing_check import verdict_of
from tests.tiny_models import DPOP, V, tiny

SHARED = {"share_prefixes": True}
UNSHARED = {"share_prefixes": False}


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, V, (4, 24))
    ids[2:, :16] = ids[:2, :16]
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def logps(model: Any, how: dict[str, bool]) -> Tensor:
    return model(**batch(), return_logps=True, preference_options=how).logps.detach()


def flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, **how: Any) -> Tensor:
    """``flash_attn_func`` on a CPU."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale, causal = how.get("softmax_scale"), how.get("causal", False)
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, *_: Any, **how: Any) -> Any:
    bounds = cu_seqlens_q.tolist()
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    return torch.cat([flash(q[None, p], k[None, p], v[None, p], **how)[0] for p in parts])


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, as far as transformers calls it, by torch's own attention."""
    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.__dict__.update(
        flash_attn_func=flash,
        flash_attn_varlen_func=flash_varlen,
        flash_attn_with_kvcache=None,
        __version__="2.8.0",
        __spec__=importlib.machinery.ModuleSpec("flash_attn", None),
    )
    padding.__dict__.update(pad_input=flash_utils._pad_input, unpad_input=flash_utils._unpad_input)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    for version in (2, 3, 4):
        name = f"is_flash_attn_{version}_available"
        monkeypatch.setattr(flash_utils, name, lambda version=version: version == 2)
    for name, value in list(vars(flash_utils).items()):  # what it has looked up is forgotten again
        if name.startswith("_") and (value is None or callable(value)):
            monkeypatch.setattr(flash_utils, name, value)


def test_flash_attention(flash_attn: None) -> None:
    model = tiny(dtype=torch.bfloat16)
    model.config._attn_implementation_internal = "flash_attention_2"
    attach(model)
    ids = batch()["input_ids"]
    plain, expected = model(ids).logits, logps(model, UNSHARED)
    found = logps(model, SHARED)
    assert verdict_of(model).mode == "shared"
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1.0)
    assert model.config._attn_implementation == "fastdpop_flash_attention_2"
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(logps(model, UNSHARED), expected)


class OwnAttention(LlamaAttention):
    """A class of the user's, in a file without transformers' functions."""


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_subclass_of_an_attention(implementation: str) -> None:
    model = tiny(dtype=torch.float32)
    model.set_attn_implementation(implementation)
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    expected = logps(attach(model), UNSHARED)
    torch.testing.assert_close(logps(model, SHARED), expected)
    assert verdict_of(model).mode == "shared"
    assert torch.equal(logps(model, UNSHARED), expected)


def test_precision_set_the_new_way() -> None:
    """After which torch refuses to be asked the old way."""
    model, before = attach(tiny(dtype=torch.float32)), torch.backends.fp32_precision
    expected = logps(model, UNSHARED)
    try:
        torch.backends.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        found = logps(model, SHARED)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = before
    torch.testing.assert_close(found, expected)


def test_hidden_states_of_a_reference() -> None:
    """They are those of the padded batch, so the policy's have to be, too."""
    model = attach(tiny(dtype=torch.float32))
    options = {"ref_hidden": torch.randn(4, 24, 32), "ref_weight": torch.randn(V, 32)}
    call = {**batch(), "preference": DPOP}
    expected = model(**call, preference_options={**options, **UNSHARED}).loss
    with pytest.warns(UserWarning, match="ref_hidden is given, whose states are those of the"):
        assert torch.equal(model(**call, preference_options={**options, **SHARED}).loss, expected)


def test_a_packed_batch_without_sharing() -> None:
    model = attach(tiny(dtype=torch.float32))
    prompts, chosen, rejected = [[5, 6, 7]], [[8, 9]], [[8, 10, 11]]
    (made,) = fastdpop.pack(prompts, chosen, rejected, least_shared=1)
    call = {**made, "preference": DPOP, "ref_logps": torch.zeros(2)}
    shared = model(**call)
    widths: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: widths.append(out.shape))
    apart = model(**call, preference_options=UNSHARED)
    assert widths == [(2, 6, 32)]
    torch.testing.assert_close(apart.loss, shared.loss)
    with pytest.warns(UserWarning, match="output_attentions is set"):
        torch.testing.assert_close(model(**call, output_attentions=True).loss, shared.loss)


@pytest.mark.parametrize("asked", [{"q_length": 5}, {"cache_position": torch.arange(5)}])
def test_a_mask_as_old_and_new_transformers_ask_for_it(asked: dict[str, Any]) -> None:
    """Before 5.4 with the tokens' positions instead of their number."""
    end, position = torch.tensor([5, 3, 3, 5, 5]), torch.tensor([0, 1, 2, 1, 2])
    layout = tree_attention.Layout(torch.stack([end, position])[None, None])
    with tree_attention.masks_of(layout):
        call = {"kv_length": 5, "mask_function": tree_attention.causal_mask_function, **asked}
        assert tree_attention._mask("sdpa", **call) is layout.mask
        dense = tree_attention._mask(
            "sdpa", **{**call, "mask_function": allowed_by(tree_attention.causal_mask_function)}
        )
    assert dense[0, 0].tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, False, False, True, False],
        [True, False, False, True, True],
    ]


def allowed_by(function: Any) -> Any:
    """A function that is not the causal one itself, as models have that look at more than the order."""

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return function(batch, head, query, key)

    return mask
