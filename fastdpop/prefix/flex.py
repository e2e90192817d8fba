"""Attention over a tree on CUDA by FlexAttention, for what FlashAttention does not compute: softcaps, fp32.

It differentiates itself, so it stands beside the operator. Its blocks of 128 queries and 128 keys are told in advance
which of them hold no pair that sees each other, and which only such pairs. Forward and backward pass add in a fixed
order; the forward kernel writes log-sum-exps with gradients and without, so that it is the same.

In a compiled model every call of it is a break of the graph: the blocks come from the tree's numbers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fastdpop.prefix import chunks
from fastdpop.prefix.chunks import Problem
from fastdpop.prefix.plan import nodes, plan, window_of
from fastdpop.prefix.tree import Ints, build_tree, sees
from fastdpop.prefix.varlen import capability

BLOCK = 128
"""Queries, and keys, of a block."""

_SIZES = range(16, 257)
"""Head sizes that FlexAttention computes, and whose blocks fit a GPU's shared memory."""

_VARIANTS = 64
"""Compiled kernels that are kept: one for each kind of mask, of heads and of gradients."""

_TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3}
"""Relative difference (Frobenius norms) from plain arithmetic up to which a kernel is taken for right. In fp32,
products may be in TF32, if PyTorch is told so.
"""


def supports(problem: Problem) -> bool:
    """Whether FlexAttention should compute this problem; whether it does here is found out once."""
    query, value = problem.query, problem.value
    if query.device.type != "cuda" or torch.version.hip is not None or query.shape[2] == 0:
        return False
    if query.dtype not in _TOLERANCES or capability(query.device.index or 0)[0] < 8:
        return False
    return query.shape[3] in _SIZES and value.shape[3] in _SIZES


@torch.compiler.disable
def attention(problem: Problem, tree: Tensor) -> Tensor | None:
    """``(1, Hq, N, Dv)``, differentiable; None where FlexAttention fails on this device.

    Args:
        tree: as :func:`fastdpop.prefix.attention.tree_attention` takes it.
    """
    query, key, value = problem[:3]
    table = tree[0, 0].contiguous().numpy()
    mask = block_mask(table.tobytes(), len(table), query.device)
    kind = (
        (query.shape[1], key.shape[1]),
        (query.shape[3], value.shape[3]),
        problem.softcap is not None,
        window_of(table) is not None,
    )
    if not _works(query.device, query.dtype, *kind):
        return None
    return _attention(problem, mask)


def _attention(problem: Problem, mask: BlockMask) -> Tensor:
    query, key, value, sinks, scale, softcap = problem
    with (
        chunks.as_given(query.device),
        torch._dynamo.config.patch(recompile_limit=_VARIANTS),
    ):
        out, aux = _kernel()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _capped(softcap, query.shape[1], query.device),
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            # Never the kernel for few queries, which adds in another order.
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
            return_aux=AuxRequest(lse=True),
        )
        if sinks is None:
            return out
        shares = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype).unsqueeze(-1))
        return (out * shares.unsqueeze(-1)).to(query.dtype)


@functools.cache
def _kernel() -> Callable[..., Any]:
    # With the whole graph: where it cannot be compiled it fails, instead of computing all scores.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@functools.lru_cache(maxsize=8)
def _capped(softcap: float, heads: int, device: torch.device) -> Callable[..., Tensor]:
    """A tensor, since a number would become a symbol, which FlexAttention does not take."""
    with torch.inference_mode(False):
        caps = torch.full((heads,), softcap, device=device)

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return caps[head] * torch.tanh(score / caps[head])

    return cap


# ---- which blocks there are ---------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def block_mask(tree: bytes, rows: int, device: torch.device) -> BlockMask:
    """The mask of a tree, which its content names, as in :func:`fastdpop.prefix.plan.plan`.

    Raises:
        ValueError: it is not that of a tree.
    """
    table = np.frombuffer(tree, dtype=np.int64).reshape(rows, -1).copy()
    window = window_of(table)
    for _ in nodes(table[0]):
        pass  # checks it
    some, full = blocks(table[0], table[1], window)
    with torch.inference_mode(False):  # made in an evaluation, they may be used in training
        end = torch.from_numpy(table[0]).to(device, torch.int32)
        position = torch.from_numpy(table[1]).to(device, torch.int32)
        found = BlockMask.from_kv_blocks(
            *_ordered(some & ~full),
            *_ordered(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=_visible(end) if window is None else _near(end, position, window),
            seq_lengths=(table.shape[1], table.shape[1]),
        )
        return found.to(device)


def _visible(end: Tensor) -> Callable[..., Tensor]:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found: Tensor = sees(end, query, key)
        return found

    return visible


def _near(end: Tensor, position: Tensor, window: int) -> Callable[..., Tensor]:
    last = position + window

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found: Tensor = sees(end, query, key) & (position[query] < last[key])
        return found

    return near


def blocks(
    end: Ints, position: Ints, window: int | None
) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Blocks of queries ``(B, 1)`` and of keys ``(1, B)`` with a pair that sees each other, and
    those that have such pairs only.

    With a window, some without such a pair are among the first, where a block of keys holds several
    depths.
    """
    starts = np.arange(0, len(end), BLOCK)
    stops = starts + BLOCK
    least_end, most_end = np.minimum.reduceat(end, starts), np.maximum.reduceat(end, starts)
    queries = np.arange(len(starts))[:, None]
    keys = queries.T
    # A subtree that reaches into a block of queries holds its first.
    some = (keys == queries) | ((keys < queries) & (most_end > starts[:, None]))
    # A block that goes beyond the last token is not full.
    full = (keys < queries) & (least_end >= stops[:, None])
    if window is not None:
        low, high = np.minimum.reduceat(position, starts), np.maximum.reduceat(position, starts)
        some &= low[:, None] - high < window
        full &= high[:, None] - low < window
    return some, full


def _ordered(found: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[Tensor, Tensor]:
    """How many there are in each row ``(1, 1, B)``, and which, first those ``(1, 1, B, B)``."""
    order = np.argsort(~found, axis=1, kind="stable")
    counts = torch.from_numpy(found.sum(1))[None, None].int()
    return counts, torch.from_numpy(order)[None, None].int()


# ---- whether it works here ----------------------------------------------------------------------


@functools.cache
def _works(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    capped: bool,
    windowed: bool,
) -> bool:
    """Whether a small problem of a kind agrees with plain arithmetic, gradients included."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            worst = _difference(device, dtype, heads, sizes, capped, windowed)
        reason = f"it differs from plain arithmetic by {worst:.2g}"
        if worst <= _TOLERANCES[dtype]:
            return True
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of compilers and drivers, which have many
        reason = f"{type(error).__name__}: {str(error)[:300]}"
    warnings.warn(
        f"attention over a prefix tree is computed in plain arithmetic, which is slower: PyTorch's FlexAttention fails "
        f"for heads of {sizes[0]} in {dtype} on {device} ({reason})",
        stacklevel=4,
    )
    return False


def _difference(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    capped: bool,
    windowed: bool,
) -> float:
    prefix = list(range(200))
    tree = build_tree([prefix + [side] * 90 for side in (0, 1)])
    rows = [tree.end, tree.position_ids, *([torch.full_like(tree.end, 150)] if windowed else [])]
    content = torch.stack(rows).numpy().tobytes()
    random = torch.Generator(device).manual_seed(0)

    def new(heads: int, size: int) -> Tensor:
        shape = (1, len(tree.end), heads, size)
        numbers = torch.randn(shape, generator=random, device=device, dtype=dtype)
        return numbers.transpose(1, 2)

    given = (
        new(heads[0], sizes[0]).requires_grad_(),
        new(heads[1], sizes[0]).requires_grad_(),
        new(heads[1], sizes[1]).requires_grad_(),
    )
    dout = new(heads[0], sizes[1])
    problem = Problem(*given, None, sizes[0] ** -0.5, 2.0 if capped else None)
    out = _attention(problem, block_mask(content, len(rows), device))
    found = [out, *torch.autograd.grad(out, given, dout)]
    plan_ = plan(content, len(rows), "segments", 1)
    with torch.no_grad(), chunks.as_given(device):
        exact, lse = chunks.forward(problem, plan_, True)
        wanted = [exact, *chunks.backward(problem, plan_, True, dout, exact, lse)]
        differences = [
            (ours.double() - theirs.double()).norm() / theirs.double().norm()
            for ours, theirs in zip(found, wanted, strict=True)
        ]
        return float(torch.stack(differences).nan_to_num(nan=torch.inf).max())
