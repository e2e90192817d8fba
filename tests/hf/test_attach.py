"""An attached model gives the loss, log-probs and gradients of its own full logits, without them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from transformers import LlamaForCausalLM

from fastdpop import naive
from fastdpop.hf import PreferenceModelOutput, attach
from tests.displacing import NAMES
from tests.tiny_models import CONFIGS, DPOP, V, batch, gradients, own_logps, tiny

# ---- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_logps_and_gradients_are_those_of_full_logits(name: str, trained: bool) -> None:
    model, inputs, ref_logps = tiny(name), batch(), -40 + torch.randn(4, dtype=torch.float64)
    if not trained:
        model.get_output_embeddings().requires_grad_(False)
    expected_logps = own_logps(model, inputs)
    expected = naive.dpop_loss(expected_logps, ref_logps)
    if name.startswith("mixtral"):
        router = [model(**inputs, output_router_logits=on).loss for on in (True, False)]
        expected = expected + router[0] - router[1]
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    attach(model)
    out = model(**inputs, preference=DPOP, ref_logps=ref_logps)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.logps, expected_logps.detach())
    assert not out.logps.requires_grad
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    atol = 1e-6 if name.startswith("mixtral") else 1e-9  # the router computes in float32
    for parameter, gradient in expected_gradients.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-6, atol=atol)


def test_weight_of_the_router_loss() -> None:
    model, inputs = attach(tiny("mixtral, router loss")), batch()
    call = {**inputs, "preference": "simpo"}
    without, out = (model(**call, router_loss_weight=weight) for weight in (0.0, 0.25))
    assert out.aux_loss > 0
    torch.testing.assert_close(out.loss, without.loss + 0.25 * out.aux_loss.detach())
    torch.testing.assert_close(model(**call).loss, without.loss + 0.7 * out.aux_loss.detach())
    with pytest.raises(ValueError, match="router_loss_weight is given without preference"):
        model(**inputs, router_loss_weight=0.25)


@pytest.mark.parametrize("name", ["llama", "gemma2, softcap", "phi, bias"])
def test_returned_logps_are_differentiable(name: str) -> None:
    model, inputs = tiny(name), batch()
    coefficients = torch.randn(4, dtype=torch.float64)
    expected = own_logps(model, inputs)
    (expected * coefficients).sum().backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    out = attach(model)(**inputs, return_logps=True)
    assert out.loss is None
    (out.logps * coefficients).sum().backward()
    torch.testing.assert_close(out.logps, expected)
    torch.testing.assert_close(gradients(model), expected_gradients)
    with torch.no_grad():
        assert not model(**inputs, return_logps=True).logps.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_nearer_to_the_truth_than_the_models_logits(dtype: torch.dtype) -> None:
    model, inputs = attach(tiny("gemma2, softcap", dtype)), batch()
    out = model(**inputs, return_logps=True, output_hidden_states=True)
    weight = model.lm_head.weight
    z = out.hidden_states[-1].double() @ weight.double().T
    exact = 3.0 * torch.tanh(z / 3.0)[:, :-1]
    targets = inputs["labels"][:, 1:]
    logps = exact.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    truth = (logps * (targets != -100)).sum(-1)
    torch.testing.assert_close(out.logps.double(), truth, rtol=1e-4, atol=0.0)


def test_autocast() -> None:
    model, inputs = attach(tiny(dtype=torch.float32)), batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs, preference="dpo", ref_logps=torch.full((4,), -40.0))
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.logps, own_logps(model, inputs).detach(), rtol=0.05, atol=0.0)


def test_a_padded_vocabulary_takes_rows_of_the_weight() -> None:
    class Padded(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits[..., :90]
            return out

    model = Padded(CONFIGS["llama"]()).double().eval()
    inputs = batch()
    inputs["labels"][inputs["labels"] >= 90] = 4
    expected = own_logps(model, inputs)
    expected.sum().backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    out = attach(model)(**inputs, return_logps=True)
    out.logps.sum().backward()
    torch.testing.assert_close(out.logps, expected)
    torch.testing.assert_close(gradients(model), expected_gradients)
    inputs["labels"][0, -1] = 93
    with pytest.raises(ValueError, match="93"):
        model(**inputs, return_logps=True)


class Watch(TorchDispatchMode):
    """The shapes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result


def test_no_logits_are_made() -> None:
    model, inputs = attach(tiny("gemma2, softcap")), batch()

    def vocabulary_sized(**more: Any) -> set[tuple[int, ...]]:
        with Watch() as watch:
            out = model(**inputs, **more)
            (out.logps.sum() if out.loss is None else out.loss).backward()
        weight = tuple(model.lm_head.weight.shape)
        return {
            shape for shape in watch.shapes if V in shape and shape not in {weight, weight[::-1]}
        }

    assert (4, 9, V) in vocabulary_sized()
    assert vocabulary_sized(preference="dpop", ref_logps=torch.zeros(4)) == set()
    assert vocabulary_sized(return_logps=True) == set()


# ---- options ------------------------------------------------------------------------------------


def test_every_value_of_the_loss_is_returned() -> None:
    model, inputs = attach(tiny()), batch()
    names = ("entropy", "mean_logits", "token_accuracy")
    chosen, rejected = torch.full((2,), -40.0), torch.full((2,), -41.0)
    out = model(
        **inputs,
        preference="dpop",
        ref_logps=(chosen, rejected),
        preference_options={"statistics": (*names, "displacement"), "reduction": "none"},
        output_hidden_states=True,
    )
    assert isinstance(out, PreferenceModelOutput)
    absent = {
        name for name in inspect.signature(type(out)).parameters if getattr(out, name) is None
    }
    assert absent == {"aux_loss", "attentions"}
    assert {out[name].shape for name in ("loss", "losses", "margins", "penalty", *NAMES)} == {(2,)}
    assert {out[name].shape for name in ("logps", "lengths", *names)} == {(4,)}
    assert next(iter(out)) == "loss"
    assert next(x for x in tree_leaves(out) if isinstance(x, Tensor)) is out.loss


def test_pairs_in_another_order() -> None:
    model, inputs = attach(tiny()), batch()
    expected = own_logps(model, inputs)
    pairs = [[2, 0], [2, 1]]
    out = model(
        **inputs, preference="dpo", ref_logps=torch.zeros(4), preference_options={"pairs": pairs}
    )
    torch.testing.assert_close(out.logps[:3], expected[:3].detach())
    assert out.logps[3] == 0
    torch.testing.assert_close(out.chosen_logps, expected[[2, 2]].detach())


def test_labels_that_were_shifted_before() -> None:
    """As the models' own loss takes them, and frameworks that split sequences give them."""
    model, inputs = attach(tiny("llama")), batch()
    call = {"preference": DPOP, "ref_logps": torch.zeros(4)}
    expected = model(**inputs, **call)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    for labels in ({"labels": inputs["labels"]}, {"labels": torch.zeros_like(shifted)}, {}):
        given = {name: value for name, value in inputs.items() if name != "labels"} | labels
        found = model(**given, shift_labels=shifted, **call)
        assert torch.equal(found.loss, expected.loss)
    options = {"shift_labels": True}
    with pytest.raises(ValueError, match="preference_options contains shift_labels=True"):
        model(**inputs, shift_labels=shifted, preference_options=options, **call)
    with pytest.raises(ValueError, match="shift_labels is False, expected labels"):
        model(**inputs, shift_labels=False, **call)


def test_unpaired_examples() -> None:
    model, inputs = attach(tiny()), batch()
    options = {"pairs": torch.tensor([[0, -1], [-1, 1], [2, -1], [-1, 3]]), "kl": torch.tensor(0.1)}
    out = model(
        **inputs, preference="kto", ref_logps=torch.full((4,), -40.0), preference_options=options
    )
    torch.testing.assert_close(out.logps, own_logps(model, inputs).detach())


def test_packed_batch() -> None:
    model = attach(tiny())
    ids, bounds = torch.randint(3, V, (1, 18)), torch.tensor([0, 4, 9, 13, 18])
    positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])[None]
    options = {"cu_seqlens": bounds}
    inputs = {"input_ids": ids, "position_ids": positions, "labels": ids}
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
    expected = [
        logits[a : b - 1].gather(-1, ids[0, a + 1 : b, None]).sum()
        for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]
    out = model(**inputs, preference="simpo", preference_options=options)
    torch.testing.assert_close(out.logps, torch.stack(expected).detach())
    tokens = model(**inputs, return_logps=True, preference_options=options | {"reduction": "token"})
    assert tokens.logps.shape == ids.shape
    torch.testing.assert_close(tokens.logps.sum(), torch.stack(expected).sum())
    with pytest.raises(ValueError, match=r"expected \(1, positions\) with cu_seqlens"):
        model(**batch(), return_logps=True, preference_options=options)


def test_a_loss_of_ones_own() -> None:
    model, inputs = attach(tiny()), batch()
    out = model(**inputs, preference=lambda pairs: pairs.rejected - pairs.chosen)
    chosen, rejected = own_logps(model, inputs).chunk(2)
    torch.testing.assert_close(out.loss, (rejected - chosen).mean())


def test_positional_arguments_and_tuples() -> None:
    model, inputs = attach(tiny()), batch()
    ids, mask, labels = inputs.values()
    whole = model(**inputs, preference="simpo")
    values = model(ids, mask, labels=labels, preference="simpo", return_dict=False)
    assert isinstance(values, tuple)
    torch.testing.assert_close(values, whole.to_tuple())
