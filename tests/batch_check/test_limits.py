"""What a model's configuration and its weights show: how long sequences may be, and what training does to 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BloomConfig, FalconConfig, GPT2Config, LlamaConfig

import fastdpop
from fastdpop.batch_check import check_batch
from fastdpop.batch_check.model import check_weights
from fastdpop.batch_check.vocabulary import Vocabulary
from tests.batch_check.test_model import batch, check, model
from tests.tiny_model import tiny_llama, tiny_tokenizer

# ---- context ------------------------------------------------------------------------------------


def positions(config: Any, part: str = "wpe") -> int | None:
    found = torch.nn.Module()
    found.add_module(part, torch.nn.Identity())
    found.config = config
    return Vocabulary.of(found, tiny_tokenizer()).positions


def scaled(**scaling: Any) -> Any:
    """By 4, of 100 positions."""
    theta = {"rope_theta": 10000.0}
    return LlamaConfig(max_position_embeddings=100, rope_parameters={**theta, **scaling})


def test_how_long_a_context_is() -> None:
    assert positions(LlamaConfig(max_position_embeddings=100)) == 100
    assert positions(GPT2Config(n_positions=64)) == 64
    assert positions(LlamaConfig(max_position_embeddings=100), "mixer") is None  # of states alone
    assert positions(scaled(rope_type="linear", factor=4.0)) == 400
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert positions(scaled(**yarn, original_max_position_embeddings=100)) == 400
    assert positions(scaled(**yarn, original_max_position_embeddings=25)) == 100
    assert positions(scaled(rope_type="dynamic", factor=4.0)) is None
    assert positions(BloomConfig()) is None
    assert positions(FalconConfig(alibi=True)) is None
    assert positions(FalconConfig(alibi=False, max_position_embeddings=50)) == 50


def test_sequences_longer_than_the_context() -> None:
    given = batch()
    longest = int(given["attention_mask"].sum(1).max())
    own = model()
    own.config.max_position_embeddings = longest
    assert check(own, given).ok
    wide = {
        name: torch.nn.functional.pad(value, (0, 9), value={"labels": -100, "input_ids": 257}.get(name, 0))
        for name, value in given.items()
    }  # fmt: skip
    assert check(own, wide).ok  # padding is none of a sequence
    own.config.max_position_embeddings = longest - 1
    report = check(own, given)
    assert report.codes == ("longer-than-context",)
    row = int(given["attention_mask"].sum(1).argmax())
    message = report.findings[0].message
    assert f"context of {longest - 1} tokens, the longest, sequence {row}, has {longest}" in message
    assert report.facts[-1].startswith("the model was not run")
    places = (given["attention_mask"].cumsum(1) - 1).clamp_min(0) % 10
    assert "longer-than-context" not in check(own, {**given, "position_ids": places}).codes


# ---- weights ------------------------------------------------------------------------------------


def codes(of: Any) -> list[str]:
    return [finding.code for finding in check_weights(of)]


@pytest.mark.parametrize(
    ("dtype", "harm"),
    [
        (torch.float16, "weights become NaN"),
        (torch.bfloat16, "less than 1/512 of a weight is lost"),
    ],
)
def test_trained_weights_in_16_bits(dtype: torch.dtype, harm: str) -> None:
    own, given = model().to(dtype), batch()
    (finding,) = check(own, given).findings
    assert finding.code == "weights-half-precision"
    assert finding.severity == "warning"
    assert f"all trained weights are {dtype}" in finding.message
    assert harm in finding.message
    for part in (own.model.layers, own.model.norm):
        part.requires_grad_(False).float()
    assert "all trained" in check_weights(own)[0].message
    own.model.norm.requires_grad_(True)
    assert "nearly all trained" in check_weights(own)[0].message
    assert codes(own.requires_grad_(False)) == []
    assert codes(tiny_llama()) == []


def test_what_the_message_says_of_16_bits() -> None:
    """A step of AdamW, without what a model adds."""
    for dtype, step in ((torch.float16, 1e-3), (torch.bfloat16, 1 / 513)):
        weight = torch.nn.Parameter(torch.linspace(1, 8, 2000).to(dtype))
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, 1e-5)
        torch.optim.AdamW([weight], lr=step, weight_decay=0.0).step()
        if dtype == torch.float16:
            assert not bool(weight.isfinite().all())
        else:
            assert torch.equal(weight.detach(), before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # asked for by peft
def test_adapters_in_float32_on_16_bits() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model().bfloat16(), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert codes(adapted) == []
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    assert codes(adapted) == []
    adapted.get_output_embeddings().requires_grad_(True)
    assert codes(adapted) == ["weights-half-precision"]


def test_weights_of_which_others_keep_copies() -> None:
    class Engine(torch.nn.Module):
        __module__ = "deepspeed.runtime.engine"

    own, engine = model().bfloat16(), Engine()
    engine.module = own
    assert codes(engine) == []
    assert codes(own) == ["weights-half-precision"]
    for parameter in own.parameters():
        parameter.ds_id = 0
    assert codes(own) == []


def test_the_quickstart_finds_nothing() -> None:
    """What it says before the first step, of a model that is its own reference."""
    own, given = model(), batch()
    fastdpop.attach(own)
    with torch.no_grad():
        ref = own(**given, return_logps=True).logps
    report = check_batch(own, given, ref, tokenizer=tiny_tokenizer(), at_start=True, verbose=False)
    assert report.ok
    assert "nats; 0 apart in the mean (0 but for rounding before" in report.facts[-1]
