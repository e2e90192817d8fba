"""FlexAttention over trees: its uncompiled form, which any device computes, in the place of CUDA's kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as of_torch

from fastdpop.prefix import flex, varlen
from fastdpop.prefix.chunks import Problem
from fastdpop.prefix.plan import window_of
from tests.prefix.attending import Attending, assert_as_separate, attending, gradients, sequences
from tests.prefix.test_attention import DEGENERATE, SETTINGS

CPU = torch.device("cpu")
WORKS = flex._works.__wrapped__


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the kernel was called with. PyTorch refuses gradients on CPUs, which it can compute."""
    calls = []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return of_torch.flex_attention(*args, **kwargs)

    monkeypatch.setattr(of_torch, "_validate_device", lambda *_: None)
    monkeypatch.setattr(of_torch, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "supports", lambda problem: problem.query.shape[2] > 0)
    monkeypatch.setattr(flex, "_kernel", lambda: kernel)
    monkeypatch.setattr(flex, "_works", lambda *_: True)
    yield calls
    flex.block_mask.cache_clear()
    flex._capped.cache_clear()


@pytest.mark.parametrize("how", ["auto", "masked"])
@pytest.mark.parametrize("name", SETTINGS)
def test_as_separate_sequences(name: str, how: str, on_cpu: list[Any]) -> None:
    problem = attending(sequences(9, 90), **SETTINGS[name], dtype=torch.float32)
    assert_as_separate(problem, how, 1e-5)
    assert len(on_cpu) == 1


@pytest.mark.parametrize("name", [name for name in DEGENERATE if name != "no token"])
def test_degenerate_trees(name: str, on_cpu: list[Any]) -> None:
    for options in ({}, {"sinks": True, "window": 2}):
        problem = attending(DEGENERATE[name], dtype=torch.float32, **options)
        assert_as_separate(problem, "masked", 1e-5)
    assert len(on_cpu) == 2


def test_not_where_chunks_are_asked_for(on_cpu: list[Any]) -> None:
    for how in ("segments", "plain"):
        attending(sequences(3, 10)).shared(how)
    assert on_cpu == []


def test_the_same_bits_without_gradients(on_cpu: list[Any]) -> None:
    """The same is asked for, log-sum-exps included, so the same kernel runs."""
    problem = attending(sequences(5, 90), dtype=torch.float32, window=9, softcap=2.0, sinks=True)
    out = problem.shared()
    with torch.no_grad():
        assert torch.equal(problem.shared(), out)
    with_gradients, without = on_cpu
    assert with_gradients == without
    assert without["return_aux"].lse
    assert without["kernel_options"] == {"FORCE_USE_FLEX_ATTENTION": True}


def test_of_an_evaluation_in_training(on_cpu: list[Any]) -> None:
    """What is kept of a tree under inference_mode serves autograd too."""
    problem = attending(sequences(4, 40), dtype=torch.float32, softcap=2.0, window=7)
    with torch.inference_mode():
        problem.shared()
    assert_as_separate(problem, "auto", 1e-5)


def test_extreme_scores_give_no_nan(on_cpu: list[Any]) -> None:
    problem = attending(sequences(5, 30), dtype=torch.float32, sinks=True)
    for tensor in problem.inputs[:2]:
        tensor.data.mul_(1e4)
    assert problem.sinks is not None
    problem.sinks.data[:2] = torch.tensor([1e9, -torch.inf])
    out = problem.shared()
    found = [out, *gradients(problem, out, torch.randn_like(out))]
    assert all(x.isfinite().all() for x in found)
    assert out[0, 0].abs().max() == 0  # all weight is the sink's


@pytest.mark.parametrize(
    ("end", "match"), [([2, 2, 2], "not that of a tree"), ([1, 2, 4], "not that of a tree")]
)
def test_what_is_no_tree(end: list[int], match: str, on_cpu: list[Any]) -> None:
    problem = attending([[0, 1, 2]])
    problem.tree.end.copy_(torch.tensor(end))
    with pytest.raises(ValueError, match=match):
        problem.shared()
    assert on_cpu == []


# ---- blocks -------------------------------------------------------------------------------------


def pairs(problem: Attending) -> np.ndarray[Any, Any]:
    """Which queries see which keys, ``(N, N)``."""
    tree = problem.tree
    end, position = tree.end.numpy(), tree.position_ids.numpy()
    place = np.arange(len(end))
    visible = (place <= place[:, None]) & (place[:, None] < end)
    if problem.window is not None:
        visible &= position[:, None] - position < problem.window
    return visible


@pytest.mark.parametrize("window", [None, 1, 40, 128, 300])
@pytest.mark.parametrize("longest", [30, 200, 600])
def test_blocks(longest: int, window: int | None) -> None:
    """Every visible pair is in one, and the full ones hold nothing else."""
    for seed in range(5):
        problem = attending(sequences(9, longest, seed), heads=(1, 1), sizes=(1, 1), window=window)
        table = problem.table[0, 0].numpy()
        some, full = flex.blocks(table[0], table[1], window_of(table))
        visible = pairs(problem)
        missing = -len(visible) % flex.BLOCK
        tiled = np.pad(visible, (0, missing)).reshape(len(some), flex.BLOCK, -1, flex.BLOCK)
        has, whole = tiled.any(axis=(1, 3)), tiled.all(axis=(1, 3))
        assert not (has & ~some).any()
        assert not (full & ~whole).any()
        if window is None:
            assert (some == has).all()
            assert (full == whole).all()


def test_blocks_of_one_long_sequence_in_a_window() -> None:
    place = np.arange(1024)
    some, full = flex.blocks(np.full(1024, 1024), place, 256)
    assert some.sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    assert full.sum(1).tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


def test_a_mask_is_made_once_and_says_what_the_tree_says() -> None:
    for window in (None, 20):
        problem = attending(sequences(9, 200), heads=(1, 1), sizes=(1, 1), window=window)
        content, rows = problem.table.numpy().tobytes(), problem.table.shape[2]
        mask = flex.block_mask(content, rows, CPU)
        assert flex.block_mask(problem.table.clone().numpy().tobytes(), rows, CPU) is mask
        n = len(problem.tree.end)
        found = of_torch.create_mask(mask.mask_mod, 1, 1, n, n, device="cpu")
        assert torch.equal(found[0, 0], torch.from_numpy(pairs(problem)))
        assert mask.shape[-2:] == (n, n)
        # Backward, a block of keys meets the blocks of queries that meet it forward.
        for of_keys, of_queries, count, counted in (
            (mask.kv_indices, mask.q_indices, mask.kv_num_blocks, mask.q_num_blocks),
            (
                mask.full_kv_indices,
                mask.full_q_indices,
                mask.full_kv_num_blocks,
                mask.full_q_num_blocks,
            ),
        ):
            assert met(of_keys, count) == {(q, k) for k, q in met(of_queries, counted)}


def met(indices: Tensor, counts: Tensor) -> set[tuple[int, int]]:
    return {
        (row, int(column))
        for row, count in enumerate(counts[0, 0].tolist())
        for column in indices[0, 0, row, :count]
    }


# ---- compiled -----------------------------------------------------------------------------------


@pytest.fixture
def counter(on_cpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """FlexAttention compiled as on CUDA, but for the kernels."""
    monkeypatch.setattr(of_torch, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    counter = CompileCounterWithBackend("aot_eager")
    kernel = torch.compile(of_torch.flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_kernel", lambda: kernel)
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


def test_compiled_once_for_all_lengths(counter: Any) -> None:
    options = {"dtype": torch.float32, "softcap": 2.0, "sinks": True, "sizes": (16, 16)}
    counts = []
    for seed, longest in enumerate((200, 300, 400)):
        problem = attending(sequences(4, longest, seed), window=30 + seed, **options)
        assert_as_separate(problem, "auto", 1e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert set(counts) == {counts[0]}
    assert_as_separate(attending(sequences(4, 300), **options), "auto", 1e-5)
    assert counter.frame_count > counts[0]  # another mask


# PyTorch's own, of what a graph that breaks hands on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_in_a_compiled_model(counter: Any) -> None:
    """The graph breaks there; inside, FlexAttention is compiled still."""

    def layer(problem: Attending, table: Tensor, query: Tensor) -> Tensor:
        from fastdpop.prefix.attention import tree_attention

        out = tree_attention(
            query * 2.0, problem.key, problem.value, table, scale=problem.scale, softcap=1.5
        )
        return out + 1.0

    compiled = torch.compile(layer, backend="aot_eager")
    counts = []
    for seed in (0, 1):
        problem = attending(
            sequences(4, 200, seed), dtype=torch.float32, sizes=(16, 16), softcap=1.5
        )
        out = compiled(problem, problem.table, problem.query)
        doubled = problem.in_float64()
        doubled.query = (problem.query.detach().double() * 2.0).requires_grad_()
        torch.testing.assert_close(out.double(), doubled.separate() + 1.0, rtol=1e-5, atol=1e-5)
        out.sum().backward()
        wanted = torch.autograd.grad(doubled.separate().sum(), doubled.query)[0]
        torch.testing.assert_close(problem.query.grad.double(), 2.0 * wanted, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[0] == counts[1]


# ---- where it is taken --------------------------------------------------------------------------


KIND = ((4, 2), (16, 16))


def test_it_is_tried_before_it_is_relied_on(on_cpu: list[Any]) -> None:
    for dtype in flex._TOLERANCES:
        for capped, windowed in itertools.product((False, True), repeat=2):
            assert WORKS(CPU, dtype, *KIND, capped, windowed)
    assert len(on_cpu) == 12


def _fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no valid triton configs")


def _causal_only(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
    """A kernel that ignores who is whose prefix."""
    n = query.shape[2]
    mask = of_torch.create_block_mask(lambda b, h, q, k: k <= q, 1, 1, n, n, device="cpu")
    return of_torch.flex_attention(query, key, value, **{**kwargs, "block_mask": mask})


@pytest.mark.parametrize(
    ("kernel", "match"),
    [(_fails, "RuntimeError: no valid triton configs"), (_causal_only, "differs from plain")],
)
def test_plain_where_it_fails(
    kernel: Any, match: str, on_cpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_kernel", lambda: kernel)
    monkeypatch.setattr(flex, "_works", functools.cache(WORKS))
    problem = attending(sequences(5, 60), dtype=torch.float32, sizes=(16, 16), softcap=2.0)
    with pytest.warns(UserWarning, match=match):
        assert_as_separate(problem, "auto", 1e-5)
    assert_as_separate(problem, "auto", 1e-5)  # told once


@pytest.mark.parametrize(
    ("capability", "dtype", "sizes", "want"),
    [
        ((9, 0), torch.float32, (64, 64), True),
        ((9, 0), torch.bfloat16, (256, 256), True),
        ((8, 6), torch.float16, (80, 96), True),
        ((9, 0), torch.float64, (64, 64), False),
        ((9, 0), torch.bfloat16, (8, 64), False),
        ((9, 0), torch.bfloat16, (64, 8), False),
        ((9, 0), torch.bfloat16, (512, 64), False),
        ((7, 5), torch.float16, (64, 64), False),
    ],
)
def test_what_it_supports(
    capability: tuple[int, int],
    dtype: torch.dtype,
    sizes: tuple[int, int],
    want: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def meta(tokens: int, size: int) -> Any:
        shape = torch.Size((1, 2, tokens, size))
        return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=shape)

    problem = Problem(meta(4, sizes[0]), None, meta(4, sizes[1]), None, 1.0, 50.0)  # type: ignore[arg-type]
    assert flex.supports(problem) is want
    assert not varlen.supports(problem)
    assert not flex.supports(problem._replace(query=meta(0, sizes[0])))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not flex.supports(problem)


def test_never_on_a_cpu() -> None:
    problem = attending([[0, 1]], sizes=(16, 16), dtype=torch.float32)
    assert not flex.supports(Problem(problem.query, problem.key, problem.value, None, 1.0, None))
