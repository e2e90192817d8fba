"""Attention over a tree gives what separate sequences give: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.prefix.attending import (
    Attending,
    assert_as_separate,
    attending,
    gradients,
    sequences,
)

WAYS = ["auto", "segments", "masked", "plain"]
SETTINGS: dict[str, dict[str, Any]] = {
    "as many heads": {"heads": (2, 2)},
    "one key head": {"heads": (4, 1)},
    "head by head": {"by_token": False},
    "small values": {"sizes": (12, 5)},
    "small keys": {"sizes": (7, 16)},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 1.5},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "window longer than a path": {"window": 1000},
    "all at once": {"sinks": True, "softcap": 2.0, "window": 9, "sizes": (6, 3)},
}
DEGENERATE: dict[str, list[list[int]]] = {
    "one token": [[1]],
    "one run": [[1] * 150],
    "roots of one token": [[i] for i in range(9)],
    "no token": [[], []],
    "a chain of branches": [[0] * i + [1] for i in range(20)],
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_as_separate_sequences(name: str, how: str) -> None:
    assert_as_separate(attending(sequences(7, 40), **SETTINGS[name]), how, 1e-11)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_trees(name: str, how: str) -> None:
    for settings_ in ({}, {"sinks": True, "window": 2}):
        assert_as_separate(attending(DEGENERATE[name], **settings_), how, 1e-11)


@pytest.mark.parametrize("how", WAYS)
def test_float32(how: str) -> None:
    problem = attending(sequences(6, 150), dtype=torch.float32, sizes=(32, 32), sinks=True)
    assert_as_separate(problem, how, 1e-5)


@pytest.mark.parametrize("how", ["auto", "plain"])
def test_largest_heads(how: str) -> None:
    assert_as_separate(attending(sequences(3, 20), sizes=(256, 256)), how, 1e-9)


@pytest.mark.parametrize("how", WAYS)
@given(
    of=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 12),
    least=st.integers(1, 4),
)
@settings(max_examples=25)
def test_any_trie(how: str, of: list[list[int]], window: int | None, least: int) -> None:
    problem = attending(of, window=window, least=least, heads=(2, 1), sizes=(4, 4))
    assert_as_separate(problem, how, 1e-11)


def errors(problem: Attending, how: str) -> tuple[list[float], list[float]]:
    """Norms of the errors of the output and the gradients: shared, and of torch's attention on
    separate sequences.
    """
    exact = problem.in_float64()
    want = exact.separate()
    dout = torch.randn_like(want).to(problem.query.dtype)
    wanted = [want, *gradients(exact, want, dout.double())]

    def norms(found: list[torch.Tensor]) -> list[float]:
        return [(a.double() - b).norm().item() for a, b in zip(found, wanted, strict=True)]

    out = problem.shared(how)
    shared = norms([out, *gradients(problem, out, dout)])
    tree = problem.tree
    outs = torch.zeros_like(out)
    totals = [torch.zeros_like(x) for x in problem.inputs]
    seen = torch.zeros(out.shape[2], dtype=torch.bool)
    for first, last in zip(tree.offsets[:-1], tree.offsets[1:], strict=True):
        nodes = tree.nodes[first:last]
        own = [x.detach()[:, :, nodes].requires_grad_() for x in problem.inputs]
        found = F.scaled_dot_product_attention(
            *own, is_causal=True, scale=problem.scale, enable_gqa=True
        )
        outs[:, :, nodes] = found.detach()
        fresh = dout[:, :, nodes] * ~seen[nodes][:, None]
        for total, gradient in zip(totals, torch.autograd.grad(found, own, fresh), strict=True):
            total[:, :, nodes] += gradient
        seen[nodes] = True
    return shared, norms([outs, *totals])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", WAYS)
def test_rounding_in_16_bits(how: str, dtype: torch.dtype) -> None:
    """No worse than torch's own attention."""
    problem = attending(sequences(5, 150), dtype=dtype, sizes=(16, 16))
    shared, separate = errors(problem, how)
    for ours, torchs in zip(shared, separate, strict=True):
        assert ours <= torchs


@pytest.mark.parametrize("how", WAYS)
def test_extreme_scores_give_no_nan(how: str) -> None:
    problem = attending(sequences(5, 30), dtype=torch.float32, sinks=True)
    for tensor in problem.inputs[:2]:
        tensor.data.mul_(1e4)
    assert problem.sinks is not None
    problem.sinks.data[:2] = torch.tensor([1e9, -torch.inf])
    out = problem.shared(how)
    found = [out, *gradients(problem, out, torch.randn_like(out))]
    assert all(x.isfinite().all() for x in found)
    assert out[0, 0].abs().max() == 0  # all weight is the sink's
    no_sink = attending(sequences(5, 30), dtype=torch.float32)
    for tensor, like in zip(no_sink.inputs, problem.inputs, strict=False):
        tensor.data.copy_(like)
    torch.testing.assert_close(out[0, 1], no_sink.shared(how)[0, 1], rtol=0, atol=0)
