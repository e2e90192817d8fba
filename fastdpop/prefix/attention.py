"""Attention over a prefix tree, as one operator.

    fastdpop::tree_attention           query, key, value -> out, log-sum-exps
    fastdpop::tree_attention_backward  their gradients

Query i sees key j exactly if ``j <= i < end[j]`` and, with a window, ``position[i] - position[j] < window``. How it is
computed is one function by contract: the same numbers up to rounding, and the same output bits on every call, with
gradients and without. Gradients have the same bits too, but for FlashAttention's on CUDA, which are deterministic where
``torch.use_deterministic_algorithms(True)`` asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastdpop.prefix import chunks, flex, varlen
from fastdpop.prefix.chunks import Problem
from fastdpop.prefix.plan import Plan, plan

WAYS = ("auto", "segments", "masked", "plain")


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    how: str = "auto",
) -> Tensor:
    """Attention in which every token of a tree sees those before it in its sequences.

    Args:
        query: ``(1, Hq, N, D)``; Hq is a multiple of Hkv, query head h reads key head ``h // (Hq /
            Hkv)``.
        key: ``(1, Hkv, N, D)``.
        value: ``(1, Hkv, N, Dv)``.
        tree: ``(1, 1, R, N)`` int64 on the CPU. Row 0: `end`, one past the last token of each
            one's subtree (:func:`fastdpop.prefix.tree.build_tree`); row 1: positions; row 2, where
            there is a sliding window: its length in tokens, itself included.
        scale: what the products of queries and keys are multiplied by.
        softcap: if given, scores become ``softcap * tanh(score / softcap)``.
        sinks: ``(Hq,)`` logits that join the softmax's denominator only; differentiable.
        how: "auto", the cheapest chunks of queries; "segments", a chunk for every run of the tree;
            "masked", one chunk of all; "plain", in plain arithmetic.

    Returns:
        ``(1, Hq, N, Dv)`` in the query's dtype. Under autocast query, key and value are cast, as
        for torch's attention.

    Raises:
        ValueError: a shape, a dtype, `tree` or `how` is not as above.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            x.to(dtype) if x.dtype != torch.float64 else x for x in (query, key, value)
        )
    _check(query, key, value, tree, sinks, how)
    _positive("scale", scale)
    _positive("softcap", 1.0 if softcap is None else softcap)
    problem = Problem(query, key, value, sinks, float(scale), softcap)
    if how == "masked" or (how == "auto" and not varlen.supports(problem)):
        found = flex.attention(problem, tree) if flex.supports(problem) else None
        if found is not None:
            return found
    out, _ = _attention(query, key, value, tree, sinks, float(scale), softcap, how)
    return out


def _positive(name: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}: expected a number above 0")


def _check(
    query: Tensor, key: Tensor, value: Tensor, tree: Tensor, sinks: Tensor | None, how: str
) -> None:
    def refuse(name: str, tensor: Tensor, expected: str) -> None:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: expected {expected}"
        )

    if how not in WAYS:
        raise ValueError(f'how is {how!r}: expected "auto", "segments", "masked" or "plain"')
    if query.dim() != 4 or query.shape[0] != 1 or not query.dtype.is_floating_point:
        refuse("query", query, "(1, query heads, tokens, head size), floating-point")
    tokens, size = query.shape[2], query.shape[3]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != tokens:
            refuse(name, tensor, f"(1, heads, {tokens}, head size)")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            refuse(name, tensor, f"{query.dtype} on {query.device}, as query has")
    if key.shape[3] != size:
        refuse("key", key, f"query's head size {size}")
    if value.shape[1] != key.shape[1] or query.shape[1] % key.shape[1]:
        refuse(
            "value",
            value,
            f"key's {key.shape[1]} heads, of which {query.shape[1]} query heads are a multiple",
        )
    if tree.dim() != 4 or tree.dtype != torch.int64 or tree.device.type != "cpu":
        refuse("tree", tree, f"(1, 1, 2 or 3, {tokens}), int64 on the CPU")
    if tree.shape[:2] != (1, 1) or tree.shape[2] not in (2, 3) or tree.shape[3] != tokens:
        refuse("tree", tree, f"(1, 1, 2 or 3, {tokens}), int64 on the CPU")
    if sinks is not None and (sinks.shape != query.shape[1:2] or sinks.device != query.device):
        refuse("sinks", sinks, f"({query.shape[1]},) on {query.device}")


def _planned(problem: Problem, tree: Tensor, how: str) -> tuple[Plan, bool]:
    """How to compute a problem, and whether by FlashAttention on CUDA."""
    flash = how in ("auto", "segments") and varlen.supports(problem)
    width = problem.query.shape[1] * (problem.query.shape[3] + problem.value.shape[3])
    content = tree.contiguous().numpy().tobytes()
    return plan(content, tree.shape[2], "segments" if flash else how, width), flash


def _is_plain(problem: Problem, how: str) -> bool:
    return how == "plain" or problem.query.device.type != "cpu" or problem.softcap is not None


@custom_op("fastdpop::tree_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    how: str,
) -> tuple[Tensor, Tensor]:
    """out ``(1, Hq, N, Dv)`` (differentiable), and its log-sum-exps ``(Hq, N)``."""
    problem = Problem(query, key, value, sinks, scale, softcap)
    found, flash = _planned(problem, tree, how)
    with chunks.as_given(query.device):
        if flash:
            return varlen.forward(problem, found)
        return chunks.forward(problem, found, _is_plain(problem, how))


@_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    how: str,
) -> tuple[Tensor, Tensor]:
    _, heads, tokens, _ = query.shape
    out = query.new_empty((1, tokens, heads, value.shape[3])).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty((heads, tokens), dtype=wide)


@custom_op("fastdpop::tree_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, saved: Sequence[Tensor], scale: float, softcap: float | None, how: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks, the last empty where there are none.

    Args:
        saved: query, key, value, tree, out, its log-sum-exps and, if there are any, the sinks.
    """
    query, key, value, tree, out, lse, *sinks = saved
    problem = Problem(query, key, value, sinks[0] if sinks else None, scale, softcap)
    found, flash = _planned(problem, tree, how)
    with chunks.as_given(query.device):
        if flash:
            gradients = varlen.backward(problem, found, dout, out, lse)
        else:
            plain = _is_plain(problem, how)
            gradients = chunks.backward(problem, found, plain, dout, out, lse)
        of_sinks = chunks.dsinks(sinks[0], dout, out, lse) if sinks else query.new_empty((0,))
    dquery, dkey, dvalue = map(_by_token, gradients)
    return dquery, dkey, dvalue, of_sinks


def _by_token(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


@_attention_backward.register_fake
def _(
    dout: Tensor, saved: Sequence[Tensor], scale: float, softcap: float | None, how: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, sinks = saved[0], saved[6:]
    dquery, dkey, dvalue = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in saved[:3])
    of_sinks = torch.empty_like(sinks[0]) if sinks else query.new_empty((0,))
    return dquery, dkey, dvalue, of_sinks


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, tree, sinks, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, tree, *output, *(() if sinks is None else (sinks,)))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    others = (None, None, None)  # scale, softcap, how
    if dout is None:
        return None, None, None, None, None, *others
    saved = list(ctx.saved_tensors)  # once: under checkpointing every reading computes them again
    dquery, dkey, dvalue, of_sinks = _attention_backward(dout, saved, *ctx.options)
    return dquery, dkey, dvalue, None, of_sinks if len(saved) > 6 else None, *others


def _no_second_derivative(ctx: Any, *gradients: Any) -> Any:
    raise RuntimeError(
        "no double differentiation: attention over a prefix tree gives first derivatives only. "
        "Do not share prefixes where second ones are needed"
    )


_attention.register_autograd(_gradients, setup_context=_context)
_attention_backward.register_autograd(_no_second_derivative)
