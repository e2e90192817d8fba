"""What cannot be shared is computed as without sharing, and says why, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig

from fastdpop import attach
from fastdpop.hf.sharing_check import verdict_of
from tests.models.shrink import build
from tests.tiny_models import SIZES, V, tiny

SHARED = {"share_prefixes": True}
UNSHARED = {"share_prefixes": False}
NO_EFFECT = "share_prefixes has no effect, because {}: the batch is computed as without it"


def batch(left: int = 0, right: int = 0) -> dict[str, Any]:
    """Two pairs with a prompt and half of the completion in common; one sequence is padded."""
    torch.manual_seed(0)
    ids = torch.randint(3, V, (4, 24))
    ids[2:, :16] = ids[:2, :16]
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    mask[1, 24 - right :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :12] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logps(model: Any, inputs: dict[str, Any], share: bool, **options: Any) -> tuple[Tensor, Any]:
    """Log-probs, and what was said."""
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options = {"share_prefixes": share, **options}
        found = model(**inputs, return_logps=True, preference_options=options).logps
    return found.detach(), [str(w.message) for w in said if "share_prefixes" in str(w.message)]


def assert_refused(
    model: Any, inputs: dict[str, Any], reason: str, text: str = NO_EFFECT, **options: Any
) -> None:
    expected, nothing = logps(model, inputs, False, **options)
    found, said = logps(model, inputs, True, **options)
    again, silence = logps(model, inputs, True, **options)
    assert (said, nothing, silence) == ([text.format(reason)], [], [])
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)


def assert_shared(model: Any, inputs: dict[str, Any], **options: Any) -> None:
    expected, _ = logps(model, inputs, False, **options)
    found, said = logps(model, inputs, True, **options)
    assert not said
    assert verdict_of(model).mode == "shared"
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


# ---- the call -----------------------------------------------------------------------------------


def holes(inputs: dict[str, Any]) -> None:
    inputs["attention_mask"][3, 5] = 0


def behind_padding(inputs: dict[str, Any]) -> None:
    """The first token is scored: padding predicts it."""
    inputs["attention_mask"][1, :2] = 0
    inputs["labels"][1] = inputs["input_ids"][1].masked_fill(inputs["attention_mask"][1] == 0, -100)


def behind_the_end(inputs: dict[str, Any]) -> None:
    inputs["attention_mask"][1, -2:] = 0
    inputs["labels"][1] = inputs["input_ids"][1]


def dense_mask(inputs: dict[str, Any]) -> None:
    inputs["attention_mask"] = torch.ones(4, 1, 24, 24, dtype=torch.bool).tril()


def restart(inputs: dict[str, Any]) -> None:
    inputs["position_ids"] = (torch.arange(24) % 12).expand(4, -1)


PREDICTED = "labels score tokens that are predicted from a place that attention_mask leaves out"
MASKS = ("full_attention", "sliding_attention")
CALLS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "holes": (holes, "attention_mask leaves out tokens inside a sequence"),
    "first token": (behind_padding, PREDICTED),
    "padding as labels": (behind_the_end, PREDICTED),
    "dense mask": (
        dense_mask,
        "attention_mask has shape (4, 1, 24, 24), not a tensor of input_ids' shape",
    ),
    "mask by kind of layer": (
        lambda i: i.update(attention_mask=dict.fromkeys(MASKS)),
        "attention_mask is a dict, not a tensor of input_ids' shape",
    ),
    "positions": (restart, "position_ids do not count the tokens of a sequence from 0"),
    "positions later": (
        lambda i: i.update(position_ids=torch.arange(1, 25)[None]),
        "position_ids do not count the tokens of a sequence from 0",
    ),
    "attention weights": (
        lambda i: i.update(output_attentions=True),
        "output_attentions is set, and a tree has no weights for each sequence",
    ),
    "types of tokens": (
        lambda i: i.update(token_type_ids=torch.zeros(4, 24, dtype=torch.int64)),
        "token_type_ids is given, which cannot be laid out as a tree",
    ),
    "another input": (
        lambda i: i.update(cache_position=torch.arange(24)),
        "cache_position is given, which cannot be laid out as a tree",
    ),
    "no token at all": (
        lambda i: (i["attention_mask"].zero_(), i["labels"].fill_(-100)),
        "the batch has no tokens",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    change, reason = CALLS[name]
    inputs = batch()
    change(inputs)
    model = attach(tiny("gemma2, softcap" if name.startswith("mask by") else "llama"))
    if name == "attention weights":
        model.set_attn_implementation("eager")
    before = model.config._attn_implementation
    assert_refused(model, inputs, reason)
    assert model.config._attn_implementation == before


def test_attention_weights_by_the_config() -> None:
    model = tiny()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    reason = "output_attentions is set, and a tree has no weights for each sequence"
    assert_refused(attach(model), batch(), reason)


def test_embeddings_instead_of_ids() -> None:
    model, inputs = attach(tiny()), batch()
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert_refused(model, inputs, "the model is called without input_ids")


def test_a_cache() -> None:
    model, inputs = attach(tiny()), batch()
    prompt = model(inputs["input_ids"][:, :8], use_cache=True).past_key_values
    layers = [(layer.keys.detach(), layer.values.detach()) for layer in prompt.layers]
    from transformers import DynamicCache

    call = {name: inputs[name][:, 8:] for name in ("input_ids", "labels")}
    outs, texts = [], []
    for share in (False, True):
        cache = DynamicCache(layers)
        found, said = logps(model, {**call, "past_key_values": cache}, share)
        outs.append(found)
        texts += said
    assert torch.equal(*outs)
    reason = "past_key_values is given, which cannot be laid out as a tree"
    assert texts == [NO_EFFECT.format(reason)]


def test_packed_by_the_caller() -> None:
    inputs = {n: t.reshape(1, -1) for n, t in batch().items() if n != "attention_mask"}
    inputs["position_ids"] = torch.arange(24).repeat(4)[None]
    bounds = torch.arange(0, 97, 24)
    assert_refused(
        attach(tiny()),
        inputs,
        "cu_seqlens is given (fastdpop.pack packs sequences that share)",
        cu_seqlens=bounds,
    )


def test_labels_of_another_shape_are_the_error_they_are() -> None:
    inputs = batch()
    inputs["labels"] = inputs["labels"][:, :-1]
    with (
        pytest.warns(UserWarning, match=r"input_ids has shape \(4, 24\) and labels \(4, 23\)"),
        pytest.raises(ValueError, match=r"labels has shape \(4, 23\), expected \(4, 24\)"),
    ):
        attach(tiny())(**inputs, return_logps=True, preference_options=SHARED)


@pytest.mark.parametrize("left", [0, 3])
def test_positions_that_count_are_shared(left: int) -> None:
    inputs = batch(left=left)
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    assert_shared(attach(tiny()), inputs)
    if not left:
        inputs["position_ids"] = torch.arange(24)[None]
        assert_shared(attach(tiny()), inputs)


def constant(inputs: dict[str, Any]) -> None:
    inputs["input_ids"].fill_(7)
    inputs["labels"] = inputs["input_ids"].clone()


def empty(inputs: dict[str, Any]) -> None:
    inputs["attention_mask"][2] = 0
    inputs["labels"][2] = -100


def cut(sequences: int, length: int) -> Callable[[dict[str, Any]], None]:
    def change(inputs: dict[str, Any]) -> None:
        for name, value in inputs.items():
            inputs[name] = value[:sequences, :length].clone()

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Any]], Any]:
    return lambda inputs: inputs.update({name: inputs[name].to(dtype)})


DEGENERATE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "all equal": lambda i: i["input_ids"].copy_(i["input_ids"][:1].clone()),
    "one token over and over": constant,
    "an empty sequence": empty,
    "one token each": cut(4, 1),
    "two tokens each": cut(4, 2),
    "one sequence": cut(1, 24),
    "three sequences": cut(3, 24),
    "nothing scored": lambda i: i["labels"].fill_(-100),
    "int32 ids": cast("input_ids", torch.int32),
    "bool mask": cast("attention_mask", torch.bool),
    "float mask": cast("attention_mask", torch.float32),
    "no mask": lambda i: i.update(attention_mask=None),
    "padding as the last label": lambda i: (
        i["attention_mask"][1, -1:].zero_(),
        i["labels"][1].copy_(i["input_ids"][1]),
    ),
}


@pytest.mark.filterwarnings("ignore:no token of the batch is scored")
@pytest.mark.parametrize("name", DEGENERATE)
def test_what_is_shared_all_the_same(name: str) -> None:
    inputs = batch()
    DEGENERATE[name](inputs)
    assert_shared(attach(tiny()), inputs)


def test_an_odd_number_with_pairs() -> None:
    inputs = batch()
    cut(3, 24)(inputs)
    model = attach(tiny())
    options = {"pairs": [[0, 2], [1, 2]]}
    found = [
        model(**inputs, preference="simpo", preference_options={**options, **how})
        for how in (UNSHARED, SHARED)
    ]
    torch.testing.assert_close(found[1].loss, found[0].loss)
    torch.testing.assert_close(found[1].logps, found[0].logps)


def test_labels_that_are_shifted_already() -> None:
    inputs = batch(right=3)
    inputs["labels"] = torch.cat([inputs["labels"][:, 1:], torch.full((4, 1), -100)], dim=1)
    assert_shared(attach(tiny()), inputs, shift_labels=False)
    inputs["labels"][1, -3] = 5
    assert_refused(attach(tiny()), inputs, PREDICTED, shift_labels=False)


# ---- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [0.0, 0.3])
def test_dropout_of_attention_weights(residual: float) -> None:
    """What comes before the layer that refuses has drawn random numbers: these are drawn again."""
    model = tiny("gpt2")
    model.set_attn_implementation("eager")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = residual
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.25
    reason = (
        "GPT2Attention drops out attention weights (0.25), which 0 in the model's config turns off"
    )
    assert_refused(attach(model), batch(), reason)


def small(kind: Any, **own: Any) -> Any:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return AutoModelForCausalLM.from_config(kind(**{**sizes, **own})).eval()


def test_no_positions() -> None:
    model = attach(small(BloomConfig, n_layer=2, n_head=4))
    reason = (
        "BloomForCausalLM takes no position_ids, and a token's place in a tree is not its position"
    )
    assert_refused(model, batch(), reason)


def test_attention_of_its_own() -> None:
    model = attach(small(GPTNeoConfig, num_layers=2, attention_types=[[["global"], 2]]))
    reason = (
        "GPTNeoAttention of GPTNeoForCausalLM computes attention by itself, "
        "not through transformers' attention interface"
    )
    assert_refused(model, batch(), reason)


STATES = {
    "jamba": "JambaForCausalLM has JambaMambaMixer, whose state runs along the sequence",
    "mamba2": "Mamba2ForCausalLM has Mamba2Block, whose state runs along the sequence",
    "qwen3_next": "Qwen3NextForCausalLM has Qwen3NextGatedDeltaNet, whose state runs along the sequence",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STATES)
def test_layers_with_a_state(name: str) -> None:
    assert_refused(attach(build(name)), batch(), STATES[name])


def encoder(name: str) -> Any:
    """A model of BERT's kin, in which a token sees what is behind it."""
    model = build(name)
    for part in (model.config, *model.modules()):
        for flag in ("is_decoder", "is_causal"):
            if getattr(part, flag, False):
                setattr(part, flag, False)
    return model


@pytest.mark.filterwarnings("ignore")
def test_attention_to_what_follows() -> None:
    model = attach(encoder("bert"), check=False)
    expected, _ = logps(model, batch(), False)
    found, said = logps(model, batch(), True)
    assert torch.equal(found, expected)
    assert len(said) == 1, said
    assert "its layers attend to more than what stands before a token" in said[0]


def test_models_warn_one_by_one_and_reason_by_reason() -> None:
    model, other = attach(tiny()), attach(tiny())
    inputs, second = batch(), batch()
    holes(inputs)
    restart(second)
    counts = [
        len(logps(m, i, True)[1]) for m in (model, other) for i in (inputs, second, inputs, second)
    ]
    assert counts == [1, 1, 0, 0] * 2


PEFT = {
    "prompt": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEFT)
def test_virtual_tokens(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = attach(peft.get_peft_model(tiny(dtype=torch.float32), PEFT[name](peft)))
    found, texts = [], []
    for share in (False, True):
        try:
            value, said = logps(model, batch(), share)
        except ValueError as error:
            value, said = str(error), []
        found.append(value)
        texts += said
    assert len(texts) == 1, (texts, found)
    assert "input_ids" in texts[0] if name == "prompt" else "past_key_values" in texts[0]
    if isinstance(found[0], Tensor):
        assert torch.equal(*found)
    else:
        assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["head adapter", "modules_to_save", "tied"])
def test_heads_of_adapters_share(name: str) -> None:
    peft = pytest.importorskip("peft")
    base = tiny("llama, tied" if name == "tied" else "llama")
    own = {
        "head adapter": {"target_modules": ["lm_head", "q_proj"]},
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "tied": {"target_modules": ["q_proj"]},
    }[name]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **own)
    model = peft.get_peft_model(base, config).double()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    attach(model)
    expected, _ = logps(model, batch(), False)
    found, said = logps(model, batch(), True)
    assert not said
    torch.testing.assert_close(found, expected)
