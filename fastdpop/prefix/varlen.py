"""Attention over a tree on CUDA: one call of torch's FlashAttention for sequences of different lengths.

Every run is a sequence: its queries are the run's tokens, its keys those above it and its own, copied one after the
other. FlashAttention aligns a causal mask, and a window, with the last key, which makes both exact: keys stand in the
order of their depths. Nothing is computed to be masked, nothing is merged, and nothing waits for the device.

The forward pass gives the same bits on every call. FlashAttention's backward adds the gradients of queries in an order
of its own, unless ``torch.use_deterministic_algorithms(True)``; those of keys' copies are always added in one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpop.prefix.chunks import Problem, with_sinks
from fastdpop.prefix.plan import Plan

_LARGEST = 256
"""Head size up to which FlashAttention computes."""

_ALIGNED = 8
"""It takes multiples of this many."""


class Copies(NamedTuple):
    """Where the copies of each key are: their places ``(K,)``, key by key, and each key's bounds in
    these ``(N + 1,)``; int64.
    """

    places: Tensor
    bounds: Tensor


class Lengths(NamedTuple):
    """The sequences: which keys, ``(K,)`` int64, and their copies; bounds of queries and keys,
    ``(R + 1,)`` int32; and the longest of each.
    """

    keys: Tensor
    copies: Copies
    cu_queries: Tensor
    cu_keys: Tensor
    most_queries: int
    most_keys: int


@torch.compiler.assume_constant_result
def capability(device: int) -> tuple[int, int]:
    """A GPU's, as (9, 0)."""
    return torch.cuda.get_device_capability(device)


def supports(problem: Problem) -> bool:
    """Whether FlashAttention computes this problem."""
    query = problem.query
    size = max(query.shape[3], problem.value.shape[3])
    if query.device.type != "cuda" or torch.version.hip is not None or query.shape[2] == 0:
        return False
    if query.dtype not in (torch.float16, torch.bfloat16) or problem.softcap is not None:
        return False
    major, minor = capability(query.device.index or 0)
    # Its backward for the largest heads needs the shared memory of data centers' cards.
    return major >= 8 and size <= (_LARGEST if minor == 0 and major < 12 else 192)


def lengths(plan: Plan, device: torch.device) -> Lengths:
    """The sequences of a plan whose chunks are runs."""
    found = plan.on_device.get(device)
    if found is None:
        chunks = plan.chunks
        stretches = [torch.arange(*keys) for chunk in chunks for keys in chunk.keys]
        queries = torch.tensor([chunk.last - chunk.first for chunk in chunks])
        keys = torch.tensor([chunk.key_count for chunk in chunks])
        copied = torch.cat(stretches)
        counts = torch.bincount(copied, minlength=len(plan.end))
        found = Lengths(
            copied.to(device, non_blocking=True),
            Copies(
                copied.argsort(stable=True).to(device, non_blocking=True),
                _bounds(counts).long().to(device, non_blocking=True),
            ),
            _bounds(queries).to(device, non_blocking=True),
            _bounds(keys).to(device, non_blocking=True),
            # One query a sequence would take a path of the kernel that lays out log-sum-exps
            # otherwise; the number is a bound.
            max(2, int(queries.max())),
            int(keys.max()),
        )
        plan.on_device[device] = found
    return found


def _bounds(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def forward(problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
    """As :func:`fastdpop.prefix.chunks.forward`."""
    found = lengths(plan, problem.query.device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *_inputs(problem, found.keys), *found[2:], 0.0, True, False, **_options(problem, plan)
    )
    out = out[..., : problem.value.shape[3]].transpose(0, 1).unsqueeze(0)
    if problem.sinks is not None:
        out, lse = with_sinks(out, lse, problem.sinks.float().unsqueeze(-1))
        out = out.to(problem.query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def backward(
    problem: Problem, plan: Plan, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    found = lengths(plan, problem.query.device)
    query, key, value = _inputs(problem, found.keys)
    # No dropout: the state of a random number generator, which nothing reads.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    dquery, *others = torch.ops.aten._flash_attention_backward(
        _tokens(dout, query.shape[2]),
        query,
        key,
        value,
        _tokens(out, query.shape[2]),
        lse,
        *found[2:],
        0.0,
        True,
        state,
        torch.empty(0, device=query.device),
        **_options(problem, plan),
    )
    dkey, dvalue = (
        _summed(gradient, like, found.copies)
        for gradient, like in zip(others, (problem.key, problem.value), strict=True)
    )
    return dquery[..., : problem.query.shape[3]].transpose(0, 1).unsqueeze(0), dkey, dvalue


def _options(problem: Problem, plan: Plan) -> dict[str, Any]:
    window = {} if plan.window is None else {"window_size_left": plan.window - 1}
    return {"scale": problem.scale, "window_size_right": 0, **window}


def _inputs(problem: Problem, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token, ``(tokens, heads, D)``, of one size."""
    size = max(problem.query.shape[3], problem.value.shape[3])
    size = -(-size // _ALIGNED) * _ALIGNED
    query, key, value = (_tokens(x, size) for x in (problem.query, problem.key, problem.value))
    return query, key.index_select(0, index), value.index_select(0, index)


def _tokens(tensor: Tensor, size: int) -> Tensor:
    tokens = tensor[0].transpose(0, 1)
    missing = size - tokens.shape[-1]
    padded = torch.nn.functional.pad(tokens, (0, missing)) if missing else tokens
    return padded if padded.stride(-1) == 1 else padded.contiguous()


def _summed(gradient: Tensor, like: Tensor, copies: Copies) -> Tensor:
    """Gradients of the copies of a key added, in fp32, and in one order on every call."""
    total = torch.nn.functional.embedding_bag(
        copies.places,
        gradient[..., : like.shape[3]].flatten(1),
        copies.bounds,
        mode="sum",
        include_last_offset=True,
    )
    return total.unflatten(1, (like.shape[1], -1)).transpose(0, 1).unsqueeze(0)
