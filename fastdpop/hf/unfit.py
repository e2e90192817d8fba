"""What was given in the place of a causal language model, and what to give instead."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES as TRUNKS

from fastdpop.hf.zero import whole_shape


def no_model(given: Any) -> str:
    """Of what is no model of transformers."""
    kind = type(given).__name__
    text, expected = f"model is a {kind}", "expected a Hugging Face causal language model"
    if isinstance(given, str):
        return (
            f"model is the text {given!r:.60}, {expected}: "
            f"transformers.AutoModelForCausalLM.from_pretrained({given!r:.60})"
        )
    if isinstance(given, type):
        return f"model is the class {given.__name__}, {expected}: an object of it"
    if isinstance(given, PreTrainedTokenizerBase):
        return f"{text}, which is a tokenizer, {expected}"
    if isinstance(given, PreTrainedConfig):
        return f"{text}, which is a configuration, {expected}: AutoModelForCausalLM.from_config"
    if isinstance(getattr(given, "model", None), PreTrainedModel):  # a pipeline, a trainer
        return f"{text}, {expected}: the one inside it, its attribute `model`"
    return f"{text}, {expected}"


def other_model(given: Any) -> str | None:
    """Of a model whose logits at a position are not those of the next token; None of one that may be causal."""
    name, expected = type(given).__name__, "expected a causal language model"
    if name in CAUSAL.values():
        return None
    if name.endswith("ForMaskedLM"):
        return sees_what_it_predicts(name)
    if getattr(getattr(given, "config", None), "is_encoder_decoder", False):
        return (
            f"model is a {name}, an encoder-decoder, whose logits at a position are of the label there and not of the "
            f"next one, {expected}: call fastdpop.fused_preference_loss on its decoder's hidden states, with "
            "shift_labels=False"
        )
    return None


def sees_what_it_predicts(name: str) -> str:
    """Of a model in which a token has a part in the log-probs of those before it."""
    return (
        f"model is a {name}, which sees the tokens that it predicts, expected a causal language model (of BERT and its "
        "like, one whose config has is_decoder=True)"
    )


def no_head(given: Any) -> str:
    """Of a model of transformers that has no output embedding."""
    name = type(given).__name__
    text = f"{name} has no output embedding (get_output_embeddings() is None)"
    causal = CAUSAL.get(str(getattr(getattr(given, "config", None), "model_type", None)))
    expected = f"expected a model with an lm_head, {causal or 'of AutoModelForCausalLM'}"
    if name in TRUNKS.values():
        return f"{text}: it is the trunk, without the lm_head, {expected}"
    if "Classification" in name or "Reward" in name or "QuestionAnswering" in name:
        return f"{text}: it gives scores, not log-probs of tokens, {expected}"
    return f"{text}, {expected}"


def check_ids(model: Any, ids: object, error: Exception) -> None:
    """Of token ids on which a model's forward has failed.

    Raises:
        ValueError: one of them has no embedding.
    """
    if not isinstance(ids, torch.Tensor) or ids.numel() == 0:
        return
    rows = whole_shape(model.get_input_embeddings().weight)[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise ValueError(
            f"input_ids contains {low if low < 0 else high}, expected ids in [0, {rows}), the embeddings of "
            f"{type(model).__name__}: is the tokenizer another model's?"
        ) from error


def failed(model: nn.Module, device: torch.device, error: Exception) -> str:
    """Of a model that does not run on token ids."""
    name, cause = type(model).__name__, f"{type(error).__name__}: {error}"
    if device.type == "cpu" and any(map(_of_liger, model.modules())):
        return (
            f"{name} has kernels of Liger, which need a GPU, and is on the CPU: move it to a GPU before it is attached "
            f"({cause})"
        )
    return (
        f"{name} does not run on token ids alone, so it cannot be checked: its own forward, without fastdpop, raises "
        f"{cause}. Pass check=False if it runs on what you give it"
    )


def _of_liger(module: nn.Module) -> bool:
    forwards = (module.forward, type(module))
    return any(str(inspect.unwrap(f).__module__).startswith("liger_kernel") for f in forwards)
