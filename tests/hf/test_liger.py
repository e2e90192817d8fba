"""Liger's patches and `attach` on one model: Liger first works, Liger last is an error. Its kernels need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("liger_kernel")

from liger_kernel.transformers import monkey_patch
from transformers import LlamaForCausalLM

from fastdpop.hf import attach, detach
from tests.hf.test_lifecycle import lora
from tests.tiny_models import DPOP, batch, gradients, own_logps, tiny

# Liger reads names that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")
KERNELS = {"rope": False, "rms_norm": False, "swiglu": False, "geglu": False}


def patch(kind: str, model: Any = None) -> None:
    """Liger's own ``forward``, which computes the loss of labels from the weight of the head."""
    apply: Callable[..., None] = getattr(monkey_patch, f"apply_liger_kernel_to_{kind}")
    accepted = monkey_patch.inspect.signature(apply).parameters
    off = {name: value for name, value in KERNELS.items() if name in accepted}
    apply(**off, fused_linear_cross_entropy=True, model=model)


@pytest.mark.parametrize("name", ["llama", "gemma2, softcap", "mixtral, router loss"])
def test_liger_first(name: str) -> None:
    model, inputs = tiny(name), batch()
    ref_logps = torch.full((4,), -40.0, dtype=torch.float64)
    attach(model)(**inputs, preference=DPOP, ref_logps=ref_logps).loss.backward()
    expected, expected_gradients = own_logps(model, inputs), gradients(model)
    model.zero_grad()
    detach(model)

    patch(name.split(",")[0], model)
    patched = model.forward
    assert patched.__func__.__module__.startswith("liger_kernel")
    attach(model).train()
    out = model(**inputs, preference=DPOP, ref_logps=ref_logps)
    out.loss.backward()
    torch.testing.assert_close(out.logps, expected.detach())
    torch.testing.assert_close(gradients(model), expected_gradients)
    assert detach(model).forward == patched


def test_liger_last_on_the_model_is_an_error() -> None:
    model, inputs = attach(tiny()), batch()
    patch("llama", model)
    for more in ({"preference": "simpo"}, {"return_logps": True}):
        with pytest.raises(RuntimeError, match="Apply Liger and other patches first, then attach"):
            model(**inputs, **more)
    out = model(input_ids=inputs["input_ids"])
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(
        attach(model)(**inputs, return_logps=True).logps, own_logps(tiny_like(model), inputs)
    )


def tiny_like(model: Any) -> Any:
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    return twin


def test_liger_last_inside_peft_is_an_error() -> None:
    """PEFT calls the model's ``forward`` by name, past the model's own hooks."""
    inputs, model = batch(), lora(attach(tiny()))
    patch("llama", model.get_base_model())
    with pytest.raises(RuntimeError, match="then attach"):
        model(**inputs, preference="simpo")


def test_liger_last_on_the_class_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)  # to be restored
    model, inputs = attach(tiny()), batch()
    expected = model(**inputs, preference="simpo").loss
    patch("llama")
    assert LlamaForCausalLM.forward.__module__.startswith("liger_kernel")
    torch.testing.assert_close(model(**inputs, preference="simpo").loss, expected)
    # A model made from the patched class, as with `use_liger_kernel=True`.
    torch.testing.assert_close(
        attach(tiny_like(model))(**inputs, preference="simpo").loss, expected
    )
    detach(model)
    assert model.forward.__func__.__module__.startswith("liger_kernel")
    assert not model._forward_pre_hooks
    assert not model.model._forward_pre_hooks
