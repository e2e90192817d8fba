"""Heads and trunks as people train them: adapters, resized vocabularies, checkpointing, quantised weights, pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, Gemma3Config

from fastdpop import naive
from fastdpop.engines import available
from fastdpop.hf import attach
from tests.hf.test_attach import Watch
from tests.hf.test_lifecycle import lora
from tests.tiny_models import DPOP, SIZES, V, batch, gradients, own_logps, tiny


def assert_as_full_logits(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    """Loss, log-probs and all gradients of DPOP, float64."""
    model.zero_grad()
    full = inputs | more
    ref_logps = own_logps(model, full).detach() + torch.tensor([1.0, -1.0, 0.5, 0.5]).double()
    expected_logps = own_logps(model, full)
    expected = naive.dpop_loss(expected_logps, ref_logps)
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    assert expected_gradients
    out = attach(model)(**full, preference=DPOP, ref_logps=ref_logps)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.logps, expected_logps.detach())
    torch.testing.assert_close(gradients(model), expected_gradients, rtol=1e-6, atol=1e-9)
    return out


# ---- adapters on the head -----------------------------------------------------------------------

# PEFT advises on merging, which is not done here.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings", "ignore:.*lora_bias", "ignore:.gradient_checkpointing_enable"
)

ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["lm_head", "q_proj"]},
    "rsLoRA": {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 3},
    "LoRA with bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "a trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", ["llama", "gemma2, softcap", "phi, bias", "cohere, logit scale"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapted_head(adapter: str, name: str) -> None:
    assert_as_full_logits(lora(tiny(name), **ADAPTERS[adapter]), batch())


@pytest.mark.parametrize("engine", available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_fresh_adapter_is_its_reference_to_the_bit(
    adapter: str, dtype: torch.dtype, engine: str
) -> None:
    model = lora(tiny(dtype=dtype), **ADAPTERS[adapter], init_lora_weights=True)
    inputs = batch()
    attach(model, engine=engine)
    with torch.no_grad(), model.disable_adapter():
        ref_logps = model(**inputs, return_logps=True).logps
    out = model(**inputs, preference=DPOP, ref_logps=ref_logps)
    assert torch.equal(out.logps, ref_logps)
    assert not out.penalty.any()


def test_several_adapters_on_the_head() -> None:
    from peft import LoraConfig

    model = lora(tiny(), target_modules=["lm_head"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], lora_alpha=5))
    model.base_model.set_adapter(["default", "second"])
    assert_as_full_logits(model, batch())
    model.set_adapter("second")
    assert_as_full_logits(model, batch())


def test_a_merged_adapter() -> None:
    model, inputs = lora(tiny(), target_modules=["lm_head"]), batch()
    expected = attach(model)(**inputs, return_logps=True).logps
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs, return_logps=True).logps, expected)
    torch.testing.assert_close(own_logps(model, inputs), expected)


def test_dropout_of_the_adapter() -> None:
    model = attach(lora(tiny(), target_modules=["lm_head"], lora_dropout=0.5)).train()
    inputs = batch()
    torch.manual_seed(3)
    expected = own_logps(model, inputs)
    torch.manual_seed(3)
    torch.testing.assert_close(model(**inputs, return_logps=True).logps, expected)
    assert not torch.equal(model(**inputs, return_logps=True).logps, expected)


def test_an_adapted_head_makes_no_logits() -> None:
    """The weight is copied, with the adapter's columns beside it."""
    model, inputs = lora(tiny(), target_modules=["lm_head"]), batch()
    attach(model)
    with Watch() as watch:
        model(**inputs, preference="simpo").loss.backward()
    assert (V, 32 + 4) in watch.shapes
    assert (4, 9, V) not in watch.shapes


@pytest.mark.parametrize("autocast", [True, False])
def test_an_adapted_head_in_bfloat16(autocast: bool) -> None:
    """Under autocast, and as PEFT makes it: adapters in float32 beside a head in bfloat16."""
    dtype = torch.float32 if autocast else torch.bfloat16
    model, inputs = lora(tiny(dtype=dtype), target_modules=["lm_head"]), batch()
    assert model.base_model.model.lm_head.lora_A["default"].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = own_logps(model, inputs)
        out = attach(model)(**inputs, preference="simpo")
    out.loss.backward()
    torch.testing.assert_close(out.logps, expected.detach().float(), rtol=0.02, atol=0.0)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert len(gradients(model)) == 2


def test_an_adapter_that_is_not_a_sum_is_refused() -> None:
    model = lora(tiny(), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM applies \w+ to its logits"):
        attach(model)


def test_a_weight_that_is_computed() -> None:
    model = tiny()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    assert_as_full_logits(model, batch())


# ---- vocabularies -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama, tied", "phi, bias"])
@pytest.mark.parametrize("attach_first", [True, False])
def test_a_resized_vocabulary(name: str, attach_first: bool) -> None:
    model, inputs = tiny(name), batch()
    if attach_first:
        attach(model)
    model.resize_token_embeddings(V + 5, pad_to_multiple_of=8, mean_resizing=False)
    assert len(model.get_output_embeddings().weight) == 104
    inputs["labels"][0, 4] = inputs["input_ids"][0, 4] = V + 4
    assert_as_full_logits(model, inputs)
    inputs["labels"][0, 4] = 104
    with pytest.raises(ValueError, match="104"):
        model(**inputs, return_logps=True)


# ---- trunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = tiny().train(), batch()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_as_full_logits(model, inputs)


class EightBits(nn.Module):
    """A layer as bitsandbytes has it: integers and a scale for each row; its gradient reaches the input only."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter(
            (layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        self.register_buffer("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.scale)


def quantise(module: nn.Module, wanted: Callable[[str], bool]) -> None:
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and wanted(name):
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, EightBits(layer))


def test_a_quantised_trunk_with_a_plain_head() -> None:
    model = tiny()
    quantise(model, lambda name: name != "lm_head")
    assert_as_full_logits(model, batch())


def test_a_quantised_head_is_refused() -> None:
    model = tiny()
    quantise(model, lambda name: name == "lm_head")
    message = "lm_head of LlamaForCausalLM is a EightBits .* leave the head out of the quantisation"
    with pytest.raises(RuntimeError, match=message):
        attach(model)


# ---- vision-language models ---------------------------------------------------------------------


def vision_language() -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = SIZES | {"head_dim": 8, "sliding_window": 8}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return AutoModelForCausalLM.from_config(config).double().eval()


def test_a_vision_language_model() -> None:
    """Text alone, and pictures, whose places are not scored."""
    model, inputs = vision_language(), batch()
    inputs["input_ids"] = inputs["input_ids"].clamp_max(89)
    inputs["labels"] = torch.where(inputs["labels"] == -100, -100, inputs["input_ids"])
    assert_as_full_logits(model, inputs)
    inputs["input_ids"][:, :4] = 90
    inputs["labels"][:, :4] = -100
    pixels = torch.randn(4, 3, 28, 28, dtype=torch.float64)
    kinds = (inputs["input_ids"] == 90).long()
    assert_as_full_logits(model, inputs, pixel_values=pixels, token_type_ids=kinds)
    assert any("vision" in name for name in gradients(model))


def test_the_language_model_inside_a_vision_language_model() -> None:
    inner = vision_language().model.language_model
    with pytest.raises(RuntimeError, match="has no output embedding"):
        attach(inner)
