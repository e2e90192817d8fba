"""What attaching leaves as it was, what may stand around an attached model, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fastdpop import naive
from fastdpop.hf import PreferenceModelOutput, attach, detach, is_attached
from tests.tiny_models import CONFIGS, DPOP, V, batch, gradients, own_logps, tiny


@pytest.fixture
def single_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


# ---- what stays as it was -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral, router loss"])
def test_without_preference_nothing_changes(name: str) -> None:
    model, inputs = tiny(name), batch()
    before, text = model(**inputs), model.generate(inputs["input_ids"], max_new_tokens=4)
    attach(model)
    after = model(**inputs)
    assert type(after) is type(before)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4), text)
    with pytest.raises(ValueError, match="no_such_name"):
        model.generate(inputs["input_ids"], no_such_name=1)


def test_detach_restores_the_model() -> None:
    model = tiny()
    head = model.get_output_embeddings()
    before, head_before = dict(vars(model)), dict(vars(head))
    assert attach(model) is model
    assert detach(model) is model
    assert vars(model) == before
    assert vars(head) == head_before
    assert model.forward == MethodType(LlamaForCausalLM.forward, model)
    assert detach(model) is model


def test_a_forward_of_the_instance_is_kept_and_restored() -> None:
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return type(self).forward(self, *args, **kwargs)

    calls: list[Any] = []
    model, inputs = tiny(), batch()
    model.forward = own = MethodType(counting, model)
    attach(model, check=False)(**inputs, preference="simpo")
    assert calls == [model]
    twin = copy.deepcopy(model)
    assert detach(model).forward is own
    assert detach(twin).forward == MethodType(counting, twin)


def test_attaching_again_changes_the_settings() -> None:
    model, inputs = tiny(), batch()
    forward = attach(model, engine="eager").forward
    assert attach(model, engine="eager").forward == forward
    attach(model, workspace_bytes=4096)
    assert model.forward != forward
    model(**inputs, preference="simpo")
    assert detach(model).forward == MethodType(LlamaForCausalLM.forward, model)


def test_the_check_leaves_no_trace() -> None:
    model = tiny("mixtral, router loss").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    state = torch.get_rng_state()
    attach(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not gradients(model)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])


def test_copies_and_saved_models(tmp_path: Path) -> None:
    model, inputs = tiny(), batch()
    keys = list(model.state_dict())
    expected = attach(model)(**inputs, preference="simpo").loss
    assert list(model.state_dict()) == keys

    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    torch.testing.assert_close(twin(**inputs, preference="simpo").loss, expected)

    twin.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(attach(loaded)(**inputs, preference="simpo").loss, expected)

    unpickled = pickle.loads(pickle.dumps(twin))
    assert torch.equal(unpickled(**inputs).logits, twin(**inputs).logits)
    torch.testing.assert_close(attach(unpickled)(**inputs, preference="simpo").loss, expected)


def test_signature_for_trainers() -> None:
    model = tiny()
    own = list(inspect.signature(model.forward).parameters)
    names = list(inspect.signature(attach(model).forward).parameters)
    ours = ["preference", "ref_logps", "return_logps", "preference_options", "router_loss_weight"]
    ours += ["prefix_tree"]
    assert [name for name in names if name not in ours] == own
    assert [name for name in names if name in ours] == ours


def test_compiled_after_attaching() -> None:
    model, inputs = attach(tiny()), batch()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    expected = model(**inputs, preference="simpo").loss
    model.model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(**inputs, preference="simpo").loss, expected)


# ---- what stands around a model -----------------------------------------------------------------


def lora(model: Any, **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | more
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft reads a name that transformers renamed
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()


def test_peft_model_and_its_reference() -> None:
    base, inputs = tiny(), batch()
    ref_logps = own_logps(base, inputs).detach()
    model = attach(lora(base))
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(**inputs, return_logps=True).logps, ref_logps)
    expected_logps = own_logps(model, inputs)
    expected = naive.dpop_loss(expected_logps, ref_logps)
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    out = model(**inputs, preference=DPOP, ref_logps=ref_logps)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(model), expected_gradients)
    assert all("lora" in name for name in expected_gradients)
    detach(model)
    assert "forward" not in vars(base)


def test_peft_around_an_attached_model() -> None:
    inputs = batch()
    model = lora(attach(tiny()))
    out = model(**inputs, preference="simpo")
    torch.testing.assert_close(out.logps, own_logps(model, inputs).detach())


def test_distributed_data_parallel(single_process: None) -> None:
    model, inputs, ref_logps = attach(tiny()), batch(), torch.full((4,), -40.0)
    model(**inputs, preference=DPOP, ref_logps=ref_logps).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(model)
    out = wrapped(**inputs, preference=DPOP, ref_logps=ref_logps)
    out.loss.backward()
    assert isinstance(out, PreferenceModelOutput)
    torch.testing.assert_close(gradients(model), expected)
    with pytest.raises(TypeError, match="expected the model inside it"):
        attach(wrapped)


def test_fully_sharded(single_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, inputs, ref_logps = attach(tiny()), batch(), torch.full((4,), -40.0)
    model(**inputs, preference=DPOP, ref_logps=ref_logps).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**inputs, preference=DPOP, ref_logps=ref_logps).loss.backward()
    found = {name: gradient.full_tensor() for name, gradient in gradients(model).items()}  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected)


def test_accelerate_mixed_precision() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = attach(tiny(dtype=torch.float32)), batch()
    # Whoever made an accelerator before, a trainer for one, has fixed its precision.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared = accelerator.prepare(model)
        out = prepared(**inputs, preference="simpo")
        accelerator.backward(out.loss)
        assert isinstance(out, PreferenceModelOutput)
        assert gradients(model).keys() == dict(model.named_parameters()).keys()
        assert "preference" in inspect.signature(prepared.forward).parameters
        assert attach(prepared) is model  # still attached; the check runs under autocast
        with pytest.raises(RuntimeError, match="was wrapped after"):
            detach(prepared)
        plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert plain(**inputs, preference="simpo").loss.isfinite()
        detach(plain)
        assert plain(**inputs).logits.shape[-1] == V
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"labels": None}, ValueError, "labels is None, expected a tensor of token ids"),
        ({"logits_to_keep": 1}, ValueError, "logits_to_keep is 1, expected 0"),
        ({"use_cache": True}, ValueError, "use_cache is True, expected False"),
        (
            {"preference": None, "ref_logps": torch.zeros(4)},
            ValueError,
            "ref_logps is given without preference",
        ),
        (
            {"preference": None, "preference_options": {}},
            ValueError,
            "preference_options is given without",
        ),
        ({"return_logps": True}, ValueError, "preference is given with return_logps=True"),
        (
            {"preference": None, "return_logps": True, "ref_logps": torch.zeros(4)},
            ValueError,
            "ref_logps is given with return_logps=True",
        ),
        ({"preference_options": {"beta": 0.1}}, ValueError, "preference_options contains 'beta'"),
        (
            {"preference_options": {"engine": "eager"}},
            ValueError,
            "preference_options contains 'engine'",
        ),
        ({"preference_options": "mean"}, TypeError, "preference_options is a str, expected a dict"),
        ({"preference": "dpoo"}, ValueError, "dpoo"),
        ({"preference": "dpo"}, ValueError, "needs a reference"),
        (
            {"labels": torch.zeros(4, 8, dtype=torch.int64)},
            ValueError,
            r"labels has shape \(4, 8\), expected \(4, 9\)",
        ),
        ({"labels": torch.full((4, 9), V)}, ValueError, str(V)),
        ({"no_such_column": 1}, TypeError, "'no_such_column', which nothing reads: leave it out"),
    ],
)
def test_bad_calls(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = attach(tiny())
    head = dict(vars(model.lm_head))
    with pytest.raises(error, match=message):
        model(**{**batch(), "preference": "simpo", **given})
    assert vars(model.lm_head) == head


def test_odd_batch() -> None:
    with pytest.raises(ValueError, match="3"):
        attach(tiny())(**batch(3), preference="simpo")


class Adding(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + 1.0
        return out


class Other(LlamaForCausalLM):
    """Returns logits that its head did not give."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = torch.zeros(out.logits.shape)
        return out


class Drifting(LlamaForCausalLM):
    """Gives other logits at every call."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.calls
        return out


class Pictures(LlamaForCausalLM):
    def forward(self, pixels: Tensor, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Adding, "Adding applies (__add__|add) to its logits"),
        (Other, "Other returned logits of type Tensor"),
        (Drifting, "Drifting's own logits and from fastdpop differ"),
        (Pictures, "Pictures does not run on token ids alone"),
    ],
)
def test_the_check_raises_and_leaves_the_model_as_it_was(kind: Any, message: str) -> None:
    model = kind(CONFIGS["llama"]()).double()
    with pytest.raises(RuntimeError, match=message):
        attach(model)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    attach(model, check=False)


class Shifted(nn.Linear):
    """Its shift is 0 until it is trained, so that the numbers alone would not give it away."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.shift


def test_unreadable_heads() -> None:
    model = tiny()
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(RuntimeError, match="its forward is replaced"):
        attach(model)
    model = tiny()
    model.set_output_embeddings(Shifted(32, V).double())
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM applies (__add__|add) to its logits"):
        attach(model)
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, V)))
    with pytest.raises(RuntimeError, match=r"is a Sequential .* expected a module with a weight"):
        attach(model)
    model.set_output_embeddings(None)
    with pytest.raises(RuntimeError, match="has no output embedding"):
        attach(model)


def test_bad_attachments() -> None:
    with pytest.raises(TypeError, match="model is a Linear, expected a Hugging Face causal"):
        attach(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="attach before wrapping or compiling"):
        attach(cast(nn.Module, torch.compile(tiny(), backend="eager")))
    with pytest.raises(ValueError, match="engine is 'warp'"):
        attach(tiny(), engine="warp")
    with pytest.raises(ValueError, match="workspace_bytes is 0"):
        attach(tiny(), workspace_bytes=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    with pytest.raises(ValueError, match="check is True, expected False"):
        attach(model)
    attach(model, check=False)


def test_attaching_again_in_vain_leaves_the_model_as_it_was() -> None:
    model = attach(tiny(), engine="eager")
    own = model.forward.fastdpop.settings
    with pytest.raises(ValueError, match="cannot run on"):
        attach(model, engine="triton")
    assert model.forward.fastdpop.settings == own
    assert model(**batch(), return_logps=True).logps is not None


def test_a_model_whose_logits_are_not_finite_cannot_be_checked() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"gives no finite logits .* load its weights first"):
        attach(model)
    assert not is_attached(model)
