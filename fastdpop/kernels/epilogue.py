"""The epilogue of the forward product, a quarter of a tile's columns at a time; see :mod:`.forward`.

:mod:`.gluon_parts` has the same statements in Gluon, and a test compares them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles

SQUARED = tl.constexpr(2.0**-40)
"""What E is multiplied by before it is squared."""


@triton.jit
def quarter(
    number,
    u,  # (BLOCK_N, COLUMNS): this quarter of the accumulator
    found,
    bias,
    exp_logits,
    row,
    token,
    y,  # (BLOCK_N,)
    shift,  # (BLOCK_N,)
    rows,
    vocabulary,
    kept_stride,
    scale,
    cap,
    sums,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    KEEP: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """The epilogue of a quarter: adds to `sums` and stores what is kept.

    Everything that compares columns stands under one uniform condition: the quarter holds a row's
    target or the end of the vocabulary. Bias is padded to whole tiles, and u is 0 there.
    """
    own, total, weighted, plain, squares, highest = sums
    first = token + number * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    special = (((found >> (8 * number)) & 0xFF) != 0) | (first + COLUMNS > vocabulary)
    if BIAS:
        at = tl.multiple_of(tl.max_contiguous(bias + column, 8), 16)
        u = u + tl.load(at).to(tl.float32)[None, :]
    if SOFTCAP:
        u = tiles.tanh(u * cap)
    if STATISTICS:
        plain += tl.sum(u, 1)
    if special:
        hit = column[None, :] == y[:, None]
        own += tl.sum(tl.where(hit, u, 0.0), 1)
        u = tl.where(hit | (column >= vocabulary)[None, :], float("-inf"), u)
    if STATISTICS:
        highest = tl.maximum(highest, tl.max(u, 1))
    x = tl.fma(u, scale, -shift[:, None])
    e = tl.exp2(x)
    total += tl.sum(e, 1)
    if STATISTICS:
        weighted += tl.sum(tl.maximum(x, -1.0e30) * e, 1)
        small = e * SQUARED
        squares += tl.sum(small * small, 1)
    if KEEP:
        if SOFTCAP:
            e = e * tl.maximum(tl.fma(-u, u, 1.0), 0.0)
        e = tiles.narrow(e, exp_logits.dtype if USE_TMA else exp_logits.dtype.element_ty)
        tiles.store_block(
            exp_logits, row, first, rows, kept_stride, kept_stride, e, BLOCK_N, COLUMNS, USE_TMA
        )
    return own, total, weighted, plain, squares, highest
