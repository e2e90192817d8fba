"""The forward product of Hopper, warp-specialised: what :func:`.forward.forward_kernel` does, with
the tensor cores busy through the epilogues. In Gluon, for operands of 16 bits.

As many programs as the chip has multiprocessors share the tiles. In each of them three parts run
beside one another:

* the **producer**, one warp, copies operands to a ring of STAGES stages in shared memory: the
  hidden states of either consumer, and the weight that both read;
* two **consumers** of four warps multiply 64 rows of a tile each, and turn them into exponentials
  and sums. Neither waits for the other: while one is in its epilogue, the other multiplies. They
  start LAG steps apart, so as not to reach their epilogues together.

Two barriers a stage keep them in order: `ready` turns when the bytes of a stage have landed,
`empty` when both consumers have read it. tests/kernels/pipeline_model.py goes through every order
of events.

Results are those of the plain kernel, bit for bit: the same products in the same order, the same
quarters of the columns, and sums over the same registers of the same lanes. What cannot be
described to the tensor memory accelerator goes to the plain kernel; :func:`supported` says so.

Found by compiling: nothing spills, as long as all that compares columns stands under one uniform
branch, the epilogue stands under another, and a softcap comes with a bias, of zeros if need be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import config, tiles
from .config import Config
from .forward import SQUARED, Forward, Transform, kept_width, new_results

STAGES, LAG = 4, 1
"""Stages of the ring, and steps between the consumers' starts: fewer than the stages."""

WARPS, REGISTERS = 4, 168
"""Warps of a consumer, and registers of a thread before they are shared out anew."""

BLOCKS = (128, 256, 64)
"""The one tile that is known to fit: rows, tokens, and columns of the hidden states at a time."""

MOST_TILES = 2**30
"""Tiles are counted in 32 bits, one round of the programs beyond the last one included."""

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
def _halves(x):
    """:func:`.tiles.halves`."""
    shape: gl.constexpr = (x.shape[0], 2, x.shape[1] // 2)
    return gl.split(gl.permute(gl.reshape(x, shape), (0, 2, 1)))


@gluon.jit
def _place(program, count, blocks, columns, GROUP_N: gl.constexpr):
    """Row block and column of a tile; beyond the last tile, those of the last."""
    return grouped(gl.minimum(program, count - 1), blocks, columns, GROUP_N)


@gluon.jit
def _producer(
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
        block, tile = _place(program, count, blocks, columns, GROUP_N)
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
def _quarter(
    u,  # (BLOCK_N / 2, COLUMNS): a quarter of the accumulator
    bias,
    exp_logits,
    staging,
    row,
    token,
    y,  # (BLOCK_N / 2,)
    special,
    reference,  # (BLOCK_N / 2,)
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
    """:func:`.forward._quarter`, line by line, but for how E leaves."""
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
    x = gl.fma(u, scale, -reference[:, None])
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
def _consumer(
    exp_logits,
    h_ring,
    w_ring,
    staging,
    ready,
    empty,
    bias,
    targets,
    reference,
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
    block, tile = _place(gl.program_id(0), count, blocks, columns, GROUP_N)
    for program in range(gl.program_id(0), count, gl.num_programs(0)):
        row = block * BLOCK_N + WHICH * ROWS
        token = tile * BLOCK_V
        r = row + gl.arange(0, ROWS, OF_ROWS)
        inside = r < rows
        ref = gl.load(reference + r, inside, other=0.0)
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
        block, tile = _place(program + gl.num_programs(0), count, blocks, columns, GROUP_N)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)

        # The last row block may end above the lower half. (And without a branch, the epilogue would
        # be moved up before the arrival, which would come a thousand instructions later.)
        if row < rows:
            # Exponentials and sums, a quarter at a time.
            zero = gl.zeros((ROWS,), gl.float32, OF_ROWS)
            sums = (zero, zero, zero, zero, zero, zero - float("inf"))
            left, right = _halves(acc)
            first, second = _halves(left)
            third, fourth = _halves(right)
            one, other = staging, staging
            if KEEP:
                one, other = staging.index(2 * WHICH), staging.index(2 * WHICH + 1)
            sums = _quarter(
                first, bias, exp_logits, one, row, token, y, special, ref, vocabulary,
                scale, cap, sums, QUARTER, KEEP, BIAS, SOFTCAP, STATISTICS,
            )  # fmt: skip
            sums = _quarter(
                second, bias, exp_logits, other, row, token + COLUMNS, y, special, ref, vocabulary,
                scale, cap, sums, QUARTER, KEEP, BIAS, SOFTCAP, STATISTICS,
            )  # fmt: skip
            sums = _quarter(
                third, bias, exp_logits, one, row, token + 2 * COLUMNS, y, special, ref, vocabulary,
                scale, cap, sums, QUARTER, KEEP, BIAS, SOFTCAP, STATISTICS,
            )  # fmt: skip
            sums = _quarter(
                fourth, bias, exp_logits, other, row, token + 3 * COLUMNS, y, special, ref,
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
    ACTIVE: gl.constexpr,
):
    """All tiles of logits, see the module. With ACTIVE, rows from ``num_active`` on are not wanted:
    tiles of such rows are not counted.
    """
    # How many tiles there are is decided once, here, or the parts would wait for each other.
    wanted = rows
    if ACTIVE:
        wanted = gl.minimum(gl.maximum(gl.load(num_active), 0), rows)
    columns = gl.cdiv(vocabulary, BLOCK_V)
    count = gl.cdiv(wanted, BLOCK_N) * columns
    blocks = gl.maximum(gl.cdiv(wanted, BLOCK_N), 1)  # `grouped` divides by it

    # The ring, its barriers, and two buffers of each consumer for a quarter of E on its way out.
    h_ring = gl.allocate_shared_memory(
        hidden.dtype, [2 * STAGES, BLOCK_N // 2, BLOCK_H], hidden.layout
    )
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_V, BLOCK_H], weight.layout)
    staging = h_ring
    if KEEP:
        staging = gl.allocate_shared_memory(
            exp_logits.dtype, [4, BLOCK_N // 2, BLOCK_V // 4], exp_logits.layout
        )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    # Registers of a thread: 240 for the consumers, the first of which is the kernel's own warps.
    gl.warp_specialize(
        [
            (_consumer, (
                exp_logits, h_ring, w_ring, staging, ready, empty, bias, targets, reference,
                tile_sumexp, target_logit, statistics, count, blocks, columns, rows, vocabulary,
                width, scale, cap, BLOCK_N, BLOCK_V, BLOCK_H, GROUP_N, STAGES, LAG, KEEP, BIAS,
                SOFTCAP, STATISTICS, 0,
            )),
            (_consumer, (
                exp_logits, h_ring, w_ring, staging, ready, empty, bias, targets, reference,
                tile_sumexp, target_logit, statistics, count, blocks, columns, rows, vocabulary,
                width, scale, cap, BLOCK_N, BLOCK_V, BLOCK_H, GROUP_N, STAGES, LAG, KEEP, BIAS,
                SOFTCAP, STATISTICS, 1,
            )),
            (_producer, (
                hidden, weight, h_ring, w_ring, ready, empty, count, blocks, columns, width,
                BLOCK_N, BLOCK_V, BLOCK_H, GROUP_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _layout(columns: int) -> Any:
    """How a box of that many columns lies in shared memory: rows of 128 bytes, swizzled."""
    return gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2)


def _boxes() -> dict[str, tuple[int, int]]:
    """What one copy moves: hidden states and E of one consumer, weight of both."""
    n, v, h = BLOCKS
    return {"hidden": (n // 2, h), "weight": (v, h), "exp_logits": (n // 2, v // 4)}


def _constants(
    group_n: int, *, keep: bool, bias: bool, softcap: bool, statistics: bool, active: bool
) -> dict[str, Any]:
    """The kernel's constants. With a softcap there always is a bias."""
    n, v, h = BLOCKS
    return {
        "BLOCK_N": n,
        "BLOCK_V": v,
        "BLOCK_H": h,
        "GROUP_N": group_n,
        "STAGES": STAGES,
        "LAG": LAG,
        "KEEP": keep,
        "BIAS": bias or softcap,
        "SOFTCAP": softcap,
        "STATISTICS": statistics,
        "ACTIVE": active,
    }


def _options() -> dict[str, Any]:
    """Options of a launch. Sums and products are never contracted, as in the plain kernel."""
    return {
        "num_warps": WARPS,
        "num_stages": 1,
        "maxnreg": REGISTERS,
        "enable_fp_fusion": False,
    }


def variants_signature(
    dtype_name: str, keep: bool, bias: bool, softcap: bool, statistics: bool, active: bool
) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """What a launch compiles: types of all arguments, constants and options, as
    ``GluonASTSource(forward_kernel, signature, constants)`` and ``triton.compile`` take them.

    Args:
        dtype_name: "bf16" or "fp16", of the operands.
        keep, bias, softcap, statistics, active: the options of a call. With a softcap the variants
            with and without a bias are one.
    """
    entry = config.of("sm_90a", {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype_name])
    constants = _constants(
        entry.group_n, keep=keep, bias=bias, softcap=softcap, statistics=statistics, active=active
    )
    signature = {
        **{
            name: f"tensordesc<{dtype_name}[{rows}, {columns}],{_layout(columns)!r}>"
            for name, (rows, columns) in _boxes().items()
        },
        "bias": f"*{dtype_name}",
        "targets": "*i64",
        **dict.fromkeys(("reference", "tile_sumexp", "target_logit", "statistics"), "*fp32"),
        "num_active": "*i32",
        **dict.fromkeys(("rows", "vocabulary", "width"), "i32"),
        **dict.fromkeys(("scale", "cap"), "fp32"),
    }
    optional = {
        "exp_logits": keep,
        "bias": constants["BIAS"],
        "statistics": statistics,
        "num_active": active,
    }
    constants |= {name: None for name, given in optional.items() if not given}
    signature |= dict.fromkeys(constants, "constexpr")
    return {name: signature[name] for name in forward_kernel.arg_names}, constants, _options()


def supported(hidden: Tensor, weight: Tensor, exp_logits: Tensor | None, of: Config) -> str | None:
    """None, or why these operands of :func:`forward` have to go to the plain kernel."""
    operands = {"hidden": hidden, "weight": weight, "exp_logits": exp_logits}
    given = {name: operand for name, operand in operands.items() if operand is not None}
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden is {hidden.dtype}, not of 16 bits"
    blocks = (of.forward.n, of.forward.v, of.forward.h)
    if blocks != BLOCKS:
        return f"tiles are {blocks}, not {BLOCKS}"
    tile_count = -(-len(hidden) // of.forward.n) * -(-len(weight) // of.forward.v)
    if tile_count > MOST_TILES:
        return f"{tile_count} tiles are more than {MOST_TILES}"
    for name, operand in given.items():
        if operand.dtype != hidden.dtype:
            return f"{name} is {operand.dtype}, hidden is {hidden.dtype}"
        if not tiles.aligned(operand):
            return f"rows of {name} do not begin at multiples of 16 bytes"
    if hidden.device.type != "cuda":
        return f"hidden is on {hidden.device}, not on a GPU"
    target = config.target_of(hidden.device)
    return None if target == "sm_90a" else f"the target is {target}, not sm_90a"


def _operand(tensor: Tensor, box: tuple[int, int]) -> Any:
    """A matrix as the kernel takes it."""
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), list(box), _layout(box[1])
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
    """Launch the forward product: arguments and results are those of :func:`.forward.forward`, and
    :func:`supported` has nothing against them.
    """
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    result = new_results(reference, vocabulary, of, exp_logits, statistics)
    tile_count = len(result.tile_sumexp)
    if rows == 0:
        return result
    if bias is None and transform.softcap:
        # u + -0 is u, the sign of a zero included.
        bias = hidden.new_full((kept_width(vocabulary, of),), -0.0)
    if bias is not None and bias.data_ptr() % 16 != 0:
        bias = bias.clone()
    boxes = _boxes()
    programs = min(-(-rows // of.forward.n) * tile_count, config.processors(hidden.device))
    forward_kernel[tiles.grid(programs)](
        _operand(hidden, boxes["hidden"]),
        _operand(weight, boxes["weight"]),
        None if exp_logits is None else _operand(exp_logits, boxes["exp_logits"]),
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
        transform.scale,
        transform.cap,
        **_constants(
            of.group_n,
            keep=exp_logits is not None,
            bias=bias is not None,
            softcap=transform.softcap,
            statistics=statistics,
            active=num_active is not None,
        ),
        **_options(),
    )
    return result
