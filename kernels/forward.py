"""The forward product: logits tile by tile, straight into partial sums of the softmax.

Every row i has one reference R_i, known beforehand, in units of log 2. For a tile of rows and
tokens v, with the accumulator ``u = hidden @ weight.T + bias``:

    t = u, or tanh(cap * u) under a softcap
    z = scale * t                               logits in units of log 2
    E[i, v] = 2**(z - R_i)                      0 at the row's target y_i and outside the vocabulary
    tile_sumexp[tile, i] = sum of E over v
    target_logit[i] = t[y_i]                    written by the tile that holds it

and, kept for the gradients of whole groups, ``exp_logits[i, v] = E * dt/du`` without its constant
factor (``1 - t**2`` under a softcap, else 1), rounded once to the products' dtype. With one
reference a row, what is kept is a row of the softmax up to one factor, so the gradients are plain
matrix products. The target stays out of the sums: 1 - p of a token near certainty is then a sum of
small numbers, not a difference of large ones.

R_i is the target's own logit, rounded (:func:`target_logit`): bfloat16 has float32's exponents, and
nothing is lost by not subtracting the maximum, unless the target's probability is below about
2**-90. Rows in which a sum passes `OVERFLOW` go through :func:`repair` once more, with their maximum
for a reference; its launches end at once where there are none.

No atomics: a partial sum has one writer, and :mod:`.combine` adds them up in a fixed order. The
epilogue takes a tile in quarters of its columns, in every variant alike: the same row has the same
bits, whatever else is computed beside it, and accumulators of 128 x 256 stay in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, tiles
from .config import SCAN_ROWS, SMALL, TARGET_ROWS, TARGET_WIDTH, Config
from .tiles import aligned, grid, jit, operand

OVERFLOW = tl.constexpr(2.0**90)
"""A row whose sum passes this is computed again. Far below float32's largest number: dWeight's
operand is divided by the sum, and must not underflow."""

SQUARED = tl.constexpr(2.0**-40)
"""What E is multiplied by before it is squared."""


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
class Forward:
    """What the forward product leaves of n rows.

    Attributes:
        reference: ``(n,)`` float32, R.
        tile_sumexp: ``(tiles of the vocabulary, n)`` float32.
        target_logit: ``(n,)`` float32, t of each row's target.
        statistics: ``(4, tiles, n)`` float32, sums of ``(z - R) E``, of t (target included), and of
            ``(SQUARED * E)**2``, and the largest t beside the target; or None.
        exp_logits: ``(n, whole tiles)`` in the products' dtype, or None.
    """

    reference: Tensor
    tile_sumexp: Tensor
    target_logit: Tensor
    statistics: Tensor | None
    exp_logits: Tensor | None


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


@triton.jit
def _quarter(
    number,
    u,  # (BLOCK_N, COLUMNS): this quarter of the accumulator
    found,
    bias,
    exp_logits,
    row,
    token,
    y,  # (BLOCK_N,)
    reference,  # (BLOCK_N,)
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
    x = tl.fma(u, scale, -reference[:, None])
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


@jit
def forward_kernel(
    hidden,  # (n, H)
    weight,  # (V, H)
    exp_logits,  # (n, tiles * BLOCK_V) or None
    bias,  # (tiles * BLOCK_V,) or None
    targets,  # (n,)
    reference,  # (n,)
    tile_sumexp,  # (tiles, n)
    target_logit,  # (n,)
    statistics,  # (4, tiles, n) or None
    num_active,  # () or None
    rows,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    kept_stride,
    scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    KEEP: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    """One tile of logits, see the module. With ACTIVE, rows from ``num_active`` on are not wanted,
    and a tile of such rows ends at once.
    """
    tl.assume(width > 0)  # without a way around the loop, products stay in flight in it
    tile_count = tl.cdiv(vocabulary, BLOCK_V)
    block, tile = tiles.grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tile_count, GROUP_N)
    row = block * BLOCK_N
    token = tile * BLOCK_V
    if ACTIVE:
        if row >= tl.load(num_active):
            return

    # What the rows have beside their logits is on its way while the product is formed.
    r = row + tl.arange(0, BLOCK_N)
    inside = r < rows
    ref = tl.load(reference + r, inside, other=0.0)
    target = tl.load(targets + r, inside, other=-1)

    # Product.
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, width, BLOCK_H):
        h = tiles.load_block(hidden, row, k, rows, width, hidden_stride, BLOCK_N, BLOCK_H, USE_TMA)
        w = tiles.load_block(
            weight, token, k, vocabulary, width, weight_stride, BLOCK_V, BLOCK_H, USE_TMA
        )
        acc = tiles.dot(h, w.T, acc)

    # How many rows have their target in each quarter, a byte a quarter: BLOCK_N is at most 128.
    y = target.to(tl.int32)
    here = (y >= token) & (y < token + BLOCK_V)
    COLUMNS: tl.constexpr = BLOCK_V // 4
    found = tl.sum(tl.where(here, 1 << (tl.where(here, y - token, 0) // COLUMNS * 8), 0), 0)

    # Exponentials and sums, a quarter at a time.
    zero = tl.zeros((BLOCK_N,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero - float("inf"))
    left, right = tiles.halves(acc, BLOCK_N, BLOCK_V)
    first, second = tiles.halves(left, BLOCK_N, BLOCK_V // 2)
    third, fourth = tiles.halves(right, BLOCK_N, BLOCK_V // 2)
    sums = _quarter(
        0, first, found, bias, exp_logits, row, token, y, ref, rows, vocabulary, kept_stride,
        scale, cap, sums, COLUMNS, BLOCK_N, USE_TMA, KEEP, BIAS, SOFTCAP, STATISTICS,
    )  # fmt: skip
    sums = _quarter(
        1, second, found, bias, exp_logits, row, token, y, ref, rows, vocabulary, kept_stride,
        scale, cap, sums, COLUMNS, BLOCK_N, USE_TMA, KEEP, BIAS, SOFTCAP, STATISTICS,
    )  # fmt: skip
    sums = _quarter(
        2, third, found, bias, exp_logits, row, token, y, ref, rows, vocabulary, kept_stride,
        scale, cap, sums, COLUMNS, BLOCK_N, USE_TMA, KEEP, BIAS, SOFTCAP, STATISTICS,
    )  # fmt: skip
    sums = _quarter(
        3, fourth, found, bias, exp_logits, row, token, y, ref, rows, vocabulary, kept_stride,
        scale, cap, sums, COLUMNS, BLOCK_N, USE_TMA, KEEP, BIAS, SOFTCAP, STATISTICS,
    )  # fmt: skip

    # Partial sums of the tile, and its targets' logits.
    own, total, weighted, plain, squares, highest = sums
    at = tile.to(tl.int64) * rows + r
    tl.store(tile_sumexp + at, total, inside)
    if found != 0:
        tl.store(target_logit + r, own, inside & here)
    if STATISTICS:
        step = tile_count.to(tl.int64) * rows
        tl.store(statistics + at, weighted, inside)
        tl.store(statistics + step + at, plain, inside)
        tl.store(statistics + 2 * step + at, squares, inside)
        tl.store(statistics + 3 * step + at, highest, inside)


@triton.jit
def _overflowed(sumexp, r, inside):
    """Whether rows have to be computed again; written so that a NaN has, too."""
    s = tl.load(sumexp + r, inside, other=0.0)
    return inside & tl.where(s < OVERFLOW, False, True)


@jit
def repair_kernel(
    hidden,  # (n, H)
    weight,  # (V, H)
    exp_logits,  # (n, tiles * TILE), or unused
    bias,  # (tiles * TILE,), or unused
    targets,  # (n,)
    reference,  # (n,)
    tile_sumexp,  # (tiles, n)
    statistics,  # (4, tiles, n), or unused
    tile_maximum,  # (tiles, n)
    sumexp,  # (n,)
    rows,
    vocabulary,
    width,
    hidden_stride,
    weight_stride,
    kept_stride,
    scale,
    cap,
    stage,
    keep,
    has_bias,
    has_softcap,
    has_statistics,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Rows whose sum overflowed, once more. Stage 0 writes the largest z of each tile beside the
    target, stage 1 takes the row's largest for its reference and writes what the forward product
    would have.

    As many programs as the chip has multiprocessors share the tiles. Options are arguments, not
    constants: one compiled kernel serves all variants, and nobody waits for it twice.
    """
    any_row = 0
    for first in range(0, rows, SCAN):
        r = first + tl.arange(0, SCAN)
        any_row += tl.sum(_overflowed(sumexp, r, r < rows).to(tl.int32), 0)
    if any_row == 0:
        return
    tile_count = tl.cdiv(vocabulary, TILE)
    for row in range(0, rows, BLOCK_N):
        r = row + tl.arange(0, BLOCK_N)
        wanted = _overflowed(sumexp, r, r < rows)
        if tl.sum(wanted.to(tl.int32), 0) > 0:
            y = tl.load(targets + r, wanted, other=-1).to(tl.int32)
            ref = tl.zeros((BLOCK_N,), tl.float32)
            if stage == 1:
                ref = tl.full((BLOCK_N,), float("-inf"), tl.float32)
                for tile in range(0, tile_count):
                    at = tl.cast(tile, tl.int64) * rows + r
                    ref = tl.maximum(ref, tl.load(tile_maximum + at, wanted, other=0.0))
                ref = tl.ceil(ref)
                if tl.program_id(0) == 0:
                    tl.store(reference + r, ref, wanted)
            for tile in range(tl.program_id(0), tile_count, tl.num_programs(0)):
                highest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
                total = tl.zeros((BLOCK_N,), tl.float32)
                weighted = tl.zeros((BLOCK_N,), tl.float32)
                plain = tl.zeros((BLOCK_N,), tl.float32)
                squares = tl.zeros((BLOCK_N,), tl.float32)
                for part in range(0, TILE, BLOCK_V):
                    token = tile * TILE + part
                    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
                    for k in range(0, width, BLOCK_H):
                        h = tiles.load_block(
                            hidden, row, k, rows, width, hidden_stride,
                            BLOCK_N, BLOCK_H, False,
                        )  # fmt: skip
                        w = tiles.load_block(
                            weight, token, k, vocabulary, width, weight_stride,
                            BLOCK_V, BLOCK_H, False,
                        )  # fmt: skip
                        acc = tiles.dot(h, w.T, acc)
                    column = token + tl.arange(0, BLOCK_V)
                    u = acc
                    if has_bias != 0:
                        u = u + tl.load(bias + column).to(tl.float32)[None, :]
                    if has_softcap != 0:
                        u = tiles.tanh(u * cap)
                    plain += tl.sum(u, 1)
                    left_out = (column[None, :] == y[:, None]) | (column >= vocabulary)[None, :]
                    u = tl.where(left_out, float("-inf"), u)
                    highest = tl.maximum(highest, tl.max(u, 1))
                    x = tl.fma(u, scale, -ref[:, None])
                    e = tl.exp2(x)
                    total += tl.sum(e, 1)
                    weighted += tl.sum(tl.maximum(x, -1.0e30) * e, 1)
                    small = e * SQUARED
                    squares += tl.sum(small * small, 1)
                    if (stage == 1) & (keep != 0):
                        if has_softcap != 0:
                            e = e * tl.maximum(tl.fma(-u, u, 1.0), 0.0)
                        tl.store(
                            tiles.pointers(exp_logits, r, column, kept_stride),
                            tiles.narrow(e, exp_logits.dtype.element_ty),
                            wanted[:, None],
                        )
                at = tl.cast(tile, tl.int64) * rows + r
                if stage == 0:
                    tl.store(tile_maximum + at, highest * scale, wanted)
                else:
                    tl.store(tile_sumexp + at, total, wanted)
                    if has_statistics != 0:
                        step = tl.cast(tile_count, tl.int64) * rows
                        tl.store(statistics + at, weighted, wanted)
                        tl.store(statistics + step + at, plain, wanted)
                        tl.store(statistics + 2 * step + at, squares, wanted)
                        tl.store(statistics + 3 * step + at, highest, wanted)


def kept_width(vocabulary: int, of: Config) -> int:
    """Columns of `exp_logits`: whole tiles."""
    return -(-vocabulary // of.forward.v) * of.forward.v


def padded_bias(bias: Tensor, of: Config) -> Tensor:
    """A copy of ``(V,)`` in whole tiles, 0 outside: aligned, as the kernels take for granted."""
    padded = bias.new_zeros(kept_width(len(bias), of))
    padded[: len(bias)] = bias
    return padded


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
    :func:`forward`. Rounded to a whole number it is a row's reference.
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


def new_results(
    reference: Tensor, vocabulary: int, of: Config, exp_logits: Tensor | None, statistics: bool
) -> Forward:
    """Memory for what a forward product leaves, to be filled in; the last two as for
    :func:`forward`.
    """
    tile_count, rows = -(-vocabulary // of.forward.v), len(reference)
    new = reference.new_empty
    return Forward(
        reference=reference,
        tile_sumexp=new((tile_count, rows)),
        target_logit=new(rows),
        statistics=new((4, tile_count, rows)) if statistics else None,
        exp_logits=exp_logits,
    )


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    reference: Tensor,
    transform: Transform,
    of: Config,
    *,
    exp_logits: Tensor | None = None,
    statistics: bool = False,
    num_active: Tensor | None = None,
) -> Forward:
    """Launch the forward product.

    Args:
        hidden: ``(n, H)``; weight: ``(V, H)``, of one dtype, :func:`.tiles.aligned`.
        bias: ``(whole tiles,)``, see :func:`padded_bias`, or None; targets: ``(n,)`` int64.
        reference: ``(n,)`` float32.
        exp_logits: ``(n, kept_width)`` to fill in, or None.
        statistics: whether to leave what the statistics need.
        num_active: ``()`` int32: rows from there on are not wanted, and their results are
            undefined.
    """
    blocks = of.forward
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    result = new_results(reference, vocabulary, of, exp_logits, statistics)
    tile_count = len(result.tile_sumexp)
    if rows == 0:
        return result
    assert all(aligned(m) for m in (hidden, weight, exp_logits) if m is not None)
    assert bias is None or bias.data_ptr() % 16 == 0
    quarter = (blocks.n, blocks.v // 4)
    forward_kernel[grid(-(-rows // blocks.n) * tile_count)](
        operand(hidden, (blocks.n, blocks.h), of.use_tma),
        operand(weight, (blocks.v, blocks.h), of.use_tma),
        None if exp_logits is None else operand(exp_logits, quarter, of.use_tma),
        bias,
        targets,
        reference,
        result.tile_sumexp,
        result.target_logit,
        result.statistics,
        num_active,
        rows,
        vocabulary,
        width,
        hidden.stride(0),
        weight.stride(0),
        0 if exp_logits is None else exp_logits.stride(0),
        transform.scale,
        transform.cap,
        **blocks.constants,
        GROUP_N=of.group_n,
        USE_TMA=of.use_tma,
        KEEP=exp_logits is not None,
        BIAS=bias is not None,
        SOFTCAP=transform.softcap,
        STATISTICS=statistics,
        ACTIVE=num_active is not None,
        **blocks.launch.options(),
    )
    return result


def repair(
    done: Forward,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Transform,
    of: Config,
    sumexp: Tensor,
) -> None:
    """Launch the repair of rows whose `sumexp` ``(n,)``, as combined, overflowed: changes all that
    `done` holds of them, their reference included. Two launches, which end at once where there are
    none; the combination has to follow once more.
    """
    rows, width = hidden.shape
    if rows == 0:
        return
    tile_maximum = torch.empty_like(done.tile_sumexp)
    kept = done.exp_logits
    for stage in (0, 1):
        repair_kernel[grid(config.processors(hidden.device))](
            hidden,
            weight,
            hidden if kept is None else kept,
            # Of the same types, used or not.
            hidden if bias is None else bias,
            targets,
            done.reference,
            done.tile_sumexp,
            done.tile_sumexp if done.statistics is None else done.statistics,
            tile_maximum,
            sumexp,
            rows,
            weight.shape[0],
            width,
            hidden.stride(0),
            weight.stride(0),
            0 if kept is None else kept.stride(0),
            transform.scale,
            transform.cap,
            stage,
            int(kept is not None),
            int(bias is not None),
            int(transform.softcap),
            int(done.statistics is not None),
            TILE=of.forward.v,
            **of.repair.constants,
            SCAN=SCAN_ROWS,
            **of.repair.launch.options(),
        )


def forward_naive(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    reference: Tensor,
    transform: Transform,
    of: Config,
    *,
    exp_logits: Tensor | None = None,
    statistics: bool = False,
) -> Forward:
    """The same in plain torch and float64."""
    vocabulary = weight.shape[0]
    u = hidden.double() @ weight.double().T
    if bias is not None:
        u += bias[:vocabulary].double()
    t = torch.tanh(u * transform.cap) if transform.softcap else u
    whole = kept_width(vocabulary, of)
    padded = t.new_full((len(t), whole), -torch.inf)
    padded[:, :vocabulary] = t
    others = padded.scatter(1, targets[:, None], -torch.inf)
    x = others * transform.scale - reference.double()[:, None]
    e = torch.exp2(x)

    def tiled(m: Tensor) -> Tensor:
        return m.view(len(t), -1, of.forward.v)

    if exp_logits is not None:
        slope = (1 - padded**2).clamp_min(0) if transform.softcap else torch.ones_like(padded)
        exp_logits.copy_(e * slope)
    found = None
    if statistics:
        sums = [
            tiled(torch.where(e > 0, x * e, 0.0)).sum(2),
            tiled(torch.where(padded.isneginf(), 0.0, padded)).sum(2),
            tiled((e * 2.0**-40) ** 2).sum(2),
            tiled(others).amax(2),
        ]
        found = torch.stack(sums).transpose(1, 2).float().contiguous()
    return Forward(
        reference=reference,
        tile_sumexp=tiled(e).sum(2).T.float().contiguous(),
        target_logit=t.gather(1, targets[:, None]).squeeze(1).float(),
        statistics=found,
        exp_logits=exp_logits,
    )
