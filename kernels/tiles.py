"""What several kernels share: blocks of operands, products, roundings and a few functions.

A kernel reads its large operands through tensor descriptors or through pointers, by one constant:
both ways stand here once. In Triton's interpreter, bfloat16 needs help: ``tl.dot`` and products
take its raw bits for integers, and a conversion from float32 cuts instead of rounding. `WIDE` is
that help, a constant False in every compiled kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config

WIDE = tl.constexpr(config.INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)
"""The maximum, in units of log 2, of a tile in which every token is masked: finite, so that nothing becomes NaN."""

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def grouped(program, blocks, columns, GROUP: tl.constexpr):
    """Row block and column of a program: GROUP row blocks walk along the columns together, rows
    innermost, so that they share what a column reads.
    """
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % size, within // size


@triton.jit
def load_block(
    source,
    row,
    column,
    rows,
    columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """``source[row : row + ROWS, column : column + COLUMNS]``, 0 outside; `source` is a descriptor
    or a pointer.
    """
    if DESCRIPTORS:
        return source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        return tl.load(source + r.to(tl.int64)[:, None] * stride + c[None, :], inside, other=0.0)


@triton.jit
def store_block(
    target,
    row,
    column,
    rows,
    columns,
    values,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The inverse of :func:`load_block`, into rows that lie side by side. Through a descriptor it
    needs no address for each element, which spares registers.
    """
    if DESCRIPTORS:
        target.store([row, column], values)
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        tl.store(target + r.to(tl.int64)[:, None] * columns + c[None, :], values, inside)


@triton.jit
def dot(a, b, total):
    """``total + a @ b`` in float32; float32 operands are never rounded to TF32."""
    if WIDE:
        # In float64, or numpy's result would depend on where in the tile a row stands.
        return total + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(
            tl.float32
        )
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 rounded to nearest even."""
    if WIDE and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def rescaled(x, factor):
    """``x * factor`` row by row, formed in float32 and rounded once."""
    return narrow(x.to(tl.float32) * factor[:, None], x.dtype)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns. Half a tile at a time, an epilogue of
    128 x 256 stays in registers.
    """
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def tanh(x):
    """By exponentials, and by its series near 0, where those cancel."""
    square = x * x
    series = x + x * square * (
        -0.3333333333333333
        + square * (0.13333333333333333 + square * (-0.05396825396825397 + square * 0.0218694885))
    )
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.0625, series, tl.where(x < 0.0, -size, size))


def aligned(tensor: torch.Tensor) -> bool:
    """Whether a matrix can be read through a tensor descriptor: 16-byte aligned base and rows,
    elements side by side. The chip would not say; so the launchers ask first.
    """
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.stride(1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(0) > 0
    )


def operand(tensor: torch.Tensor, block: tuple[int, int], descriptors: bool) -> object:
    """A matrix as the kernels take it: a descriptor with boxes of `block`, or itself."""
    if not descriptors:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def grid(programs: int) -> tuple[int]:
    """A grid of that many programs.

    Raises:
        ValueError: there are more than a launch can have.
    """
    if programs > config.MOST_PROGRAMS:
        raise ValueError(
            f"{programs} tiles exceed the {config.MOST_PROGRAMS} programs of a launch: "
            "use a smaller workspace_bytes"
        )
    return (programs,)
