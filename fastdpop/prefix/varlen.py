"""Attention over a tree on CUDA: torch's FlashAttention for sequences of different lengths, nearly always in one call.

Every run is a sequence: its queries are the run's tokens, its keys those above it and its own, copied one after the
other. FlashAttention aligns a causal mask, and a window, with the last key, which makes both exact: keys stand in the
order of their depths. Nothing is computed to be masked, nothing is merged, and nothing waits for the device.

The forward pass gives the same bits on every call. FlashAttention's backward adds the gradients of queries in an order
of its own, unless ``torch.use_deterministic_algorithms(True)``; those of keys' copies are always added in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpop.compiling import constant
from fastdpop.prefix.chunks import Problem, with_sinks
from fastdpop.prefix.plan import Plan

_LARGEST = 256
"""Head size up to which FlashAttention computes."""

_ALIGNED = 8
"""It takes multiples of this many."""

_MOST = 1_024
"""Sequences of a call. The kernel's grid has a column for each, of which there may be 65,535, and its backward pass
holds the gradients of 128 more queries for each in fp32: 2 GB for so many, with 32 heads of 128.
"""


class Copies(NamedTuple):
    """Where the copies of each key are: their places ``(K,)``, key by key, and each key's bounds in
    these ``(N + 1,)``; int64.
    """

    places: Tensor
    bounds: Tensor


class Call(NamedTuple):
    """Some of the sequences: which of all queries, and which of all copied keys; their bounds,
    ``(R + 1,)`` int32, from 0; and the longest of each.
    """

    queries: slice
    keys: slice
    cu_queries: Tensor
    cu_keys: Tensor
    most_queries: int
    most_keys: int


class Lengths(NamedTuple):
    """The sequences: which keys, ``(K,)`` int64, their copies, and the calls that compute them."""

    keys: Tensor
    copies: Copies
    calls: tuple[Call, ...]


@constant
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
        copied = torch.cat(stretches)
        counts = torch.bincount(copied, minlength=len(plan.end))
        queries = _bounds(torch.tensor([chunk.last - chunk.first for chunk in chunks]))
        keys = _bounds(torch.tensor([chunk.key_count for chunk in chunks]))
        found = Lengths(
            copied.to(device, non_blocking=True),
            Copies(
                copied.argsort(stable=True).to(device, non_blocking=True),
                _bounds(counts).to(device, non_blocking=True),
            ),
            tuple(
                _call(queries[first : first + _MOST + 1], keys[first : first + _MOST + 1], device)
                for first in range(0, len(chunks), _MOST)
            ),
        )
        plan.on_device[device] = found
    return found


def _bounds(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _call(queries: Tensor, keys: Tensor, device: torch.device) -> Call:
    """From the bounds of its sequences among all."""
    both = (queries, keys)
    of_queries, of_keys = (slice(int(x[0]), int(x[-1])) for x in both)
    cu_queries, cu_keys = ((x - x[0]).int().to(device, non_blocking=True) for x in both)
    most_queries, most_keys = (int(x.diff().max()) for x in both)
    # One query a sequence would take a path of the kernel that lays out log-sum-exps otherwise; the
    # number is a bound.
    return Call(of_queries, of_keys, cu_queries, cu_keys, max(2, most_queries), most_keys)


def forward(problem: Problem, plan: Plan) -> tuple[Tensor, Tensor]:
    """As :func:`fastdpop.prefix.chunks.forward`."""
    found = lengths(plan, problem.query.device)
    query, key, value = _inputs(problem, found.keys)
    done = []
    for call in found.calls:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query[call.queries],
            key[call.keys],
            value[call.keys],
            *call[2:],
            0.0,
            True,
            False,
            **_options(problem, plan),
        )
        done.append((out, lse))
    outs, norms = zip(*done, strict=True)
    out, lse = _joined(outs, 0), _joined(norms, 1)
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
    dout, out = _tokens(dout, query.shape[2]), _tokens(out, query.shape[2])
    done = []
    for call in found.calls:
        gradients = torch.ops.aten._flash_attention_backward(
            dout[call.queries],
            query[call.queries],
            key[call.keys],
            value[call.keys],
            out[call.queries],
            lse[:, call.queries].contiguous(),
            *call[2:],
            0.0,
            True,
            state,
            torch.empty(0, device=query.device),
            **_options(problem, plan),
        )
        done.append(gradients)
    dquery, *others = (_joined(parts, 0) for parts in zip(*done, strict=True))
    dkey, dvalue = (
        _summed(gradient, like, found.copies)
        for gradient, like in zip(others, (problem.key, problem.value), strict=True)
    )
    return dquery[..., : problem.query.shape[3]].transpose(0, 1).unsqueeze(0), dkey, dvalue


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


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
