"""What reads the row itself, or what sequences were seen before, and is right or refused all the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
)
from transformers.masking_utils import sdpa_mask

from fastdpop import attach
from fastdpop.hf.sharing import shared_batch
from fastdpop.hf.sharing_check import verdict_of
from tests.tiny_models import DPOP, SIZES, V, tiny

SHARED = {"share_prefixes": True}
UNSHARED = {"share_prefixes": False}


def batch(length: int = 40, pairs: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, V, (2 * pairs, length))
    ids[pairs:, : length // 2] = ids[:pairs, : length // 2]
    return {"input_ids": ids, "labels": ids.clone()}


def logps(model: Any, how: dict[str, bool], **call: Any) -> Tensor:
    return model(**call, return_logps=True, preference_options=how).logps.detach()


def dynamic() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("first", ["attach", "a shared call"])
def test_the_check_leaves_dynamic_rotary_embeddings_as_they_were(first: str) -> None:
    """They remember the longest sequence, and compute their angles anew for a short one after it."""
    model, call = dynamic(), batch()
    long = torch.randint(3, V, (1, 200))
    if first == "attach":
        expected = model(call["input_ids"]).logits
        model(long)
        attach(model)
        assert torch.equal(model(call["input_ids"]).logits, expected)
        return
    attach(model)
    expected = logps(model, UNSHARED, **call)
    model(long)
    torch.testing.assert_close(logps(model, SHARED, **call), expected)
    assert verdict_of(model).mode == "shared"
    torch.testing.assert_close(logps(model, UNSHARED, **call), expected)


def test_scales_by_the_place_in_the_row() -> None:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **{**SIZES, "head_dim": 8, "max_position_embeddings": 128},
        num_local_experts=2,
        intermediate_size_mlp=48,
        moe_layers=[],
        attention_chunk_size=64,
        no_rope_layers=[1, 0],
        floor_scale=50,
        attn_temperature_tuning=True,
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    model = attach(model.double().eval())
    torch.testing.assert_close(
        logps(model, SHARED, **batch(24)), logps(model, UNSHARED, **batch(24)), rtol=1e-5, atol=1e-5
    )
    assert verdict_of(model).mode == "shared"
    with pytest.warns(UserWarning, match="attn_temperature_tuning counts places in a row of over"):
        found = logps(model, SHARED, **batch(40))
    assert torch.equal(found, logps(model, UNSHARED, **batch(40)))


def near(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **how: Any) -> Any:
    """Attention to the last 40 tokens only, which a short sequence does not tell from all."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    allowed = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril().triu(-39)
    out = nn.functional.scaled_dot_product_attention(query, key, value, allowed)
    return out.transpose(1, 2).contiguous(), None


def test_attention_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for interface, function in ((AttentionInterface, near), (AttentionMaskInterface, sdpa_mask)):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
        interface.register("near", function)
    model = tiny()
    model.set_attn_implementation("near")
    call = batch(60)
    expected = logps(attach(model), UNSHARED, **call)
    with pytest.warns(UserWarning, match="'near' is not one of transformers' own"):
        assert torch.equal(logps(model, SHARED, **call), expected)


def test_neftune() -> None:
    model, call = attach(tiny()), batch()
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    expected = logps(model, UNSHARED, **call)
    torch.testing.assert_close(logps(model, SHARED, **call), expected)
    model.train()
    with pytest.warns(UserWarning, match="NEFTune's noise depends on the length of the row"):
        assert torch.equal(logps(model, SHARED, **call), logps(model, UNSHARED, **call))


class MixesIn(nn.Module):
    """Some of the token before."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) + hidden.roll(1, dims=1)


def test_a_model_that_is_changed_is_checked_again() -> None:
    model, call = attach(tiny()), batch()
    logps(model, SHARED, **call)
    model.model.layers[0].mlp = MixesIn(model.model.layers[0].mlp)
    with pytest.raises(RuntimeError, match="over a prefix tree differ from its own"):
        logps(model, SHARED, **call)


@pytest.mark.parametrize("token", [0, 1, 2, V - 1])
def test_one_token_again_and_again(token: int) -> None:
    model = attach(tiny())
    ids = torch.full((2, 3), token)
    call = {"input_ids": ids, "labels": ids}
    torch.testing.assert_close(logps(model, SHARED, **call), logps(model, UNSHARED, **call))
    assert verdict_of(model).mode == "shared"


def test_states_of_more_dimensions() -> None:
    call = batch(24)
    made = shared_batch({"input_ids": call["input_ids"]}, call["labels"])
    n = len(made.tree.input_ids)
    states = torch.randn(4, 1, n, 5)
    found = made.unshared(states)
    assert found.shape == (4, 2, 24, 5)
    for layer in range(4):
        assert torch.equal(found[layer], made.unshared(states[layer]))


def test_arguments_of_the_models_own_loss() -> None:
    """transformers' Trainer gives the number of items in the batch to every model."""
    model, call = attach(tiny(), share_prefixes=True), batch()
    count = torch.tensor(40)
    with pytest.warns(UserWarning, match="num_items_in_batch has no part in a loss of pairs"):
        out = model(**call, preference=DPOP, ref_logps=torch.zeros(2), num_items_in_batch=count)
    assert verdict_of(model).mode == "shared"
    torch.testing.assert_close(
        out.loss, model(**call, preference=DPOP, ref_logps=torch.zeros(2)).loss
    )


def test_one_warning_whatever_the_sizes() -> None:
    model = attach(tiny(), share_prefixes=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for length in (20, 24, 28):
            call = batch(length)
            mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
            model(**call, attention_mask=mask, return_logps=True)
    (warning,) = said
    assert "attention_mask has shape" in str(warning.message)


def test_integer_masks_of_plain_calls() -> None:
    """The mask of a tree is int64 as well."""
    model, call = attach(tiny(), share_prefixes=True), batch()
    model.set_attn_implementation("eager")
    model(**call, return_logps=True)
    ids = call["input_ids"]
    mask = (torch.ones(40, 40, dtype=torch.int64).triu(1) * -(10**9))[None, None]
    expected = tiny()
    expected.load_state_dict(model.state_dict())
    expected.set_attn_implementation("eager")
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits, expected(ids, attention_mask=mask).logits
    )
