"""Random models of a few architectures, and what their own full logits give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
)

from fastdpop import losses

V = 97
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # logits that differ
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2, softcap": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "cohere, logit scale": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "granite, logit scale": lambda: GraniteConfig(**SIZES, logits_scaling=4.0),
    "gpt2": lambda: GPT2Config(
        vocab_size=V,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "phi, bias": lambda: PhiConfig(**SIZES),
    "mixtral, router loss": lambda: MixtralConfig(
        **SIZES, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.7
    ),
}
DPOP = losses.get("dpop", beta=0.3, lam=50.0)


def tiny(name: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    """A random model of an architecture, in evaluation mode (no dropout)."""
    # Grouped experts have no float64.
    config = CONFIGS[name]()
    model = (
        AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    )
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


def batch(sequences: int = 4, length: int = 9) -> dict[str, Tensor]:
    """Right-padded sequences with prompts that are not scored."""
    ids = torch.randint(3, V, (sequences, length))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def own_logps(model: Any, inputs: dict[str, Any]) -> Tensor:
    """``(S,)`` log-probs from a model's full logits."""
    labels = inputs["labels"]
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1]
    targets = labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return (logps * (targets != -100)).sum(-1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
