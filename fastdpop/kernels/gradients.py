"""Gradients from what the forward product kept.

``exp_logits`` is, row by row, the derivative of the log-prob up to a factor (see :mod:`.combine`):

    d logp_i / d u_iv = -slope * row_scale_i * exp_logits[i, v]

so with ``factor_i = -slope * row_scale_i * dlogp_i`` the gradients are plain matrix products,

    dHidden_i = factor_i * (exp_logits @ weight)_i
    dWeight   = exp_logits.T @ (factor * hidden)

Nothing is rounded twice: an entry of ``exp_logits`` once, and ``factor * hidden`` once, both to the
products' dtype; sums are float32. cuBLAS forms them of bfloat16. The kernels here do what it can't:

- float32 in IEEE arithmetic, whatever PyTorch's TF32 settings are;
- float16, whose exponents do not hold every ``factor * hidden``: it is divided by a power of 2 that
  only the device knows, and dWeight is multiplied by it before it is added;
- rows whose ``dlogp`` is 0, sorted to the end: `num_active` counts the others on the device, and
  tiles of rows from there on end at once, as sums over rows do.

Operands come from shared memory as they are: no product waits for registers to be rewritten.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from . import tiles
from .config import BIAS_ROWS, BIAS_TOKENS, INTERPRETED, SMALL, Config
from .tiles import DTYPES, aligned, grid, jit, operand


@jit
def dhidden_kernel(
    exp_logits,  # (n, whole tiles)
    weight,  # (V, H)
    out,  # (n, H)
    factor,  # (n,)
    num_active,  # () or None
    rows,
    vocabulary,
    width,
    kept_stride,
    weight_stride,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    DTYPE: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    """A tile of dHidden, BLOCK_N rows by BLOCK_H columns."""
    tl.assume(vocabulary > 0)
    block, column = tiles.grouped(
        tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.cdiv(width, BLOCK_H), GROUP_N
    )
    row = block * BLOCK_N
    if ACTIVE:
        if row >= tl.load(num_active):
            return
    first = column * BLOCK_H
    r = row + tl.arange(0, BLOCK_N)
    f = tl.load(factor + r, r < rows, other=0.0)[:, None]

    # Product.
    acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for v in range(0, vocabulary, BLOCK_V):
        e = tiles.load_block(
            exp_logits, row, v, rows, kept_stride, kept_stride, BLOCK_N, BLOCK_V, USE_TMA
        )
        w = tiles.load_block(
            weight, v, first, vocabulary, width, weight_stride, BLOCK_V, BLOCK_H, USE_TMA
        )
        acc = tiles.dot(e, w, acc)

    # Scaled, and stored half by half. Rows that are not wanted may hold anything: 0 times NaN is
    # not 0.
    HALF: tl.constexpr = BLOCK_H // 2
    left, right = tiles.halves(acc, BLOCK_N, BLOCK_H)
    left = tiles.narrow(tl.where(f == 0.0, 0.0, left * f), DTYPE)
    right = tiles.narrow(tl.where(f == 0.0, 0.0, right * f), DTYPE)
    tiles.store_block(out, row, first, rows, width, out_stride, left, BLOCK_N, HALF, USE_TMA)
    tiles.store_block(
        out, row, first + HALF, rows, width, out_stride, right, BLOCK_N, HALF, USE_TMA
    )


@jit
def dweight_kernel(
    exp_logits,  # (n, whole tiles)
    scaled,  # (n, H): factor * hidden / unit
    out,  # (V, H)
    unit,  # ()
    num_active,  # () or None
    rows,
    vocabulary,
    width,
    kept_stride,
    scaled_stride,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    """A tile of dWeight, BLOCK_V tokens by BLOCK_H columns; one program writes it, so with
    ACCUMULATE it reads what earlier chunks left there: the order of additions is that of the chunks.
    """
    block, column = tiles.grouped(
        tl.program_id(0), tl.cdiv(vocabulary, BLOCK_V), tl.cdiv(width, BLOCK_H), GROUP_N
    )
    token = block * BLOCK_V
    first = column * BLOCK_H
    stop = rows
    if ACTIVE:
        stop = tl.load(num_active)
    # At least one step: around a loop that might not run, the compiler waits for each product.
    steps = tl.maximum(stop, 1)
    tl.assume(steps > 0)
    gain = tl.load(unit)

    # Product.
    acc = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    for row in range(0, steps, BLOCK_N):
        e = tiles.load_block(
            exp_logits, row, token, rows, kept_stride, kept_stride, BLOCK_N, BLOCK_V, USE_TMA
        )
        h = tiles.load_block(
            scaled, row, first, rows, width, scaled_stride, BLOCK_N, BLOCK_H, USE_TMA
        )
        acc = tiles.dot(e.T, h, acc)

    # Scaled, added to what is there, and stored half by half.
    acc = tl.where(stop > 0, acc * gain, 0.0)
    HALF: tl.constexpr = BLOCK_H // 2
    left, right = tiles.halves(acc, BLOCK_V, BLOCK_H)
    if ACCUMULATE:
        left += tiles.load_block(
            out, token, first, vocabulary, width, out_stride, BLOCK_V, HALF, USE_TMA
        )
    tiles.store_block(
        out, token, first, vocabulary, width, out_stride, left, BLOCK_V, HALF, USE_TMA
    )
    middle = first + HALF
    if ACCUMULATE:
        right += tiles.load_block(
            out, token, middle, vocabulary, width, out_stride, BLOCK_V, HALF, USE_TMA
        )
    tiles.store_block(
        out, token, middle, vocabulary, width, out_stride, right, BLOCK_V, HALF, USE_TMA
    )


@jit
def dbias_kernel(
    exp_logits,  # (n, whole tiles)
    factor,  # (n,)
    out,  # (V,)
    rows,
    vocabulary,
    kept_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """dBias of BLOCK_V tokens: the sum of ``factor * exp_logits`` in the order of the rows."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, rows, BLOCK_N):
        r = first + tl.arange(0, BLOCK_N)
        f = tl.load(factor + r, r < rows, other=0.0)[:, None]
        e = tl.load(tiles.pointers(exp_logits, r, v, kept_stride), f != 0.0, other=0.0)
        total += tl.sum(e.to(tl.float32) * f, 0)
    if ACCUMULATE:
        total += tl.load(out + v, v < vocabulary, other=0.0)
    tl.store(out + v, total, v < vocabulary)


def factors(dlogp: Tensor, row_scale: Tensor, slope: float) -> Tensor:
    """``(n,)`` float32 factor of each row, 0 where `dlogp` is, whatever else is known of the row."""
    return torch.where(dlogp == 0, 0.0, dlogp * row_scale * -slope)


def by_cublas(dtype: torch.dtype, num_active: Tensor | None) -> bool:
    """Whether cuBLAS forms the products."""
    return dtype == torch.bfloat16 and num_active is None


def hidden_gradient(
    exp_logits: Tensor,
    weight: Tensor,
    factor: Tensor,
    out: Tensor,
    of: Config,
    *,
    num_active: Tensor | None = None,
    cublas: bool,
) -> None:
    """dHidden of n rows into `out` ``(n, H)``, or the derivative of their log-probs where `factor`
    ``(n,)`` leaves `dlogp` out.

    With `num_active`, rows from there on are written only where they share a tile with rows before.
    """
    rows, (vocabulary, width) = len(factor), weight.shape
    if rows == 0:
        return
    if cublas:
        product = _mm(exp_logits[:, :vocabulary], weight, out if out.is_contiguous() else None)
        torch.mul(product, factor[:, None], out=out)
        return
    blocks = of.dhidden
    assert aligned(exp_logits)
    assert aligned(weight)
    assert aligned(out)
    dhidden_kernel[grid(-(-rows // blocks.n) * -(-width // blocks.h))](
        operand(exp_logits, (blocks.n, blocks.v), of.use_tma),
        operand(weight, (blocks.v, blocks.h), of.use_tma),
        operand(out, (blocks.n, blocks.h // 2), of.use_tma),
        factor,
        num_active,
        rows,
        vocabulary,
        width,
        exp_logits.stride(0),
        weight.stride(0),
        out.stride(0),
        **blocks.constants,
        GROUP_N=of.group_n,
        USE_TMA=of.use_tma,
        DTYPE=DTYPES[out.dtype],
        ACTIVE=num_active is not None,
        **blocks.launch.options(),
    )


def weight_gradient(
    exp_logits: Tensor,
    hidden: Tensor,
    factor: Tensor,
    out: Tensor,
    of: Config,
    *,
    accumulate: bool,
    num_active: Tensor | None = None,
    cublas: bool,
) -> None:
    """dWeight of n rows over `out` ``(V, H)`` float32, or added to it."""
    vocabulary, width = out.shape
    rows = len(hidden)
    unit = factor.new_ones(())
    if hidden.dtype == torch.float16:
        peak = factor.abs().amax()
        power = torch.where(peak > 0, peak.clamp_min(2.0**-126).log2().ceil(), 0.0)
        unit = torch.exp2(power)
        # A division by a power of 2 rounds nothing, and this one is the multiplication's inverse.
        factor = factor / unit
    scaled = torch.mul(hidden, factor[:, None], out=torch.empty_like(hidden))
    if cublas:
        assert hidden.dtype == torch.bfloat16, "nothing would multiply by the unit"
        _addmm(exp_logits[:, :vocabulary].T, scaled, out, accumulate)
        return
    blocks = of.dweight
    assert aligned(exp_logits)
    assert aligned(scaled)
    assert aligned(out)
    dweight_kernel[grid(-(-vocabulary // blocks.v) * -(-width // blocks.h))](
        operand(exp_logits, (blocks.n, blocks.v), of.use_tma),
        operand(scaled, (blocks.n, blocks.h), of.use_tma),
        operand(out, (blocks.v, blocks.h // 2), of.use_tma),
        unit,
        num_active,
        rows,
        vocabulary,
        width,
        exp_logits.stride(0),
        scaled.stride(0),
        out.stride(0),
        **blocks.constants,
        GROUP_N=of.group_n,
        USE_TMA=of.use_tma,
        ACCUMULATE=accumulate,
        ACTIVE=num_active is not None,
        **blocks.launch.options(),
    )


def bias_gradient(exp_logits: Tensor, factor: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """dBias of n rows over `out` ``(V,)`` float32, or added to it; rows of factor 0 are not read."""
    dbias_kernel[grid(-(-len(out) // BIAS_TOKENS))](
        exp_logits,
        factor,
        out,
        len(factor),
        len(out),
        exp_logits.stride(0),
        BLOCK_N=BIAS_ROWS,
        BLOCK_V=BIAS_TOKENS,
        ACCUMULATE=accumulate,
        **SMALL.options(),
    )


def _mm(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """``a @ b`` in float32, into `out` if that is float32; in the interpreter by plain torch."""
    if INTERPRETED:
        return a.float() @ b.float()
    if out is not None and out.dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32)


def _addmm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """``a @ b`` over `out` float32 or added to it, without a temporary."""
    if INTERPRETED:
        product = a.float() @ b.float()
        out.copy_(out + product if accumulate else product)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def gradients_naive(
    exp_logits: Tensor, hidden: Tensor, weight: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dHidden, dWeight and dBias in plain torch and float64."""
    e, f = exp_logits[:, : len(weight)].double(), factor.double()[:, None]
    return f * (e @ weight.double()), e.T @ (f * hidden.double()), (f * e).sum(0)
