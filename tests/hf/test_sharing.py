"""An attached model that computes common prefixes once gives what it gives without."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import torch._dynamo.testing
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    MistralConfig,
)

import fastdpop
from fastdpop import attach, detach, losses
from fastdpop.hf.sharing_check import verdict_of
from tests.tiny_models import CONFIGS, DPOP, SIZES, V, gradients, tiny

SHARED = {"share_prefixes": True}
UNSHARED = {"share_prefixes": False}
CHECKPOINTING = "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
"""Its new name is not yet in every version."""


def batch(
    dtype: torch.dtype = torch.float64, left: bool = False, length: int = 24
) -> dict[str, Any]:
    """Two pairs, padded on one side, of one prompt each and with half of the completion in common."""
    torch.manual_seed(0)
    ids = torch.randint(3, V, (4, length))
    ids[2:, : length - 8] = ids[:2, : length - 8]
    mask = torch.ones_like(ids)
    edge = slice(0, 3) if left else slice(-3, None)
    mask[1, edge] = 0
    if left:
        mask[3, edge] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length // 2] = -100
    ref_logps = -40 + torch.randn(4, dtype=dtype)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "preference": DPOP,
        "ref_logps": ref_logps,
    }


def both(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any, Any, Any]:
    """Outputs and gradients without and with sharing."""
    found: list[Any] = []
    for shared in (UNSHARED, SHARED):
        model.zero_grad()
        out = model(**inputs, preference_options={**options, **shared})
        out.loss.backward()
        found += [out, gradients(model)]
    return tuple(found)


def assert_equal(model: Any, inputs: dict[str, Any], rtol: float = 2e-6, **options: Any) -> None:
    expected, expected_gradients, out, found = both(model, inputs, **options)
    assert verdict_of(model).mode == "shared"
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, rtol=rtol, atol=rtol)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=10 * rtol, atol=10 * rtol)


# ---- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("mixtral")])
def test_as_without(name: str, left: bool) -> None:
    if left and name.startswith(("gpt2", "gemma2")):
        pytest.skip("transformers' own: gpt2 counts padding, and eager attention is NaN in it")
    # Angles of positions are float32 numbers, and padding on the left moves them.
    assert_equal(attach(tiny(name)), batch(left=left), rtol=2e-5 if left else 2e-6)


def windowed(kind: Callable[..., Any], **own: Any) -> Any:
    torch.manual_seed(0)
    config = kind(**{**SIZES, "head_dim": 8, **own})
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()


MODELS: dict[str, Callable[[], Any]] = {
    "sliding window": lambda: windowed(MistralConfig, sliding_window=5),
    "windows in every other layer": lambda: windowed(
        Gemma3TextConfig,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=2.0,
    ),
    "sinks and windows": lambda: windowed(
        GptOssConfig, sliding_window=5, num_local_experts=4, num_experts_per_tok=2
    ),
    "chunks": lambda: windowed(
        Llama4TextConfig,
        attention_chunk_size=7,
        num_local_experts=2,
        intermediate_size_mlp=48,
        moe_layers=[],
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_masks_that_are_more_than_causal(name: str, implementation: str) -> None:
    model = MODELS[name]()
    if name.startswith("sinks") and implementation == "sdpa":
        pytest.skip("transformers has no sinks there")
    model.set_attn_implementation(implementation)
    if implementation == "eager":  # which has NaN for padding in float64
        model.float()
    assert_equal(attach(model), batch(), rtol=1e-4 if implementation == "eager" else 1e-5)
    assert model.config._attn_implementation == f"fastdpop_{implementation}"


def test_the_window_is_seen() -> None:
    """Were it not, the numbers above would be those of a model without one."""
    wide, narrow = (windowed(MistralConfig, sliding_window=size) for size in (64, 5))
    inputs = batch()
    outs = [attach(m)(**inputs, preference_options=SHARED).logps for m in (wide, narrow)]
    assert (outs[0] - outs[1]).abs().min() > 1e-3


OPTIONS: dict[str, dict[str, Any]] = {
    "statistics": {"statistics": ("entropy", "mean_logits", "token_accuracy", "displacement")},
    "values of pairs": {"pair_values": {"weight": torch.tensor([0.25, 0.75])}},
    "pairs that share a sequence": {"pairs": [[0, 2], [0, 3], [1, 3]]},
    "a pair of one sequence": {"pairs": [[0, 0], [1, 3]]},
    "sum": {"reduction": "sum"},
    "temperature": {"temperature": 2.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    inputs = batch()
    if "pairs" in OPTIONS[name]:
        inputs["ref_logps"] = inputs["ref_logps"][:4]
    assert_equal(attach(tiny()), inputs, **OPTIONS[name])


@pytest.mark.parametrize("loss", ["dpo", "simpo", "ipo", "aot", "sigmoid_norm", "ld"])
def test_losses(loss: str) -> None:
    inputs = batch()
    if loss == "ld":
        inputs["preference"] = losses.length_desensitised(losses.get("dpo"), 0.5)
    elif loss == "sigmoid_norm":
        inputs["preference"] = losses.wpo_weighted(losses.get("dpo"))
    else:
        inputs["preference"] = loss
    if loss == "simpo":
        del inputs["ref_logps"]
    assert_equal(attach(tiny()), inputs)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_log_probs(reduction: str) -> None:
    model, inputs = attach(tiny()), batch()
    call = {n: inputs[n] for n in ("input_ids", "attention_mask", "labels")}
    expected, found = (
        model(**call, return_logps=True, preference_options={"reduction": reduction, **how}).logps
        for how in (UNSHARED, SHARED)
    )
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_hidden_states_are_those_of_the_batch() -> None:
    model, inputs = attach(tiny()), batch()
    expected, found = (
        model(**inputs, output_hidden_states=True, preference_options=how).hidden_states
        for how in (UNSHARED, SHARED)
    )
    present = inputs["attention_mask"] == 1
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one[present], other[present])
        assert (one[~present] == 0).all()


def test_fewer_tokens_reach_the_model() -> None:
    model, inputs = attach(tiny()), batch()
    widths: list[int] = []
    model.model.layers[0].register_forward_hook(
        lambda _, args, out: widths.append(args[0].shape[1])
    )
    model(**inputs, preference_options=SHARED)
    shared = widths[-1]
    model(**inputs, preference_options=UNSHARED)
    lengths = [24, 21, 8, 8]  # two whole sequences, and what is new in their partners
    assert (shared, widths[-1]) == (sum(lengths), 24)


def test_the_first_step_is_exact_in_bf16() -> None:
    """Policy and reference are one computation: log-ratios are 0, and DPOP's hinge is off."""
    model, inputs = attach(tiny(dtype=torch.float32), share_prefixes=True), batch()
    del inputs["ref_logps"], inputs["preference"]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            options = {"dtype": torch.float64}
            ref = model(**inputs, return_logps=True, preference_options=options).logps
        out = model(**inputs, preference=DPOP, ref_logps=ref)
    assert (out.chosen_rewards == 0).all()
    assert (out.rejected_rewards == 0).all()
    assert (out.penalty == 0).all()


# ---- around the model ---------------------------------------------------------------------------


@pytest.mark.filterwarnings(CHECKPOINTING)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = attach(tiny()), batch()
    _, expected, _, _ = both(model, inputs)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.zero_grad()
    model(**inputs, preference_options=SHARED).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings(CHECKPOINTING)
def test_lora() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    model = peft.get_peft_model(tiny(), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    attach(model)
    inputs = batch()
    found = []
    for how in (UNSHARED, SHARED):
        model.zero_grad()
        with torch.no_grad(), model.disable_adapter():
            call = {n: inputs[n] for n in ("input_ids", "attention_mask", "labels")}
            ref = model(**call, return_logps=True, preference_options=how).logps
        out = model(**{**inputs, "ref_logps": ref}, preference_options=how)
        out.loss.backward()
        found.append((out.loss, ref, gradients(model)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's
def test_compiled_trunk_compiles_no_length_anew() -> None:
    model = attach(tiny(dtype=torch.float32), share_prefixes=True)
    inputs = [batch(torch.float32, length=n) for n in (24, 26, 29, 31, 34)]
    expected = [model(**each).loss for each in inputs]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.model.compile(backend=counter, dynamic=None)
    counts = []
    for each, loss in zip(inputs, expected, strict=True):
        model.zero_grad()
        out = model(**each)
        out.loss.backward()
        torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[-1] == counts[1], counts  # the second length makes it dynamic


def test_threads() -> None:
    """One shares, one does not, and one has the model's own logits, all at once."""
    model, inputs = attach(tiny()), batch()
    expected = model(**inputs, preference_options=UNSHARED).loss.item()
    own = model(inputs["input_ids"]).logits.detach()
    wrong: list[str] = []

    def run(how: dict[str, bool] | None) -> None:
        for _ in range(10):
            if how is None:
                if not torch.allclose(model(inputs["input_ids"]).logits, own):
                    wrong.append("logits")
            elif abs(model(**inputs, preference_options=how).loss.item() - expected) > 1e-6:
                wrong.append(str(how))

    threads = [threading.Thread(target=run, args=(how,)) for how in (SHARED, UNSHARED, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_all_else_is_as_before(tmp_path: Any) -> None:
    model, plain, inputs = attach(tiny(), share_prefixes=True), tiny(), batch()
    plain.load_state_dict(model.state_dict())
    model(**inputs)
    assert model.config._attn_implementation == "fastdpop_sdpa"
    ids = inputs["input_ids"]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    mask = inputs["attention_mask"]
    texts = [
        m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        for m in (model, plain)
    ]
    assert torch.equal(*texts)
    model.save_pretrained(tmp_path)
    assert "fastdpop" not in (tmp_path / "config.json").read_text()
    assert pickle.loads(pickle.dumps(model.config))._attn_implementation == "sdpa"
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**inputs).loss, model(**inputs).loss)
    detach(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_another_implementation_later() -> None:
    model, inputs = attach(tiny(), share_prefixes=True), batch()
    expected = model(**inputs).loss
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert model.config._attn_implementation == "fastdpop_eager"
    detach(model)
    assert model.config._attn_implementation == "eager"


def test_attach_sets_the_default() -> None:
    model = attach(tiny(), share_prefixes=True)
    model(**batch())
    assert verdict_of(model).mode == "shared"
    attach(model, share_prefixes=False)
    assert model.config._attn_implementation == "sdpa"
    model(**batch())
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(TypeError, match="share_prefixes is 'yes', expected True or False"):
        attach(model, share_prefixes="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="share_prefixes is 1, expected True or False"):
        model(**batch(), preference_options={"share_prefixes": 1})


# ---- laid out by the caller ---------------------------------------------------------------------


def packed(least: int = 1) -> tuple[Any, dict[str, Any]]:
    """Pairs as `fastdpop.pack` lays them out, and the padded batch of the same."""
    inputs = batch()
    inputs["labels"][2:, :12] = -100
    rows = [
        ids[mask == 1].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    prompts = [row[:12] for row in rows[:2]]
    (made,) = fastdpop.pack(
        prompts, [r[12:] for r in rows[:2]], [r[12:] for r in rows[2:]], least_shared=least
    )
    return made, inputs


def test_pack() -> None:
    model = attach(tiny())
    made, inputs = packed()
    expected = model(**inputs, preference_options=UNSHARED)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    out = model(**made, preference=DPOP, ref_logps=inputs["ref_logps"])
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logps, expected.logps)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=2e-5, atol=2e-5)


def test_pack_for_a_model_that_cannot_share() -> None:
    made, inputs = packed()
    model = attach(tiny())
    expected = model(**inputs, preference_options=UNSHARED).loss
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.warns(UserWarning, match="drops out attention weights"):
        model(**made, preference=DPOP, ref_logps=inputs["ref_logps"])
    model.eval()
    out = model(**made, preference=DPOP, ref_logps=inputs["ref_logps"])
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("end"), r"prefix_tree lacks \['end'\]"),
        (lambda t: t.update(end=t["end"][:-1]), r"prefix_tree has end of shape \(\d+,\)"),
        (lambda t: t["end"].fill_(1), "end of prefix_tree is 1 at 1"),
        (lambda t: t["hidden_index"].fill_(10_000), r"hidden_index of prefix_tree is not in \[0,"),
    ],
)
def test_trees_that_do_not_fit(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    made, inputs = packed()
    change(made["prefix_tree"])
    with pytest.raises(ValueError, match=message):
        attach(tiny())(**made, preference=DPOP, ref_logps=inputs["ref_logps"])


def test_a_tree_without_a_preference() -> None:
    made, _ = packed()
    with pytest.raises(ValueError, match="prefix_tree is given without preference"):
        attach(tiny())(**made)
