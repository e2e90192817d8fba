"""A tiny random instance of any causal language model that transformers knows.

:func:`build` shrinks a configuration by the names of its fields; what a family needs beyond that is one line in
:data:`FIXES`. Nothing here changes a model's code, and fastdpop knows no model by name.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

V = 97
LARGEST = 20_000_000
"""Parameters that a shrunken model may have."""

SIZES: dict[str, Any] = {
    "vocab_size": V,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # width
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    # depth
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    # length
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "n_shared_experts": 1,
    # latent and indexed attention
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "index_topk"), 4),
    # state spaces and linear attention
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_state_size", "mamba_d_head"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    # what heads do to logits, switched on where it is off by default
    "final_logit_softcapping": 5.0,
    "logits_scaling": 4.0,
    "lm_head_multiplier": 0.5,
    # in those that may also see what is behind a token
    **dict.fromkeys(("is_decoder", "causal"), True),
    "output_router_logits": True,  # the router's loss is part of the comparison
}

_TWO_KINDS = ["linear_attention", "full_attention"]
_QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_GEMMA_PER_LAYER = {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8}

FIXES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "shared_experts_intermediate_size": 32,
        "head_dim": 16,
    },
    "dots3_note_vision_encoder": {
        "pyramid_num_routed": [-1, 4],
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8, **_GEMMA_PER_LAYER},
    "gemma4_text": _GEMMA_PER_LAYER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": _TWO_KINDS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "hash_seed": 0,
        **dict.fromkeys(("local_attn_chunk_length", "lsh_attn_chunk_length"), 3),
        **dict.fromkeys(("hidden_dropout_prob", "local_attention_probs_dropout_prob"), 0.0),
        "attention_head_size": 8,
        "feed_forward_size": 64,
    },
    "xlm": {"emb_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""Further fields, by ``model_type``, of whole configurations and of their parts."""


TRAINING_ONLY = {"reformer"}
"""Reversible layers refuse to go backward in evaluation mode; these have no dropout here."""

LEFT_OUT = {
    "cpmant": "sees the tokens that it predicts: its attention looks both ways, whatever its config says",
    "gemma3n": "its vision tower needs the package timm; its language model, `gemma3n_text`, is right",
    "gemma4_assistant": "a drafting head that runs on another model's states, not on tokens alone",
    "gemma4_unified_assistant": "a drafting head that runs on another model's states, not on tokens alone",
    "musicgen": "not a language model of text: several heads for audio codes",
    "musicgen_melody": "not a language model of text: several heads for audio codes",
    "xlnet": "sees the tokens that it predicts, but with attn_type 'uni', which fails in transformers beside a mask",
}
"""Why a model is not expected to be right; the sweep checks that it is not."""


def fields(kind: type[PretrainedConfig]) -> set[str]:
    """Names that a configuration takes."""
    names = set(inspect.signature(kind.__init__).parameters)
    for base in kind.__mro__:
        names |= set(vars(base).get("__annotations__", {}))
    return names


def shrink(kind: type[PretrainedConfig]) -> PretrainedConfig:
    """A configuration with one layer of each type that its default has, and every known size small."""
    names, fixes = fields(kind), FIXES.get(kind.model_type, {})
    chosen = {name: value for name, value in SIZES.items() if name in names}
    default = kind()
    for name, part in vars(default).items():
        if isinstance(part, PretrainedConfig):
            chosen[name] = shrink(type(part))
    if "kv_lora_rank" in names:  # latent attention has no grouped heads
        chosen["num_key_value_heads"] = SIZES["num_attention_heads"]
    if isinstance(getattr(default, "layer_types", None), list) and "layer_types" in names:
        types = list(dict.fromkeys(default.layer_types))
        chosen["layer_types"] = types if len(types) > 1 else types * 2
        chosen["num_hidden_layers"] = len(chosen["layer_types"])
    return kind(**{**chosen, **fixes})


def build(model_type: str) -> Any:
    """A random fp32 model in evaluation mode, whose logits have a spread of about 1.

    Raises:
        ValueError: the shrunken model is still larger than `LARGEST`.
    """
    config = shrink(CONFIG_MAPPING[model_type])
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{model_type} has {size:,} parameters after shrinking")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.train(model_type in TRAINING_ONLY)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits
        head = model.get_output_embeddings()
        head.weight.mul_(1.0 / logits.std())
        if head.bias is not None:
            head.bias.normal_()
    return model
