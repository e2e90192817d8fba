"""An attached model under ``torch.compile``: plain calls stay one graph, others compile the model's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from fastdpop.hf import attach
from fastdpop.hf.interception import lazy_logits_from
from tests.hf.test_lifecycle import lora
from tests.hf.test_threads import REF_LOGPS, at_once
from tests.tiny_models import DPOP, batch, gradients, tiny

# Of torch's own compiler, where it reads an activation.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

MODELS: dict[str, Callable[[], Any]] = {
    "softcap": lambda: tiny("gemma2, softcap"),
    "LoRA on the head": lambda: lora(tiny(), target_modules=["lm_head", "q_proj"]),
}


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counted(model: Any, **options: Any) -> tuple[Any, list[int]]:
    """A compiled model, and the number of operations in each graph, to be filled."""
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(sum(node.op.startswith("call") for node in module.graph.nodes))
        return module

    return torch.compile(model, backend=backend, **options), graphs


@pytest.mark.slow
@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS.keys())
def test_preference_calls(made: Callable[[], Any]) -> None:
    model, inputs = attach(made()), batch()
    asked = {"preference": DPOP, "ref_logps": REF_LOGPS}
    expected = model(**inputs, **asked)
    expected.loss.backward()
    expected_gradients = gradients(model)
    compiled, graphs = counted(model)
    for _ in range(2):
        model.zero_grad()
        out = compiled(**inputs, **asked)
        out.loss.backward()
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.logps, expected.logps)
        torch.testing.assert_close(gradients(model), expected_gradients)
        assert len(graphs) == 1  # the trunk, once
        assert graphs[0] > 100
    torch.testing.assert_close(compiled(**inputs, return_logps=True).logps, expected.logps)


@pytest.mark.slow
def test_plain_calls_stay_one_graph() -> None:
    model, inputs = attach(tiny()), batch()
    expected = model(**inputs, use_cache=False).logits
    compiled, graphs = counted(model, fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(**inputs, use_cache=False).logits, expected)
        assert len(graphs) == 1
        model(**inputs, preference="simpo")


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_a_plain_call_in_the_middle_of_another_threads(first: bool) -> None:
    """Compiled before that, or then: it is no part of the other call."""
    model, inputs = attach(tiny()), batch()
    expected = model(**inputs, use_cache=False).logits
    compiled, _ = counted(model)
    if first:
        compiled(**inputs, use_cache=False)
    with lazy_logits_from(model.lm_head, model):
        (there,) = at_once(lambda: compiled(**inputs, use_cache=False).logits)
    assert torch.equal(there, expected)
    assert torch.equal(compiled(**inputs, use_cache=False).logits, expected)
