"""Rows whose partial sums overflowed, computed once more with their largest logit as the shift."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, tiles
from .config import SCAN_ROWS, Config
from .epilogue import SQUARED
from .forward import Forward, Transform
from .tiles import grid, jit

OVERFLOW = tl.constexpr(2.0**90)
"""A row whose sum passes this is computed again. Far below float32's largest number: dWeight's
operand is divided by the sum, and must not underflow."""


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
    shift,  # (n,)
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
    target, stage 1 takes the row's largest for its shift and writes what the forward product
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
            row_shift = tl.zeros((BLOCK_N,), tl.float32)
            if stage == 1:
                row_shift = tl.full((BLOCK_N,), float("-inf"), tl.float32)
                for tile in range(0, tile_count):
                    at = tl.cast(tile, tl.int64) * rows + r
                    row_shift = tl.maximum(row_shift, tl.load(tile_maximum + at, wanted, other=0.0))
                row_shift = tl.ceil(row_shift)
                if tl.program_id(0) == 0:
                    tl.store(shift + r, row_shift, wanted)
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
                    x = tl.fma(u, scale, -row_shift[:, None])
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
    `done` holds of them, their shift included. Two launches, which end at once where there are
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
            done.shift,
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
