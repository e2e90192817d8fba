"""What fastdpop does with partitioned parameters, on one process that plays DeepSpeed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastdpop
from fastdpop.hf import attach, detach
from fastdpop.hf.zero import Partitioned, PartitionedHead, gathering, torch_linear
from tests.displacing import NAMES
from tests.tiny_models import DPOP, batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # read by PEFT


def _of_deepspeed(function: FunctionType) -> Any:
    function.__module__ = "deepspeed.runtime.zero.parameter_offload"
    return function


class _Parameters:
    """Gathers and partitions, and counts."""

    def __init__(self) -> None:
        self.gathered: list[Any] = []

    def convert(self, model: nn.Module) -> None:
        for number, parameter in enumerate(model.parameters()):
            p: Any = parameter
            p.ds_id, p.ds_shape, p.ds_whole = number, p.shape, p.data
            p.all_gather, p.partition = self.gather, self.partition
            self.partition([p])

    def gather(self, param_list: list[Any]) -> None:
        for p in param_list:
            if p.shape != p.ds_shape:
                self.gathered.append(p)
                p.data = p.ds_whole

    def partition(self, param_list: list[Any]) -> None:
        for p in param_list:
            p.data = torch.empty(0, dtype=p.dtype)


def _own(module: nn.Module) -> list[Any]:
    return [p for p in module._parameters.values() if p is not None]


def _initialize(model: nn.Module, parameters: _Parameters) -> None:
    """Hooks as DeepSpeed's: around each module's forward, and around its backward."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        parameters.gather(_own(module))
        return tuple(_then(x, module, parameters.partition) for x in args)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        parameters.partition(_own(module))
        return _then(output, module, parameters.gather)

    for module in model.modules():
        if _own(module):
            module.register_forward_pre_hook(_of_deepspeed(before))
            module.register_forward_hook(_of_deepspeed(after))


def _then(tensor: Any, module: nn.Module, action: Any) -> Any:
    """The tensor, whose derivative comes before an action on the parameters of a module."""
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return tensor
    result = tensor.view_as(tensor)
    result.register_hook(lambda gradient: action(_own(module)))
    return result


@pytest.fixture
def parameters() -> Iterator[_Parameters]:
    """And what ZeRO-3 puts in the place of ``torch.nn.functional.linear``."""
    own = nn.functional.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = input.matmul(weight.t())
        return product if bias is None else product + bias

    nn.functional.linear = _of_deepspeed(linear)
    yield _Parameters()
    assert nn.functional.linear is linear
    nn.functional.linear = own


def _lora(model: Any) -> Any:
    targets = ["q_proj", "lm_head"]
    return get_peft_model(model, LoraConfig(r=3, target_modules=targets, init_lora_weights=False))


MONITORED: dict[str, Any] = {
    "statistics": ["displacement"],
    "pair_values": {"weight": torch.tensor([0.5, 3.0])},
}


def _calls() -> list[dict[str, Any]]:
    inputs = batch()
    reference = torch.full((4,), -30.0, dtype=torch.float64)
    return [
        {"preference": DPOP, "ref_logps": reference, **inputs, "preference_options": MONITORED},
        {"return_logps": True, **inputs},
    ]


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("llama", False),
        ("llama, tied", False),
        ("phi, bias", False),
        ("gemma2, softcap", False),
        ("llama", True),
    ],
)
def test_loss_and_gradients(parameters: _Parameters, name: str, adapted: bool) -> None:
    whole = tiny(name)
    whole = attach(_lora(whole) if adapted else whole, check=False)
    model = copy.deepcopy(whole)
    parameters.convert(model)
    _initialize(model, parameters)
    inner = model.get_base_model() if adapted else model
    weight = next(p for n, p in inner.lm_head.named_parameters() if n.endswith("weight"))
    for call in _calls():
        losses, outputs = [], []
        for one in (whole, model):
            parameters.gathered.clear()
            out = one(**call)
            forward = sum(p is weight for p in parameters.gathered)
            loss = out.logps.mean() if out.loss is None else out.loss
            one.zero_grad()
            loss.backward()
            losses.append(loss.item())
            outputs.append(out)
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        for key in (name for name in NAMES if call.get("preference")):
            torch.testing.assert_close(outputs[1][key], outputs[0][key], rtol=1e-9, atol=1e-12)
        assert forward == (2 if whole.config.tie_word_embeddings else 1)  # an embedding, too
        for (path, want), found in zip(whole.named_parameters(), model.parameters(), strict=True):
            if want.requires_grad:
                torch.testing.assert_close(found.grad, want.grad, rtol=1e-9, atol=1e-12, msg=path)
        assert weight.shape == (0,) or whole.config.tie_word_embeddings
        parameters.partition(list(model.parameters()))


def test_nothing_is_left_behind(parameters: _Parameters) -> None:
    model = attach(tiny(), check=False)
    parameters.convert(model)
    _initialize(model, parameters)
    before = dict(vars(model.lm_head))
    hooks = dict(model.lm_head._forward_hooks), dict(model.lm_head._forward_pre_hooks)
    call = _calls()[0]
    model(**call)
    with pytest.raises(ValueError, match="ref_logps"):
        model(**{**call, "ref_logps": None})
    for _ in range(2):
        assert vars(model.lm_head) == before
        assert (model.lm_head._forward_hooks, model.lm_head._forward_pre_hooks) == hooks
        model(**call)


def test_before_initialize(parameters: _Parameters) -> None:
    """A model that is made in pieces is checked as any other, a module at a time."""
    model = tiny()
    parameters.convert(model)
    attach(model)
    assert parameters.gathered
    assert all(p.shape == (0,) for p in model.parameters())
    with (
        gathering(model.model),
        torch.no_grad(),
        pytest.raises(RuntimeError, match="nothing gathers it: call the model after deepspeed"),
    ):
        model(**_calls()[0])
    detach(model)
    stop = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"cannot be checked.*ZeroDivisionError"):
        attach(model)
    stop.remove()
    assert all(p.shape == (0,) for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.model.layers.modules())


def test_a_plain_call_in_the_middle(parameters: _Parameters) -> None:
    model = attach(tiny(), check=False)
    parameters.convert(model)
    _initialize(model, parameters)
    call = _calls()[0]
    hook = model.model.register_forward_hook(lambda *_: model(call["input_ids"]) and None)
    with pytest.raises(RuntimeError, match=r"in the middle of a call.*before or after"):
        model(**call)
    hook.remove()
    assert model(**call).loss.isfinite()


def test_a_head_with_more_parameters(parameters: _Parameters) -> None:
    model = tiny()
    model.lm_head.temperature = nn.Parameter(torch.ones(3))
    attach(model, check=False)
    parameters.convert(model)
    with pytest.raises(RuntimeError, match=r"temperature \(3,\) besides its weight.*ZeRO-2"):
        model(**_calls()[0])


def test_stand_ins(parameters: _Parameters) -> None:
    """They note down what is made of them, and refuse what they cannot."""
    model = tiny()
    want = model.lm_head.weight.detach().clone()
    parameters.convert(model)
    with PartitionedHead(model):
        weight = model.lm_head.weight
        assert isinstance(weight, Partitioned)
        assert weight.shape == want.shape
        made = nn.functional.normalize(torch.cat([weight, weight[:, :2]], dim=1)[5:], dim=-1)
        assert made.shape == (92, 34)
        assert made.dtype == torch.float64
        for name, function in {
            "mul_": lambda: weight.mul_(2.0),
            "__setitem__": lambda: weight.__setitem__(0, 0.0),
            "item": lambda: weight.sum().item(),
            "tolist": lambda: weight.tolist(),
            "unique": lambda: weight.unique(),
        }.items():
            with pytest.raises(RuntimeError, match=rf"{name} to its weight.*ZeRO-3.*ZeRO-2"):
                function()
        with pytest.raises(RuntimeError, match=r"weight of the head of Llama.*nothing gathers it"):
            made.read()
        parameters.gather(list(model.lm_head.parameters()))
        expected = nn.functional.normalize(torch.cat([want, want[:, :2]], dim=1)[5:], dim=-1)
        assert torch.equal(made.read(), expected)
    assert model.lm_head.weight.shape == want.shape


def test_torch_linear(parameters: _Parameters) -> None:
    theirs = nn.functional.linear
    with torch_linear():
        torchs = nn.functional.linear
        with torch_linear():
            assert nn.functional.linear is torchs is not theirs
        assert nn.functional.linear is torchs
    assert nn.functional.linear is theirs


def test_other_models_of_the_process(parameters: _Parameters) -> None:
    """One that is not partitioned, in a process where ZeRO-3 has replaced ``linear``."""
    assert attach(tiny())(**_calls()[0]).loss.isfinite()
    assert fastdpop.is_attached(attach(tiny("phi, bias")))
