"""Attention chunk by chunk: by torch's kernel for CPUs, or in plain arithmetic on any device.

Tensors are grouped by the heads of keys: ``(Hkv, G, N, D)``, in the dtype of the computation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpop.prefix.plan import Chunk, Plan


class Problem(NamedTuple):
    """Attention's inputs: query ``(1, Hq, N, D)``, key ``(1, Hkv, N, D)``, value ``(1, Hkv, N,
    Dv)``; sinks ``(Hq,)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    scale: float
    softcap: float | None


class Piece(NamedTuple):
    """A chunk's tensors: query ``(Hkv, G, n, D)``, key ``(Hkv, 1, m, D)``, value ``(Hkv, 1, m,
    Dv)``, mask ``(n, m)`` or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float | None


@contextlib.contextmanager
def as_given(device: torch.device) -> Iterator[None]:
    """Without autocast, which would round plain products, and with a GPU's own device current."""
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.autocast(device.type, enabled=False), current:
        yield


def forward(problem: Problem, plan: Plan, plain: bool) -> tuple[Tensor, Tensor]:
    """``(1, Hq, N, Dv)`` in the query's dtype, laid out token by token, and lse ``(Hq, N)``."""
    query, value = problem.query, problem.value
    heads, groups = value.shape[1], query.shape[1] // value.shape[1]
    out = _new_by_token(query[..., :1].expand(-1, -1, -1, value.shape[3]), query.dtype)
    lse = query.new_empty((query.shape[1], query.shape[2]), dtype=_wide(query.dtype))
    sinks = problem.sinks
    if sinks is not None:
        sinks = sinks.to(lse.dtype).unflatten(0, (heads, groups)).unsqueeze(-1)
    grouped_out, grouped_lse = _grouped(out, heads), lse.unflatten(0, (heads, groups))
    for chunk, piece in _pieces(problem, plan):
        own, norm = (_plain_forward if plain else _flash_forward)(piece)
        if sinks is not None:
            own, norm = with_sinks(own, norm, sinks)
        queries = slice(chunk.first, chunk.last)
        grouped_out[:, :, queries] = own
        grouped_lse[:, :, queries] = norm
    return out, lse


def backward(
    problem: Problem, plan: Plan, plain: bool, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their dtypes, laid out token by token."""
    heads, dtype = problem.key.shape[1], lse.dtype
    dquery = _new_by_token(problem.query, problem.query.dtype)
    dkey, dvalue = (_new_by_token(x, dtype).zero_() for x in (problem.key, problem.value))
    grouped_dquery, dout, out = (_grouped(x, heads) for x in (dquery, dout, out))
    grouped_lse = lse.unflatten(0, (heads, -1))
    for chunk, piece in _pieces(problem, plan):
        queries = slice(chunk.first, chunk.last)
        of_dquery, of_dkey, of_dvalue = (_plain_backward if plain else _flash_backward)(
            piece,
            dout[:, :, queries].to(dtype),
            out[:, :, queries].to(dtype),
            grouped_lse[:, :, queries],
        )
        grouped_dquery[:, :, queries] = of_dquery
        _add(_grouped(dkey, heads), of_dkey, chunk.keys)
        _add(_grouped(dvalue, heads), of_dvalue, chunk.keys)
    return dquery, dkey.to(problem.key.dtype), dvalue.to(problem.value.dtype)


def _new_by_token(like: Tensor, dtype: torch.dtype) -> Tensor:
    """``(1, H, N, D)`` in which a token's heads lie together, as models want them."""
    return like.new_empty(like.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exps after one more key of value zero, whose scores are `sinks`."""
    whole = torch.logaddexp(lse, sinks)
    return out * (lse - whole).exp().unsqueeze(-1), whole


def dsinks(sinks: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The sinks' gradient: ``-sum_q exp(sink - lse) * (dout . out)``.

    A sink's own value is zero, so d out / d sink is minus its share of the softmax times `out`.
    """
    shares = (sinks.to(lse.dtype).unsqueeze(-1) - lse).exp()
    rows = (dout[0].to(lse.dtype) * out[0]).sum(-1)
    return -(shares * rows).sum(-1).to(sinks.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the computation: nothing but the result is rounded.

    For stretches as short as chunks are, torch's attention for CPUs is as fast in fp32 as in bf16,
    and its backward is faster.
    """
    return torch.promote_types(dtype, torch.float32)


def _grouped(tensor: Tensor, heads: int) -> Tensor:
    return tensor[0].unflatten(0, (heads, -1))


def _pieces(problem: Problem, plan: Plan) -> Iterator[tuple[Chunk, Piece]]:
    dtype, device = _wide(problem.query.dtype), problem.query.device
    query = _grouped(problem.query, problem.key.shape[1])
    key, value = (x[0].to(dtype).unsqueeze(1) for x in (problem.key, problem.value))
    for index, chunk in enumerate(plan.chunks):
        mask = plan.mask(index, device, dtype)
        own = query[:, :, chunk.first : chunk.last].to(dtype)
        keys = chunk.keys
        yield (
            chunk,
            Piece(
                own,
                _take(key, keys),
                _take(value, keys),
                mask,
                chunk.causal,
                problem.scale,
                problem.softcap,
            ),
        )


def _take(tensor: Tensor, stretches: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [tensor[:, :, start:stop] for start, stop in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _add(total: Tensor, own: Tensor, stretches: tuple[tuple[int, int], ...]) -> None:
    taken = 0
    for start, stop in stretches:
        total[:, :, start:stop] += own[:, :, taken : taken + stop - start]
        taken += stop - start


# ---- torch's kernel for CPUs --------------------------------------------------------------------


def _flash_inputs(piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """Of one size, and a group's keys once for each of its queries."""
    groups = piece.query.shape[1]
    size = max(piece.query.shape[3], piece.value.shape[3])
    query, key, value = (_padded(x, size) for x in (piece.query, piece.key, piece.value))
    return query, key.expand(-1, groups, -1, -1), value.expand(-1, groups, -1, -1)


def _padded(tensor: Tensor, size: int) -> Tensor:
    missing = size - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _flash_forward(piece: Piece) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_flash_inputs(piece), 0.0, piece.causal, attn_mask=piece.mask, scale=piece.scale
    )
    return out[..., : piece.value.shape[3]], lse


def _flash_backward(
    piece: Piece, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _flash_inputs(piece)
    size = inputs[0].shape[3]
    dquery, dkey, dvalue = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _padded(dout, size),
        *inputs,
        _padded(out, size),
        lse,
        0.0,
        piece.causal,
        attn_mask=piece.mask,
        scale=piece.scale,
    )
    sizes = piece.query.shape[3], piece.value.shape[3]
    dkey, dvalue = (x.sum(1, keepdim=True) for x in (dkey, dvalue))
    return dquery[..., : sizes[0]], dkey[..., : sizes[0]], dvalue[..., : sizes[1]]


# ---- plain arithmetic ---------------------------------------------------------------------------


def _folded(tensor: Tensor) -> Tensor:
    """``(Hkv, G * n, D)``: the queries of a group as queries of one head."""
    return tensor.flatten(1, 2)


def _scores(piece: Piece) -> tuple[Tensor, Tensor | None]:
    """``(Hkv, G * n, m)`` masked, and what the softcap's derivative needs."""
    scores = torch.bmm(_folded(piece.query), _folded(piece.key).transpose(1, 2)) * piece.scale
    capped = None
    if piece.softcap is not None:
        capped = torch.tanh(scores / piece.softcap)
        scores = capped * piece.softcap
    grouped = scores.unflatten(1, piece.query.shape[1:3])
    if piece.mask is not None:
        grouped = grouped + piece.mask
    elif piece.causal:
        later = torch.ones(grouped.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        grouped = grouped.masked_fill(later, -torch.inf)
    return grouped.flatten(1, 2), capped


def _plain_forward(piece: Piece) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(piece)
    lse = scores.logsumexp(-1)
    out = torch.bmm((scores - lse.unsqueeze(-1)).exp(), _folded(piece.value))
    shape = piece.query.shape[1:3]
    return out.unflatten(1, shape), lse.unflatten(1, shape)


def _plain_backward(
    piece: Piece, dout: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scores, capped = _scores(piece)
    weights = (scores - _folded(lse.unsqueeze(-1))).exp()
    rows = _folded(dout)
    dvalue = torch.bmm(weights.transpose(1, 2), rows)
    dweights = torch.bmm(rows, _folded(piece.value).transpose(1, 2))
    dscores = weights * (dweights - _folded((dout * out).sum(-1, keepdim=True)))
    if capped is not None:
        dscores = dscores * (1 - capped.square())
    dscores = dscores * piece.scale
    dquery = torch.bmm(dscores, _folded(piece.key)).unflatten(1, piece.query.shape[1:3])
    dkey = torch.bmm(dscores.transpose(1, 2), _folded(piece.query))
    return dquery, dkey.unsqueeze(1), dvalue.unsqueeze(1)
