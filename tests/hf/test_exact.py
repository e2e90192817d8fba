"""Numbers that mixed precision does not reach: what is given to a model's forward, and what it returns."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

pytest.importorskip("transformers")

from torch.distributed.utils import _apply_to_tensors

import fastdpop
from fastdpop import fused_logps, fused_preference_loss
from fastdpop.hf import PreferenceModelOutput, attach
from tests.tiny_models import DPOP, batch, tiny


def cast(value: Any) -> Any:
    """What FSDP does to arguments, and FSDP2 to outputs."""
    return _apply_to_tensors(lambda t: t.bfloat16() if t.is_floating_point() else t, value)


class Casting(nn.Module):
    """Stands around a model like FSDP's mixed precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        return cast(self.model(**cast(kwargs)))


def test_a_cast_reaches_neither_references_nor_results() -> None:
    model, inputs = attach(tiny(dtype=torch.float32)), batch()
    around = Casting(model)
    want = model(**inputs, return_logps=True).logps
    found = around(**inputs, return_logps=True).logps
    assert torch.equal(found, want)
    references = want.detach() + torch.tensor([0.3, -0.2, 1.7, -0.4])
    for given in (references, tuple(references.chunk(2))):
        expected = model(**inputs, preference=DPOP, ref_logps=given)
        out = around(**inputs, preference=DPOP, ref_logps=fastdpop.exact(given))
        for name, value in expected.items():
            assert torch.equal(out[name], value), name
            assert torch.equal(getattr(out, name), value), name
        assert out.keys() == expected.keys()
        assert len(out.to_tuple()) == len(expected.to_tuple())
        (grad,) = torch.autograd.grad(out.loss, model.lm_head.weight)
        (wanted,) = torch.autograd.grad(expected.loss, model.lm_head.weight)
        assert torch.equal(grad, wanted)


def test_a_cast_reference_is_refused() -> None:
    around = Casting(attach(tiny(dtype=torch.float32)))
    with pytest.raises(ValueError, match=r"ref_logps has dtype torch.bfloat16.*fastdpop.exact"):
        around(**batch(), preference=DPOP, ref_logps=torch.full((4,), -17.03))


def test_options_may_be_exact() -> None:
    model, inputs = attach(tiny(dtype=torch.float32)), batch()
    around, kl = Casting(model), torch.tensor(0.123456)
    refs = torch.full((4,), -17.03)
    given = {"preference": "kto", "ref_logps": fastdpop.exact(refs)}
    out = around(**inputs, **given, preference_options={"kl": fastdpop.exact(kl)})
    want = model(**inputs, **given, preference_options={"kl": kl})
    assert torch.equal(out.losses, want.losses)
    with pytest.raises(ValueError, match=r"kl has dtype torch\.bfloat16"):
        around(**inputs, **given, preference_options={"kl": kl})


@pytest.mark.parametrize("how", ["all", "each"])
def test_values_of_pairs_may_be_exact(how: str) -> None:
    model, inputs = attach(tiny(dtype=torch.float32)), batch()
    weights = torch.tensor([0.123456, 3.141593])
    given = {"preference": DPOP, "ref_logps": fastdpop.exact(torch.full((4,), -17.03))}
    values: Any = {"weight": weights}
    want = model(**inputs, **given, preference_options={"pair_values": values})
    plain = model(**inputs, **given)
    torch.testing.assert_close(want.losses, plain.losses * weights)
    values = {"weight": fastdpop.exact(weights)} if how == "each" else fastdpop.exact(values)
    out = Casting(model)(**inputs, **given, preference_options={"pair_values": values})
    assert torch.equal(out.losses, want.losses)
    with pytest.raises(ValueError, match=r"pair_values\['weight'\] has dtype torch\.bfloat16"):
        Casting(model)(**inputs, **given, preference_options={"pair_values": {"weight": weights}})


def test_what_exact_takes() -> None:
    value = torch.ones(2)
    assert fastdpop.exact(fastdpop.exact(value)).value is value
    assert repr(fastdpop.exact(value)) == "exact(tensor([1., 1.]))"
    with pytest.raises(
        TypeError, match=r"value is float, expected a tensor, \(chosen, rejected\) or tensors"
    ):
        fastdpop.exact(0.5)  # type: ignore[arg-type]


def output() -> PreferenceModelOutput:
    return PreferenceModelOutput(loss=torch.tensor(1 / 3), logps=torch.tensor([0.1, 0.7]))


def test_what_a_user_changes_stays_changed() -> None:
    out = output()
    out.loss = out.loss * 2
    out["logps"] = out.logps + 1
    copied = cast(out)
    assert copied.loss.item() == torch.tensor(2 / 3).item()
    assert torch.equal(copied.logps, torch.tensor([1.1, 1.7]))
    widened = tree_map(lambda t: t.double() * 3, out)
    assert widened.loss.dtype == torch.float64
    assert widened.loss == out.loss.double() * 3
    assert tree_map(lambda t: t * 3, out).loss == out.loss * 3  # as DDP passes tensors through


def test_an_output_is_still_a_plain_one() -> None:
    out = output()
    assert list(out) == ["loss", "logps"]
    assert "_source" not in repr(out)
    for other in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert torch.equal(cast(other).loss, out.loss)
    # accelerate makes outputs of dictionaries.
    again = type(out)({name: value.clone() for name, value in out.items()})
    assert list(again) == ["loss", "logps"]
    assert torch.equal(cast(again).loss, out.loss)


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_freed_storage_is_not_read(name: str) -> None:
    given = {"hidden": torch.randn(2, 4, 8), "weight": torch.randn(11, 8), "bias": torch.randn(11)}
    given[name] = freed(given[name])
    with pytest.raises(RuntimeError, match=f"{name} .* has no storage any more: FSDP"):
        fused_logps(**given, labels=torch.ones(2, 4, dtype=torch.int64))


def test_storage_that_is_freed_before_backward_is_not_read() -> None:
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    labels = torch.ones(2, 4, dtype=torch.int64)
    out = fused_preference_loss(hidden, weight, labels, ref_logps=torch.zeros(2), reduction="none")
    freed(weight)
    with pytest.raises(RuntimeError, match=r"weight .* has no storage any more"):
        out.loss.sum().backward()


def test_a_view_has_the_storage_it_needs() -> None:
    weight = torch.randn(16, 9)[::2, 1:]
    logps = fused_logps(torch.randn(2, 4, 8), weight, torch.ones(2, 4, dtype=torch.int64))
    assert logps.shape == (2,)
