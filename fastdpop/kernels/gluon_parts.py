"""The parts that run beside one another in :mod:`.gluon_forward`: producer, consumers, epilogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import tiles
from .epilogue import SQUARED

# Renamed in triton 3.9.
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# One source for both kernels.
grouped = gluon.jit(tiles.grouped.fn)
tanh = gluon.jit(tiles.tanh.fn)


def jit(function: Callable[..., Any]) -> Any:
    """:func:`.tiles.jit` for Gluon."""
    return tiles.jit(function, gluon.jit)


@gluon.jit
def halves(x):
    """:func:`.tiles.halves`."""
    shape: gl.constexpr = (x.shape[0], 2, x.shape[1] // 2)
    return gl.split(gl.permute(gl.reshape(x, shape), (0, 2, 1)))


@gluon.jit
def place(program, count, blocks, columns, GROUP_N: gl.constexpr):
    """Row block and column of a tile; beyond the last tile, those of the last."""
    return grouped(gl.minimum(program, count - 1), blocks, columns, GROUP_N)


@gluon.jit
def producer(
    hidden,
    weight,
    h_ring,
    w_ring,
    ready,
    empty,
    count,
    blocks,
    columns,
    width,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copies the operands of every step of every tile to the ring."""
    gl.assume(width > 0)
    step = 0
    for program in range(gl.program_id(0), count, gl.num_programs(0)):
        block, tile = place(program, count, blocks, columns, GROUP_N)
        row = block * BLOCK_N
        token = tile * BLOCK_V
        for k in range(0, width, BLOCK_H):
            stage = step % STAGES
            # A barrier's first phase has parity 0, so the first round finds all stages empty.
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            arrived = ready.index(stage)
            # Boxes are whole in shared memory, whatever of them lies outside the matrix.
            mbarrier.expect(arrived, (BLOCK_N + BLOCK_V) * BLOCK_H * 2)
            load_box(hidden, [row, k], arrived, h_ring.index(2 * stage))
            load_box(hidden, [row + BLOCK_N // 2, k], arrived, h_ring.index(2 * stage + 1))
            load_box(weight, [token, k], arrived, w_ring.index(stage))
            step += 1


@gluon.jit
def quarter(
    u,  # (BLOCK_N / 2, COLUMNS): a quarter of the accumulator
    bias,
    exp_logits,
    staging,
    row,
    token,
    y,  # (BLOCK_N / 2,)
    special,
    shift,  # (BLOCK_N / 2,)
    vocabulary,
    scale,
    cap,
    sums,
    LAYOUT: gl.constexpr,
    KEEP: gl.constexpr,
    BIAS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    STATISTICS: gl.constexpr,
):
    """:func:`.epilogue.quarter`, line by line, but for how E leaves."""
    u = gl.convert_layout(u, LAYOUT, assert_trivial=True)
    own, total, weighted, plain, squares, highest = sums
    column = token + gl.arange(0, u.shape[1], gl.SliceLayout(0, LAYOUT))
    if BIAS:
        at = gl.multiple_of(bias + column, 8)  # the launcher sees to it
        u = u + gl.load(at).to(gl.float32)[None, :]
    if SOFTCAP:
        u = tanh(u * cap)
    if STATISTICS:
        plain += gl.sum(u, 1)
    if special:
        hit = column[None, :] == y[:, None]
        own += gl.sum(gl.where(hit, u, 0.0), 1)
        u = gl.where(hit | (column >= vocabulary)[None, :], float("-inf"), u)
    if STATISTICS:
        highest = gl.maximum(highest, gl.max(u, 1))
    x = gl.fma(u, scale, -shift[:, None])
    e = gl.exp2(x)
    total += gl.sum(e, 1)
    if STATISTICS:
        weighted += gl.sum(gl.maximum(x, -1.0e30) * e, 1)
        small = e * SQUARED
        squares += gl.sum(small * small, 1)
    if KEEP:
        if SOFTCAP:
            e = e * gl.maximum(gl.fma(-u, u, 1.0), 0.0)
        # Two buffers take turns: the store before the last one must have read this one.
        tma.store_wait(1)
        staging.store(e.to(exp_logits.dtype))
        fence_async_shared()
        store_box(exp_logits, [row, token], staging)
    return own, total, weighted, plain, squares, highest


@gluon.jit
def consumer(
    exp_logits,
    h_ring,
    w_ring,
    staging,
    ready,
    empty,
    bias,
    targets,
    shift,
    tile_sumexp,
    target_logit,
    statistics,
    count,
    blocks,
    columns,
    rows,
    vocabulary,
    width,
    scale,
    cap,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_H: gl.constexpr,
    GROUP_N: gl.constexpr,
    STAGES: gl.constexpr,
    LAG: gl.constexpr,
    KEEP: gl.constexpr,
    BIAS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    STATISTICS: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Multiplies the upper half of every tile (WHICH 0) or the lower, and writes its results."""
    gl.assume(width > 0)  # without a way around the loop, products stay in flight in it
    ROWS: gl.constexpr = BLOCK_N // 2
    COLUMNS: gl.constexpr = BLOCK_V // 4
    WHOLE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    QUARTER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, QUARTER)
    step = 0
    block, tile = place(gl.program_id(0), count, blocks, columns, GROUP_N)
    for program in range(gl.program_id(0), count, gl.num_programs(0)):
        row = block * BLOCK_N + WHICH * ROWS
        token = tile * BLOCK_V
        r = row + gl.arange(0, ROWS, OF_ROWS)
        inside = r < rows
        row_shift = gl.load(shift + r, inside, other=0.0)
        y = gl.load(targets + r, inside, other=-1).to(gl.int32)

        # Product.
        acc = gl.zeros((ROWS, BLOCK_V), gl.float32, WHOLE)
        if WHICH == 1 and LAG > 0:
            # Once, before the first step: the other consumer goes ahead.
            mbarrier.wait(ready.index(LAG), 0, pred=(step == 0) & (width > LAG * BLOCK_H))
        for k in range(0, width, BLOCK_H):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            h = h_ring.index(2 * stage + WHICH)
            w = w_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(h, w, acc, is_async=True)
            # The products of the step before have read its stage.
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1

        # While the last products run: what the rows of the tile have beside their logits.
        here = (y >= token) & (y < token + BLOCK_V)
        special = (gl.max(here.to(gl.int32), 0) > 0) | (token + BLOCK_V > vocabulary)
        done = tile
        block, tile = place(program + gl.num_programs(0), count, blocks, columns, GROUP_N)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)

        # The last row block may end above the lower half. (And without a branch, the epilogue would
        # be moved up before the arrival, which would come a thousand instructions later.)
        if row < rows:
            # Exponentials and sums, a quarter at a time.
            zero = gl.zeros((ROWS,), gl.float32, OF_ROWS)
            sums = (zero, zero, zero, zero, zero, zero - float("inf"))
            left, right = halves(acc)
            first, second = halves(left)
            third, fourth = halves(right)
            one, other = staging, staging
            if KEEP:
                one, other = staging.index(2 * WHICH), staging.index(2 * WHICH + 1)
            sums = quarter(
                first, bias, exp_logits, one, row, token, y, special, row_shift, vocabulary,
                scale, cap, sums, QUARTER, KEEP, BIAS, SOFTCAP, STATISTICS,
            )  # fmt: skip
            sums = quarter(
                second, bias, exp_logits, other, row, token + COLUMNS, y, special, row_shift, vocabulary,
                scale, cap, sums, QUARTER, KEEP, BIAS, SOFTCAP, STATISTICS,
            )  # fmt: skip
            sums = quarter(
                third, bias, exp_logits, one, row, token + 2 * COLUMNS, y, special, row_shift, vocabulary,
                scale, cap, sums, QUARTER, KEEP, BIAS, SOFTCAP, STATISTICS,
            )  # fmt: skip
            sums = quarter(
                fourth, bias, exp_logits, other, row, token + 3 * COLUMNS, y, special, row_shift,
                vocabulary, scale, cap, sums, QUARTER, KEEP, BIAS, SOFTCAP, STATISTICS,
            )  # fmt: skip

            # Partial sums of the tile, and its targets' logits.
            own, total, weighted, plain, squares, highest = sums
            at = gl.cast(done, gl.int64) * rows + r
            gl.store(tile_sumexp + at, total, inside)
            if special:
                gl.store(target_logit + r, own, inside & here)
            if STATISTICS:
                plane = gl.cast(columns, gl.int64) * rows
                gl.store(statistics + at, weighted, inside)
                gl.store(statistics + plane + at, plain, inside)
                gl.store(statistics + 2 * plane + at, squares, inside)
                gl.store(statistics + 3 * plane + at, highest, inside)
    if KEEP:
        # Shared memory must outlive what is read from it.
        tma.store_wait(0)
