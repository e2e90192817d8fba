"""What a newcomer gives to `attach` and `preference_loss` by mistake: what happened, and what to give."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama import modeling_llama

from fastdpop.hf import attach, is_attached, preference_loss
from tests.tiny_model import tiny_tokenizer
from tests.tiny_models import CONFIGS, batch, tiny

T5 = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
BERT = BertConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=48,
)
GIVEN: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a trunk": (
        lambda: tiny().model,
        RuntimeError,
        "LlamaModel has no output embedding (get_output_embeddings() is None): it is the trunk, without the lm_head, "
        "expected a model with an lm_head, LlamaForCausalLM",
    ),
    "a classifier": (
        lambda: LlamaForSequenceClassification(CONFIGS["llama"]()),
        RuntimeError,
        "it gives scores, not log-probs of tokens, expected a model with an lm_head, LlamaForCausalLM",
    ),
    "an encoder-decoder": (
        lambda: T5ForConditionalGeneration(T5),
        TypeError,
        "model is a T5ForConditionalGeneration, an encoder-decoder, whose logits at a position are of the label there",
    ),
    "a masked model": (
        lambda: BertForMaskedLM(BERT),
        TypeError,
        "model is a BertForMaskedLM, which sees the tokens that it predicts, expected a causal language model",
    ),
    "a bidirectional model": (
        lambda: BertLMHeadModel(BERT),
        TypeError,
        "model is a BertLMHeadModel, which sees the tokens that it predicts, expected a causal language model (of BERT "
        "and its like, one whose config has is_decoder=True)",
    ),
    "a model's name": (
        lambda: "org/model",
        TypeError,
        "model is the text 'org/model', expected a Hugging Face causal language model: "
        "transformers.AutoModelForCausalLM.from_pretrained('org/model')",
    ),
    "a class": (lambda: LlamaForCausalLM, TypeError, "model is the class LlamaForCausalLM"),
    "a tokenizer": (tiny_tokenizer, TypeError, "which is a tokenizer, expected a Hugging Face"),
    "a configuration": (CONFIGS["llama"], TypeError, "AutoModelForCausalLM.from_config"),
    "a pipeline": (
        lambda: SimpleNamespace(model=tiny()),
        TypeError,
        "expected a Hugging Face causal language model: the one inside it, its attribute `model`",
    ),
    "nothing": (lambda: None, TypeError, "model is a NoneType, expected a Hugging Face causal"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_no_causal_language_model(name: str) -> None:
    make, error, message = GIVEN[name]
    given = make()
    with pytest.raises(error, match=re.escape(message)):
        attach(given)
    with pytest.raises(error, match=re.escape(message)):
        preference_loss(given, **batch(), loss="simpo")
    if isinstance(given, nn.Module):
        assert not is_attached(given)


def test_an_encoder_decoder_is_refused_without_a_check_too() -> None:
    with pytest.raises(TypeError, match="shift_labels=False"):
        attach(T5ForConditionalGeneration(T5), check=False)


def test_a_model_that_looks_ahead_is_found_whatever_it_is_called() -> None:
    model = tiny()
    own = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    model.model.forward = forward
    with pytest.raises(TypeError, match="LlamaForCausalLM, which sees the tokens that it predicts"):
        attach(model)
    model.model.forward = own
    attach(model)


def test_a_decoder_of_bert_is_taken() -> None:
    config = BertConfig(**{**BERT.to_dict(), "is_decoder": True})
    assert is_attached(attach(BertLMHeadModel(config)))


def test_a_forward_that_fails_by_itself() -> None:
    model = tiny()
    own = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("pictures")

    model.model.forward = forward
    message = "its own forward, without fastdpop, raises KeyError: 'pictures'. Pass check=False"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attach(model)
    model.model.forward = own
    attach(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Liger's kernels run here")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")
def test_kernels_of_liger_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = pytest.importorskip("liger_kernel.transformers")
    for name, value in vars(modeling_llama).items():
        monkeypatch.setattr(modeling_llama, name, value)  # to be restored
    for rest in ({}, {"fused_linear_cross_entropy": False, "swiglu": False, "rope": False}):
        model = tiny(dtype=torch.float32)
        patches.apply_liger_kernel_to_llama(model=model, **rest)
        with pytest.raises(RuntimeError, match="has kernels of Liger, which need a GPU, and is on"):
            attach(model)
        assert not is_attached(model)
