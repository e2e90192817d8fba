"""The logit of each row's target: rounded, it is the row's shift in :mod:`.forward`."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from . import tiles
from .config import SMALL, TARGET_ROWS, TARGET_WIDTH
from .forward import Transform
from .tiles import grid, jit


@jit
def target_logit_kernel(
    hidden,  # (n, H)
    weight,  # (V, H)
    bias,  # (V,) or None
    targets,  # (n,)
    out,  # (n,)
    rows,
    width,
    hidden_stride,
    weight_stride,
    scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROUNDED: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """z of each row's target, rounded to a whole number or not: a gather and a dot product."""
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = r < rows
    y = tl.load(targets + r, inside, other=0)
    acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for k in range(0, width, BLOCK_H):
        column = k + tl.arange(0, BLOCK_H)
        there = inside[:, None] & tiles.before(column, width)[None, :]
        h = tl.load(tiles.pointers(hidden, r, column, hidden_stride), there, other=0.0)
        w = tl.load(tiles.pointers(weight, y, column, weight_stride), there, other=0.0)
        acc += h.to(tl.float32) * w.to(tl.float32)
    u = tl.sum(acc, 1)
    if BIAS:
        u += tl.load(bias + y, inside, other=0.0).to(tl.float32)
    if SOFTCAP:
        u = tiles.tanh(u * cap)
    z = u * scale
    if ROUNDED:
        z = tl.floor(z + 0.5)
    tl.store(out + r, z, inside)


def target_logit(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    *,
    rounded: bool = True,
) -> Tensor:
    """z of each row's target, ``(n,)`` float32, in units of log 2; arguments as for
    :func:`forward`. Rounded to a whole number it is a row's shift.
    """
    rows, width = hidden.shape
    out = hidden.new_empty(rows, dtype=torch.float32)
    if rows:
        target_logit_kernel[grid(-(-rows // TARGET_ROWS))](
            hidden,
            weight,
            bias,
            targets,
            out,
            rows,
            width,
            hidden.stride(0),
            weight.stride(0),
            transform.scale,
            transform.cap,
            BLOCK_N=TARGET_ROWS,
            BLOCK_H=TARGET_WIDTH,
            ROUNDED=rounded,
            BIAS=bias is not None,
            SOFTCAP=transform.softcap,
            **SMALL.options(),
        )
    return out
