"""A call for a preference loss that nobody answers is an error where a guard sees it; `is_attached` tells the rest."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import fastdpop
from fastdpop.hf import PreferenceModelOutput, attach, detach, is_attached
from tests.hf.test_lifecycle import lora
from tests.tiny_models import batch, tiny

ASKED: list[dict[str, Any]] = [{"preference": "simpo"}, {"return_logps": True}]

REPLACED: dict[str, Callable[..., Any]] = {
    "the model's own": lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs),
    "keeps our arguments to itself": lambda self, preference=None, return_logps=None, **kwargs: (
        type(self).forward(self, **kwargs)
    ),
    "returns a tuple": lambda self, preference=None, return_logps=None, **kwargs: type(
        self
    ).forward(self, **kwargs, return_dict=False),
}


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("forward", REPLACED.values(), ids=REPLACED.keys())
def test_a_forward_that_was_replaced(forward: Callable[..., Any], asked: dict[str, Any]) -> None:
    model, inputs = attach(tiny()), batch()
    model.forward = MethodType(forward, model)
    assert not is_attached(model)
    model(**inputs)
    with pytest.raises(RuntimeError, match=r"unread: forward was replaced after fastdpop\.attach"):
        model(**inputs, **asked)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_an_unpickled_model(asked: dict[str, Any]) -> None:
    model, inputs = attach(tiny()), batch()
    for unpickled in (pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(lora(model)))):
        assert not is_attached(unpickled)
        assert unpickled(**inputs).loss.isfinite()
        with pytest.raises(RuntimeError, match="or the model was pickled"):
            unpickled(**inputs, **asked)
        with pytest.raises(RuntimeError, match="or the model was pickled"):
            copy.deepcopy(unpickled)(**inputs, **asked)
        assert attach(unpickled)(**inputs, return_logps=True).logps.shape == (4,)


def test_a_copy_is_attached_and_guarded() -> None:
    model, inputs = copy.deepcopy(attach(tiny())), batch()
    assert is_attached(model)
    assert isinstance(model(**inputs, preference="simpo"), PreferenceModelOutput)
    del model.forward
    with pytest.raises(RuntimeError, match="unread"):
        model(**inputs, preference="simpo")


def test_a_detached_model_is_the_models_own_again() -> None:
    """transformers takes any keyword in silence: this is what no guard sees, and what `is_attached` is for."""
    model, inputs = tiny(), batch()
    for of in (model, detach(attach(model))):
        assert not fastdpop.is_attached(of)
        out = of(**inputs, preference="simpo")
        assert not isinstance(out, PreferenceModelOutput)
        assert torch.equal(out.loss, of(**inputs).loss)


def test_is_attached_sees_through_what_stands_around_a_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    for made in (tiny(), lora(tiny())):
        compiled = cast(nn.Module, torch.compile(made, backend="eager"))
        around = (made, Wrapper(made), compiled, Wrapper(compiled))
        assert not any(map(is_attached, around))
        attach(made)
        assert all(map(is_attached, around))
        detach(made)
        assert not any(map(is_attached, around))
    with pytest.raises(TypeError, match="model is a Linear, expected a Hugging Face causal"):
        is_attached(Wrapper(nn.Linear(2, 2)))
