"""``torch.compile``: the same numbers, one graph, and no recompilation for every new mask."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdpop import fused_dpop_loss, fused_logps, losses
from tests.batches import LOSSES, Batch, Loss, batch, fused

# Where a graph breaks, PyTorch itself reads .grad of tensors that have none.
graph_breaks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(loss: Loss, **options: Any) -> Callable[..., Tensor]:
    """A function of tensors alone, as a training step is."""

    def run(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ref: Tensor
    ) -> Tensor:
        return fused(Batch(hidden, weight, bias, labels, ref), loss, **options).loss

    return run


def arguments(example: Batch) -> tuple[Any, ...]:
    return example.hidden, example.weight, example.bias, example.labels, example.ref_logps


def assert_equal_to_eager(
    run: Callable[..., Tensor], compiled: Callable[..., Tensor], example: Batch
) -> None:
    want, got = run(*arguments(example)), compiled(*arguments(example))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(got.sum(), example.trained),
        torch.autograd.grad(want.sum(), example.trained),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["dpop", "kto", "wpo", "ld", "sum with aot", "pairwise"])
def test_one_graph(name: str, trained: bool) -> None:
    example = batch(3, bias=True, trained=trained)
    run = step(LOSSES[name])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal_to_eager(run, compiled, example)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"statistics": ("entropy",), "workspace_bytes": 20_000},
        {"ref_hidden": torch.randn(6, 9, 16)},
        {"engine": "eager", "shift_labels": False, "reduction": "sum"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_one_graph_with_options(options: dict[str, Any]) -> None:
    run = step(LOSSES["dpop"], **options)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal_to_eager(run, compiled, batch(3, bias=True))


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_one_graph_of_log_probs(reduction: str) -> None:
    example = batch(3)

    def run(hidden: Tensor, weight: Tensor, bias: None, labels: Tensor, ref: Tensor) -> Tensor:
        return fused_logps(hidden, weight, labels, reduction=reduction)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal_to_eager(run, compiled, example)


MADE: dict[str, Callable[[], Loss]] = {
    "a name": lambda: "ipo",
    "a function": lambda: lambda pairs: -pairs.chosen,
    "get": lambda: losses.get("dpop", beta=0.2, lam=7.0, form="additive"),
    "a class": lambda: losses.DPO(beta=0.2, label_smoothing=0.1),
    "a sum": lambda: 0.5 * losses.DPO(beta=0.2) + 0.25 * losses.get("sft"),
    "LD-DPO": lambda: losses.length_desensitised(losses.IPO(beta=0.7), 0.5),
    "WPO": lambda: losses.wpo_weighted(losses.get("dpo", beta=0.7)),
}


@pytest.mark.parametrize("make", MADE)
def test_a_loss_that_is_made_inside_has_its_options(make: str) -> None:
    """The compiler takes an object that it makes itself for one with its class's defaults."""

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        return fused(Batch(hidden, weight, bias, labels, ref), MADE[make]()).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal_to_eager(run, compiled, batch(3, bias=True))


def test_one_graph_of_fused_dpop_loss() -> None:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        given = {"bias": bias, "ref_logps": ref, "beta": 0.2, "lam": 7.0, "temperature": 1.3}
        return fused_dpop_loss(hidden, weight, labels, **given).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal_to_eager(run, compiled, batch(3, bias=True))


@graph_breaks
def test_a_table_of_pairs_breaks_the_graph_and_is_still_right() -> None:
    """Reading it is Python's work."""
    run = step(LOSSES["dpop"], pairs=torch.tensor([[0, 3], [0, 4]]))
    assert_equal_to_eager(run, torch.compile(run, backend="aot_eager"), batch(3, bias=True))


@graph_breaks
def test_a_beta_that_changes_is_followed() -> None:
    example = batch(3)

    def run(beta: float) -> Tensor:
        given = example.hidden, example.weight, example.labels
        return fused_dpop_loss(*given, ref_logps=example.ref_logps, beta=beta).loss

    compiled = torch.compile(run, backend="aot_eager")
    for beta in (0.1, 0.5, 0.3):
        torch.testing.assert_close(compiled(beta), run(beta), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:no token of the batch is scored")
def test_no_recompilation_when_the_mask_or_the_length_changes() -> None:
    run = step(LOSSES["dpop"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    scored = set()
    for length in (9, 9, 9, 12, 15, 20, 20):
        example = batch(3, length, bias=True)
        scored.add(int((example.labels[:, 1:] != -100).sum()))
        assert_equal_to_eager(run, compiled, example)
    nothing = batch(3, 9, bias=True)
    nothing.labels.fill_(-100)
    assert_equal_to_eager(run, compiled, nothing)
    one = batch(3, 9, bias=True)
    one.labels.fill_(-100)
    one.labels[4, 5] = 3
    assert_equal_to_eager(run, compiled, one)
    assert len(scored) > 4
    # One for the first length, one for all the others.
    assert counter.frame_count == 2


@graph_breaks
def test_another_loss_compiles_again() -> None:
    """The loss's options are constants of the graph; changing them must not reuse it."""
    example = batch(3)

    def run(loss: losses.PreferenceLoss) -> Tensor:
        return fused(example, loss).loss

    compiled = torch.compile(run, backend="aot_eager")
    for beta in (0.1, 0.5, 0.1):
        loss = losses.get("dpop", beta=beta)
        torch.testing.assert_close(compiled(loss), run(loss), rtol=1e-6, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ with g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inductor's own imports
def test_inductor() -> None:
    run = step(LOSSES["dpop"])
    compiled = torch.compile(run, fullgraph=True)
    assert_equal_to_eager(run, compiled, batch(3, bias=True))


def test_one_graph_of_a_loop_with_its_reference() -> None:
    """README's: the reference's log-probs and the loss, in one compiled function."""

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logps = fused_logps(hidden + 0.1, weight, labels, dtype=torch.float64)
        return fused_dpop_loss(hidden, weight, labels, bias=bias, ref_logps=ref_logps).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal_to_eager(run, compiled, batch(3, bias=True))
