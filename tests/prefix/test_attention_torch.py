"""The operator inside torch: autograd, torch.compile, checkpointing, autocast; and the same bits always."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastdpop.prefix.attention import tree_attention
from tests.prefix.attending import Attending, attending, gradients, sequences

WAYS = ["auto", "segments", "masked", "plain"]


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operator(problem: Attending, how: str) -> tuple[object, ...]:
    return (
        *(problem.query, problem.key, problem.value, problem.table, problem.sinks),
        *(problem.scale, problem.softcap, how),
    )


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(how: str, softcap: float | None) -> None:
    problem = attending(
        sequences(4, 6), heads=(2, 1), sizes=(3, 2), sinks=True, window=4, softcap=softcap
    )
    table, scale = problem.table, problem.scale

    def run(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return tree_attention(
            query, key, value, table, scale=scale, softcap=softcap, sinks=sinks, how=how
        )

    assert torch.autograd.gradcheck(run, problem.inputs)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_opcheck(how: str, sinks: bool, by_token: bool) -> None:
    problem = attending(sequences(4, 9), sizes=(8, 4), sinks=sinks, by_token=by_token)
    torch.library.opcheck(torch.ops.fastdpop.tree_attention.default, operator(problem, how))


@pytest.mark.parametrize("sinks", [False, True])
def test_opcheck_of_backward(sinks: bool) -> None:
    problem = attending(sequences(4, 9), sizes=(8, 4), sinks=sinks)
    with torch.no_grad():
        out, lse = torch.ops.fastdpop.tree_attention(*operator(problem, "auto"))
        leaves = [x.detach() for x in problem.inputs]
        saved = [*leaves[:3], problem.table, out, lse, *leaves[3:]]
        torch.library.opcheck(
            torch.ops.fastdpop.tree_attention_backward.default,
            (torch.randn_like(out), saved, 0.3, None, "auto"),
        )


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_bits_with_and_without_gradients(how: str, dtype: torch.dtype) -> None:
    problem = attending(sequences(6, 60), dtype=dtype, sinks=True)
    with torch.no_grad():
        alone = problem.shared(how)
    out = problem.shared(how)
    dout = torch.randn_like(out)
    first = gradients(problem, out, dout)
    again = problem.shared(how)
    for a, b in zip((out, *first), (again, *gradients(problem, again, dout)), strict=True):
        assert torch.equal(a, b)
    with torch.inference_mode():
        assert torch.equal(problem.shared(how), out)
    assert torch.equal(alone, out)


def test_inputs_that_need_no_gradient() -> None:
    problem = attending(sequences(5, 20), sinks=True)
    want = gradients(problem, problem.shared(), torch.ones_like(problem.query))
    for kept in range(4):
        for i, tensor in enumerate(problem.inputs):
            tensor.requires_grad_(i == kept)
        own = [problem.inputs[kept]]
        found = torch.autograd.grad(problem.shared().sum(), own)
        assert torch.equal(found[0], want[kept])


def test_expanded_gradient_from_above() -> None:
    problem = attending(sequences(5, 20))
    out = problem.shared()
    found = torch.autograd.grad(out.sum(), problem.inputs, retain_graph=True)
    for a, b in zip(found, gradients(problem, out, torch.ones_like(out)), strict=True):
        assert torch.equal(a, b)


def test_no_second_derivative() -> None:
    problem = attending(sequences(3, 5))
    (first,) = torch.autograd.grad(problem.shared().sum(), [problem.query], create_graph=True)
    with pytest.raises(RuntimeError, match="no double differentiation"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    problem = attending(sequences(5, 30), sinks=True, window=6)
    table = problem.table

    def layer(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, tree: Tensor) -> Tensor:
        return tree_attention(query, key, value, tree, scale=0.3, sinks=sinks) * 2

    want = layer(*problem.inputs, table)
    dout = torch.randn_like(want)
    expected = gradients(problem, want, dout)
    found = checkpoint(layer, *problem.inputs, table, use_reentrant=reentrant)
    found.backward(dout)
    assert torch.equal(found, want)
    for tensor, gradient in zip(problem.inputs, expected, strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("how", ["auto", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_as_torchs_attention(how: str, dtype: torch.dtype) -> None:
    problem = attending([[0] * 40], heads=(2, 2), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = problem.shared(how)
        want = F.scaled_dot_product_attention(
            problem.query, problem.key, problem.value, is_causal=True
        )
        found = gradients(problem, out, torch.ones_like(out))
    assert out.dtype == want.dtype
    torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)  # torch rounds the weights too
    assert all(x.dtype == dtype for x in found)
    narrow = torch.bfloat16 if dtype == torch.float32 else dtype
    cast = [x.detach().to(narrow).requires_grad_() for x in problem.inputs]
    exact = tree_attention(*cast, problem.table, scale=problem.scale, how=how)
    assert torch.equal(out, exact)


def test_compile_without_a_graph_for_every_length(fresh: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def layer(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, tree: Tensor) -> Tensor:
        out = tree_attention(query + 0, key, value, tree, scale=0.3, sinks=sinks)
        return out.transpose(1, 2).reshape(1, query.shape[2], -1) * 2

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for seed in range(5):
        problem = attending(sequences(5, 30, seed), dtype=torch.float32, sinks=True)
        arguments = (*problem.inputs, problem.table)
        want, got = layer(*arguments), compiled(*arguments)
        dout = torch.randn_like(want)
        pairs = zip(
            (want, *gradients(problem, want, dout)),
            (got, *gradients(problem, got, dout)),
            strict=True,
        )
        for expected, found in pairs:
            assert torch.equal(expected, found)
        if seed == 1:
            after_two = counter.frame_count
    assert counter.frame_count == after_two <= 2


def test_compile_with_autocast(fresh: None) -> None:
    problem = attending(sequences(5, 30), dtype=torch.float32)

    def layer(query: Tensor, key: Tensor, value: Tensor, tree: Tensor) -> Tensor:
        return tree_attention(query, key, value, tree, scale=0.3)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = layer(*problem.inputs, problem.table)
        got = compiled(*problem.inputs, problem.table)
    assert got.dtype == torch.bfloat16
    assert torch.equal(want, got)
