"""One attached model, several threads at once: each call gets what it gets alone, bit for bit."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from fastdpop.hf import attach
from fastdpop.hf.interception import lazy_logits_from
from fastdpop.hf.lazy_logits import LazyLogits
from tests.hf.test_lifecycle import lora
from tests.tiny_models import DPOP, batch, gradients, tiny

REF_LOGPS = torch.full((4,), -40.0, dtype=torch.float64)


def overlapping(model: Any, threads: int) -> None:
    """Let calls of so many threads wait for each other before they reach the head."""
    barrier = threading.Barrier(threads, timeout=30)

    def wait(*_: Any) -> None:
        barrier.wait()

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.model.register_forward_hook(wait)


def gradient_of_the_head(model: Any, loss: Tensor) -> Tensor:
    # Of this loss alone: .grad is shared by the threads.
    (gradient,) = torch.autograd.grad(loss, [model.get_output_embeddings().weight])
    return gradient


CALLS: dict[str, Callable[[Any, dict[str, Tensor]], list[Tensor]]] = {}


def call(function: Callable[[Any, dict[str, Tensor]], list[Tensor]]) -> Any:
    CALLS[function.__name__] = function
    return function


@call
def preference(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    out = model(**inputs, preference=DPOP, ref_logps=REF_LOGPS)
    return [out.loss, out.logps, gradient_of_the_head(model, out.loss)]


@call
def logps(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    out = model(**inputs, return_logps=True)
    return [out.logps, gradient_of_the_head(model, out.logps.sum())]


@call
def plain(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    out = model(**inputs)
    assert type(out.logits) is Tensor
    return [out.loss, out.logits, gradient_of_the_head(model, out.loss)]


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What each returns, from a thread of its own; the first error is raised."""
    results: list[Any] = [None] * len(functions)

    def run(place: int) -> None:
        try:
            results[place] = functions[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny,
    "softcap": lambda: tiny("gemma2, softcap"),
    "LoRA on the head": lambda: lora(tiny(), target_modules=["lm_head", "q_proj"]),
}


@pytest.mark.parametrize("made", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_calls_at_once_are_calls_alone(made: Callable[[], Any], order: tuple[int, ...]) -> None:
    model = attach(made()).requires_grad_(True)
    functions = [list(CALLS.values())[place] for place in order]
    batches = [batch() for _ in functions]
    alone = [function(model, inputs) for function, inputs in zip(functions, batches, strict=True)]
    overlapping(model, len(functions))
    for _ in range(3):
        together = at_once(
            *(
                lambda function=function, inputs=inputs: function(model, inputs)
                for function, inputs in zip(functions, batches, strict=True)
            )
        )
        for mine, own in zip(together, alone, strict=True):
            assert all(map(torch.equal, mine, own))


def test_a_failing_call_beside_a_good_one() -> None:
    model, inputs = attach(tiny()), batch()
    expected = preference(model, inputs)
    overlapping(model, 2)

    def bad() -> None:
        with pytest.raises(ValueError, match="needs a reference"):
            model(**inputs, preference="dpo")

    _, found = at_once(bad, lambda: preference(model, inputs))
    assert all(map(torch.equal, found, expected))


def test_another_thread_in_the_middle_of_a_call_gets_real_logits() -> None:
    head, hidden = nn.Linear(4, 11), torch.randn(2, 4)
    with lazy_logits_from(head, object()):
        (there,) = at_once(lambda: head(hidden))
        here = head(hidden)
    assert type(there) is Tensor
    assert isinstance(here, LazyLogits)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_pass_in_another_thread_recomputes_what_was(reentrant: bool) -> None:
    model, inputs = attach(tiny()).train(), batch()
    asked = {"preference": DPOP, "ref_logps": REF_LOGPS}
    model(**inputs, **asked).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(**inputs, **asked).loss
    at_once(loss.backward, lambda: model(**inputs))
    torch.testing.assert_close(gradients(model), expected)


def in_the_middle(model: Any, what: Callable[[], Any]) -> list[Any]:
    """What a function returns when a hook calls it in the middle of a preference call."""
    found: list[Any] = []

    def run(*_: Any) -> None:
        hook.remove()  # what it does may call the model again
        found.append(what())

    hook = model.model.register_forward_hook(run)
    preference(model, batch())
    return found


@pytest.mark.parametrize("how", ["the same context", "a copied context", "another thread"])
def test_a_copied_context_does_not_outlive_its_call(how: str) -> None:
    model = attach(tiny())
    (context,) = in_the_middle(model, contextvars.copy_context)
    ids = batch()["input_ids"]

    def call() -> Any:
        return model(input_ids=ids).logits

    runs: dict[str, Callable[[], Any]] = {
        "the same context": call,
        "a copied context": lambda: context.run(call),
        "another thread": lambda: at_once(lambda: context.run(call))[0],
    }
    assert type(runs[how]()) is Tensor


def test_another_thread_with_the_context_of_a_call_gets_real_logits() -> None:
    head, hidden = nn.Linear(4, 11), torch.randn(2, 4)
    with lazy_logits_from(head, object()):
        context = contextvars.copy_context()
        (there,) = at_once(lambda: context.run(head, hidden))
    assert type(there) is Tensor


def test_a_plain_call_in_the_middle_of_another_has_real_logits() -> None:
    model, inputs = attach(tiny()).eval(), batch()
    expected, ids = preference(model, inputs), inputs["input_ids"]
    logits = model(input_ids=ids).logits
    (there,) = in_the_middle(model, lambda: model(input_ids=ids).logits)
    assert torch.equal(there, logits)
    (text,) = in_the_middle(model, lambda: model.generate(ids[:1], max_new_tokens=2))
    assert text.shape[1] == ids.shape[1] + 2
    assert all(map(torch.equal, preference(model, inputs), expected))


def test_a_head_that_fails_and_is_called_again() -> None:
    class Failing(nn.Linear):
        failures = 1

        def forward(self, hidden: Tensor) -> Tensor:
            logits = super().forward(hidden)
            if self.failures:
                self.failures -= 1
                raise ValueError("once")
            return logits

    head, hidden, other = Failing(4, 11), torch.randn(2, 4), nn.Linear(4, 11)
    with lazy_logits_from(head, object()):
        with pytest.raises(ValueError, match="once"):
            head(hidden)
        assert isinstance(head(hidden), LazyLogits)
    assert type(other(hidden)) is Tensor
