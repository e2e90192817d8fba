"""`preference_loss`: the loss of a call that attaches what is not attached, and misses nothing."""

from __future__ import annotations

import pickle
from types import MethodType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import LlamaForSequenceClassification

from fastdpop.hf import PreferenceModelOutput, attach, is_attached, preference_loss
from fastdpop.hf.forward import attachment_of
from tests.hf.test_lifecycle import lora, single_process
from tests.tiny_models import CONFIGS, DPOP, batch, tiny

__all__ = ["single_process"]
REF = torch.full((4,), -40.0, dtype=torch.float64)


def expected(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The loss of a twin that was attached."""
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    return cast(Tensor, attach(twin)(**inputs, preference=DPOP, ref_logps=REF).loss.detach())


def test_a_model_is_attached_once() -> None:
    model, inputs = tiny(), batch()
    out = preference_loss(model, **inputs, loss=DPOP, ref_logps=REF)
    assert isinstance(out, PreferenceModelOutput)
    assert torch.equal(out.loss, expected(model, inputs))
    out.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    own = attachment_of(model)
    assert own is not None
    preference_loss(model, **inputs, loss="simpo")
    assert attachment_of(model) is own


def test_an_attached_model_keeps_its_settings() -> None:
    model = attach(tiny(), engine="eager", share_prefixes=True)
    preference_loss(model, **batch(), loss="simpo")
    own = attachment_of(model)
    assert own is not None
    assert own.settings["engine"] == "eager"
    assert own.settings["share_prefixes"] is True


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's
def test_what_stands_around_a_model_is_called() -> None:
    called = []

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            called.append(self)
            return self.module(**inputs)

    inputs = batch()
    for model in (tiny(), lora(tiny())):
        wrapper = Wrapper(cast(nn.Module, torch.compile(model, backend="eager")))
        wrapper(**inputs)  # compiled for what the model does by itself
        out = preference_loss(wrapper, **inputs, loss=DPOP, ref_logps=REF)
        attached = model(**inputs, preference=DPOP, ref_logps=REF)
        torch.testing.assert_close(out.loss, attached.loss)
        assert called.pop() is called.pop() is wrapper
        assert is_attached(wrapper)


def test_a_model_inside_ddp(single_process: None) -> None:
    inputs, model = batch(), tiny()
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(**inputs)
    out = preference_loss(parallel, **inputs, loss=DPOP, ref_logps=REF)
    assert torch.equal(out.loss, expected(model, inputs))
    out.loss.backward()
    assert parallel.reducer is not None
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_options_are_given_by_themselves() -> None:
    model, inputs = attach(tiny()), batch()
    options = {"reduction": "none", "pairs": [[0, 3], [1, 2]], "statistics": ["entropy"]}
    out = preference_loss(model, **inputs, loss=DPOP, ref_logps=REF, **options)
    same = model(**inputs, preference=DPOP, ref_logps=REF, preference_options=options)
    assert torch.equal(out.loss, same.loss)
    assert out.loss.shape == (2,)
    assert torch.equal(cast(Tensor, out.entropy), same.entropy)


def test_shifted_labels_are_labels_and_whether_to_shift_is_an_option() -> None:
    model, inputs = attach(tiny()), batch()
    out = preference_loss(model, **inputs, loss=DPOP, ref_logps=REF)
    shifted = nn.functional.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]
    for given in (
        {"shift_labels": shifted},
        {"labels": shifted, "shift_labels": False},
    ):
        same = preference_loss(model, **inputs, **given, loss=DPOP, ref_logps=REF)
        assert torch.equal(out.loss, same.loss)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preference": "dpop"}, "preference is given to preference_loss, expected loss="),
        ({"preference_options": {}}, "preference_options is given to .*by themselves"),
        ({"return_logps": True}, r"return_logps is given .*return_logps=True\)\.logps"),
        ({"return_dict": False}, "return_dict is False, expected True"),
    ],
)
def test_what_is_written_otherwise(given: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        preference_loss(model, **batch(), loss="simpo", **given)


def test_no_loss_is_no_cross_entropy() -> None:
    with pytest.raises(TypeError, match="loss is None, expected a name"):
        preference_loss(tiny(), **batch(), loss=cast(Any, None))
    with pytest.raises(ValueError, match="ref_logps"):
        preference_loss(tiny(), **batch(), loss="dpop")


def test_a_model_whose_attachment_was_lost_is_not_attached_with_other_settings() -> None:
    model, inputs = attach(tiny(), share_prefixes=True), batch()
    unpickled = pickle.loads(pickle.dumps(model))
    model.forward = MethodType(type(model).forward, model)
    for lost in (model, unpickled):
        with pytest.raises(RuntimeError, match=r"expected fastdpop\.attach\(model\) once more"):
            preference_loss(lost, **inputs, loss="simpo")


def test_what_cannot_be_attached() -> None:
    trunk = tiny().model
    classifier = LlamaForSequenceClassification(CONFIGS["llama"]())
    for model in (trunk, classifier, nn.Linear(2, 2)):
        with pytest.raises((TypeError, RuntimeError), match=f"{type(model).__name__}"):
            preference_loss(cast(nn.Module, model), **batch(), loss="simpo")


def test_a_wrapper_that_changes_the_output() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs).loss

    with pytest.raises(RuntimeError, match="Wrapper returned a Tensor, expected the Preference"):
        preference_loss(Wrapper(tiny()), **batch(), loss="simpo")


def test_copies_of_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = nn.DataParallel(tiny())
    monkeypatch.setattr(parallel, "device_ids", [0, 1])
    with pytest.raises(TypeError, match="DataParallel over 2 devices"):
        preference_loss(parallel, **batch(), loss="simpo")
