"""The forward product: logits tile by tile, straight into partial sums of the softmax.

For a tile of rows i and tokens v, with the accumulator ``u = hidden @ weight.T + bias``:

    t = u, or tanh(cap * u) under a softcap
    z = scale * t                       logits in units of log 2
    m = max_v z
    e = 2**(z - m)
    top[tile, i] = m,   total[tile, i] = sum of e over v != y_i,   target[i] = t[y_i] if y_i is here

and, kept for the gradients of whole groups, ``kept[i, v] = e * dt/du`` without its constant factor
(``1 - t**2`` under a softcap, else 1), rounded once to the products' dtype; 0 at the target. The
target stays out of the sums, so that 1 - p of a token near certainty is a sum of small numbers, not
a difference of large ones. No atomics: a partial has one writer, and :mod:`.combine` adds them up
in a fixed order.

The epilogue takes the tile in two halves, in every variant alike: the same row has the same bits,
whatever else is computed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles as t
from .config import Tiles
from .tiles import LOWEST, aligned, dot, grid, grouped, halves, load_block, narrow, operand, tanh


@dataclass(frozen=True)
class Transform:
    """What happens to raw logits, as the kernels take it.

    Attributes:
        scale: units of log 2 in a unit of t.
        cap: factor of the raw logits inside the tanh.
        softcap: whether there is a tanh.
        slope: d logits / d raw logits, apart from ``1 - t**2``.
    """

    scale: float
    cap: float
    softcap: bool
    slope: float


@dataclass(frozen=True)
class Partials:
    """What the forward product leaves of n rows.

    Attributes:
        tops, totals: ``(tiles of the vocabulary, n)`` float32.
        targets: ``(n,)`` float32, t of each row's target.
        moments: ``(4, tiles, n)`` float32, sums of ``(z - m) e`` and of ``e**2`` without the
            target, of t with it, and the largest t; or None.
        kept: ``(n, whole tiles)`` in the products' dtype, or None.
    """

    tops: Tensor
    totals: Tensor
    targets: Tensor
    moments: Tensor | None
    kept: Tensor | None


@triton.jit
def _logits(u, bias, column, vocabulary, cap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """t of half a tile; -inf outside the vocabulary, by addition: a number for each column takes
    fewer registers than a selection for each element.
    """
    if BIAS:
        b = tl.load(bias + column, column < vocabulary, other=0.0)
        u = u + b.to(tl.float32)[None, :]
    if SOFTCAP:
        u = tanh(u * cap)
    return u + tl.where(column < vocabulary, 0.0, float("-inf"))[None, :]


@triton.jit
def _slope(t):
    """``1 - t**2``, and 0 rather than -inf outside the vocabulary."""
    return tl.maximum(1.0 - t * t, 0.0)


@triton.jit(do_not_specialize=["rows", "vocabulary", "width"])
def forward_kernel(
    hidden,
    weight,
    kept,
    bias,
    targets,
    tops,
    totals,
    target_logits,
    moments,
    live,
    rows,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    kept_stride,
    scale,
    cap,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr,
    KEEP: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    LIVE: tl.constexpr,
):
    """One tile of logits, see the module. With LIVE, rows from ``live[0]`` on are not wanted, and
    a tile of such rows ends at once.
    """
    columns = tl.cdiv(vocabulary, TOKENS)
    row_block, tile = grouped(tl.program_id(0), tl.cdiv(rows, ROWS), columns, GROUP)
    row = row_block * ROWS
    token = tile * TOKENS
    if LIVE:
        if row >= tl.load(live):
            return
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for k in range(0, width, DEPTH):
        h = load_block(hidden, row, k, rows, width, hidden_stride, ROWS, DEPTH, DESCRIPTORS)
        w = load_block(
            weight, token, k, vocabulary, width, weight_stride, TOKENS, DEPTH, DESCRIPTORS
        )
        acc = dot(h, w.T, acc)

    HALF: tl.constexpr = TOKENS // 2
    r = row + tl.arange(0, ROWS)
    inside = r < rows
    left_column = token + tl.arange(0, HALF)
    right_column = left_column + HALF
    left, right = halves(acc, ROWS, TOKENS)
    left = _logits(left, bias, left_column, vocabulary, cap, BIAS, SOFTCAP)
    right = _logits(right, bias, right_column, vocabulary, cap, BIAS, SOFTCAP)
    highest = tl.maximum(tl.max(left, 1), tl.max(right, 1))
    m = tl.maximum(highest * scale, LOWEST)

    y = tl.load(targets + r, inside, other=-1)
    here = (y >= token) & (y < token + TOKENS)
    if MOMENTS:
        plain = tl.sum(tl.where((left_column < vocabulary)[None, :], left, 0.0), 1)
        plain += tl.sum(tl.where((right_column < vocabulary)[None, :], right, 0.0), 1)
    found = tl.max(here.to(tl.int32), 0) > 0  # most tiles hold no row's target
    if found:
        own = tl.sum(tl.where(left_column[None, :] == y[:, None], left, 0.0), 1)
        own += tl.sum(tl.where(right_column[None, :] == y[:, None], right, 0.0), 1)
        tl.store(target_logits + r, own, inside & here)
        left = tl.where(left_column[None, :] == y[:, None], float("-inf"), left)

    at = tile.to(tl.int64) * rows + r
    tl.store(tops + at, m, inside)
    x = tl.fma(left, scale, -m[:, None])
    e = tl.exp2(x)
    total = tl.sum(e, 1)
    if MOMENTS:
        weighted = tl.sum(tl.where(e > 0.0, x * e, 0.0), 1)
        squares = tl.sum(e * e, 1)
    if KEEP:
        if SOFTCAP:
            e = e * _slope(left)
        _store_half(kept, row, token, rows, kept_stride, narrow(e, DTYPE), ROWS, HALF, DESCRIPTORS)
    if found:
        right = tl.where(right_column[None, :] == y[:, None], float("-inf"), right)
    x = tl.fma(right, scale, -m[:, None])
    e = tl.exp2(x)
    total += tl.sum(e, 1)
    if MOMENTS:
        weighted += tl.sum(tl.where(e > 0.0, x * e, 0.0), 1)
        squares += tl.sum(e * e, 1)
        step = columns.to(tl.int64) * rows
        tl.store(moments + at, weighted, inside)
        tl.store(moments + step + at, plain, inside)
        tl.store(moments + 2 * step + at, squares, inside)
        tl.store(moments + 3 * step + at, highest, inside)
    if KEEP:
        if SOFTCAP:
            e = e * _slope(right)
        _store_half(
            kept, row, token + HALF, rows, kept_stride, narrow(e, DTYPE), ROWS, HALF, DESCRIPTORS
        )
    tl.store(totals + at, total, inside)


@triton.jit
def _store_half(
    kept,
    row,
    column,
    rows,
    stride,
    values,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Whole tiles are kept, so columns need no mask."""
    if DESCRIPTORS:
        kept.store([row, column], values)
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, HALF)
        tl.store(kept + r.to(tl.int64)[:, None] * stride + c[None, :], values, (r < rows)[:, None])


def kept_width(vocabulary: int, config: Tiles) -> int:
    """Columns of what is kept: whole tiles."""
    return -(-vocabulary // config.tokens) * config.tokens


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    config: Tiles,
    *,
    kept: Tensor | None = None,
    moments: bool = False,
    live: Tensor | None = None,
) -> Partials:
    """Launch the forward product.

    Args:
        hidden: ``(n, H)``; weight: ``(V, H)``, of one dtype, elements of a row side by side.
        bias: ``(V,)`` or None; targets: ``(n,)`` int64.
        kept: ``(n, kept_width)`` to fill in, or None.
        moments: whether to leave what the statistics need.
        live: ``(1,)`` int32: rows from there on are not wanted, and their results are undefined.
    """
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    columns = -(-vocabulary // config.tokens)
    new = hidden.new_empty
    result = Partials(
        tops=new((columns, rows), dtype=torch.float32),
        totals=new((columns, rows), dtype=torch.float32),
        targets=new(rows, dtype=torch.float32),
        moments=new((4, columns, rows), dtype=torch.float32) if moments else None,
        kept=kept,
    )
    if rows == 0:
        return result
    described = config.descriptors and all(
        aligned(m) for m in (hidden, weight, kept) if m is not None
    )
    half = (config.rows, config.tokens // 2)
    forward_kernel[grid(-(-rows // config.rows) * columns)](
        operand(hidden, (config.rows, config.depth), described),
        operand(weight, (config.tokens, config.depth), described),
        hidden if kept is None else operand(kept, half, described),
        targets if bias is None else bias,
        targets,
        result.tops,
        result.totals,
        result.targets,
        result.tops if result.moments is None else result.moments,
        targets if live is None else live,
        rows,
        vocabulary,
        width,
        hidden.stride(0),
        weight.stride(0),
        0 if kept is None else kept.stride(0),
        transform.scale,
        transform.cap,
        ROWS=config.rows,
        TOKENS=config.tokens,
        DEPTH=config.depth,
        GROUP=config.group,
        DESCRIPTORS=described,
        DTYPE=t.DTYPES[hidden.dtype],
        KEEP=kept is not None,
        BIAS=bias is not None,
        SOFTCAP=transform.softcap,
        MOMENTS=moments,
        LIVE=live is not None,
        **config.forward.options(),
    )
    return result


def forward_twin(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    config: Tiles,
    *,
    kept: Tensor | None = None,
    moments: bool = False,
) -> Partials:
    """The same in plain torch, in float64 where it matters."""
    u = hidden.double() @ weight.double().T
    if bias is not None:
        u += bias.double()
    t = torch.tanh(u * transform.cap) if transform.softcap else u
    whole = kept_width(t.shape[1], config)
    padded = t.new_full((len(t), whole), -torch.inf)
    padded[:, : t.shape[1]] = t
    tiled = padded.view(len(t), -1, config.tokens)
    highest = tiled.amax(2)
    m = (highest.float() * transform.scale).clamp_min(-1e30).double()
    others = padded.scatter(1, targets[:, None], -torch.inf).view_as(tiled)
    x = others * transform.scale - m[..., None]
    e = torch.exp2(x)
    if kept is not None:
        slope = (1 - tiled**2).clamp_min(0) if transform.softcap else torch.ones_like(tiled)
        kept.copy_((e * slope).view(len(t), -1))
    of_moments = None
    if moments:
        sums = [
            torch.where(e > 0, x * e, 0.0).sum(2),
            torch.where(tiled.isneginf(), 0.0, tiled).sum(2),
            (e**2).sum(2),
            highest,
        ]
        of_moments = torch.stack(sums).transpose(1, 2).float().contiguous()
    return Partials(
        tops=m.T.float().contiguous(),
        totals=e.sum(2).T.float().contiguous(),
        targets=t.gather(1, targets[:, None]).squeeze(1).float(),
        moments=of_moments,
        kept=kept,
    )
