"""What several kernels share: blocks of operands, products, roundings and a few functions.

A kernel reads its large operands through tensor descriptors (the tensor memory accelerator, TMA)
or through pointers, by one constant: both ways stand here once. In Triton's interpreter, bfloat16
needs help: ``tl.dot`` takes its raw bits for integers, and a conversion from float32 cuts instead
of rounding. `WIDE` is that help, a constant False in every compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config

WIDE = tl.constexpr(config.INTERPRETED)
RECIPROCAL = tl.constexpr(not config.INTERPRETED and torch.version.hip is None)
"""Whether there is PTX's reciprocal."""
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def jit(function: Callable[..., Any], compiler: Any = triton.jit) -> Any:
    """``triton.jit``, or Gluon's, of a kernel that is compiled once for each set of constants.

    Triton would compile another variant where a pointer is aligned or a number is 1 or a multiple
    of 16, so in the middle of a training run, when a batch of another size comes by. What kernels
    need to know of alignment, :func:`aligned` says.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    arguments = [name for name in names if not name.isupper()]
    return compiler(
        function,
        do_not_specialize=arguments,
        do_not_specialize_on_alignment=arguments,
    )


@triton.jit
def grouped(program, blocks, columns, GROUP_N: tl.constexpr):
    """Row block and column of a program: GROUP_N row blocks walk along the columns together, rows
    innermost, so that they share what a column reads.
    """
    first = program // (GROUP_N * columns) * GROUP_N
    size = tl.minimum(blocks - first, GROUP_N)
    within = program % (GROUP_N * columns)
    return first + within % size, within // size


@triton.jit
def pointers(source, row, column, stride):
    """Addresses of ``source[row, column]``, `row` and `column` being vectors, `column` of whole
    runs of 8: see :func:`aligned`. Accesses are 16 bytes wide.
    """
    at = source + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.multiple_of(tl.max_contiguous(at, (1, 8)), (1, 16))


@triton.jit
def before(column, columns):
    """``column < columns`` for multiples of 8, in a form that the compiler knows to be the same for
    runs of 8: or it would load them one by one.
    """
    return column // 8 < columns // 8


@triton.jit
def load_block(
    source,
    row,
    column,
    rows,
    columns,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """``source[row : row + BLOCK_ROWS, column : column + BLOCK_COLUMNS]``, 0 outside; `source` is a
    descriptor or a pointer.
    """
    if USE_TMA:
        return source.load([row, column])
    else:
        r = row + tl.arange(0, BLOCK_ROWS)
        c = column + tl.arange(0, BLOCK_COLUMNS)
        inside = (r < rows)[:, None] & before(c, columns)[None, :]
        return tl.load(pointers(source, r, c, stride), inside, other=0.0)


@triton.jit
def store_block(
    target,
    row,
    column,
    rows,
    columns,
    stride,
    values,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """The inverse of :func:`load_block`. Through a descriptor it needs no address for each element,
    which spares registers.
    """
    if USE_TMA:
        target.store([row, column], values)
    else:
        r = row + tl.arange(0, BLOCK_ROWS)
        c = column + tl.arange(0, BLOCK_COLUMNS)
        inside = (r < rows)[:, None] & before(c, columns)[None, :]
        tl.store(pointers(target, r, c, stride), values, inside)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in float32; float32 operands are never rounded to TF32."""
    if WIDE:
        # In float64, or numpy's result would depend on where in the tile a row stands.
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 rounded to nearest even."""
    if WIDE and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns. A part of a tile at a time, an epilogue of
    128 x 256 stays in registers.
    """
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def tanh(x):
    """``1 - 2 / (1 + e**2x)``, and its series near 0, where that cancels."""
    square = x * x
    p = tl.fma(square, 0.0218694885, -0.05396825396825397)
    p = tl.fma(p, square, 0.13333333333333333)
    p = tl.fma(p, square, -0.3333333333333333)
    series = tl.fma(x, p * square, x)
    e = tl.exp2(x * (2.0 * LOG2E)) + 1.0
    if RECIPROCAL:
        # To one unit in the last place, where a division takes a dozen instructions.
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / e
    return tl.where(square < 0.0625, series, tl.fma(inverse, -2.0, 1.0))


def aligned(tensor: torch.Tensor) -> bool:
    """Whether a matrix can be read through descriptors and in pieces of 16 bytes: elements of a row
    side by side, base and rows at multiples of 16 bytes, a width that is a multiple of 8. The chip
    would not say; so the engine asks first, and gives the kernels a copy otherwise.
    """
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.stride(1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(0) > 0
        and tensor.shape[1] % 8 == 0
    )


def operand(tensor: torch.Tensor, block: tuple[int, int], use_tma: bool) -> object:
    """A matrix as the kernels take it: a descriptor with boxes of `block`, or itself."""
    if not use_tma:
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
