"""Small kernels that compile well or badly, and a registry of them, for ``test_compiler.py``.

Each bad one has a fault that a check of :mod:`tools.kernels.gate` is for, planted with whatever brings it
about in the triton of the tests; the same faults come from other code in other versions.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from tools.kernels.variant import Variant

# What 3.6 calls otherwise than later versions.
_tma_load = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared


@triton.jit
def toy_product(
    a, b, out, width, rows, columns: tl.constexpr, depth: tl.constexpr, lines: tl.constexpr
):
    """``(rows, width) @ (columns, width).T``, one tile per program, descriptors in."""
    tl.assume(width > 0)  # where there may be none, 3.6 makes products wait for one another
    at = tl.program_id(0) * lines
    total = tl.zeros((lines, columns), tl.float32)
    for k in range(0, width, depth):
        total = tl.dot(a.load([at, k]), b.load([0, k]).T, total)
    line = at + tl.arange(0, lines)
    cells = line[:, None].to(tl.int64) * columns + tl.arange(0, columns)[None, :]
    tl.store(out + cells, tl.exp2(total), mask=line[:, None] < rows)


@triton.jit
def toy_copy(a, out, size: tl.constexpr):
    """No product, no loop."""
    at = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(out + at, tl.load(a + at) * 2.0)


@triton.jit
def toy_decaying(
    a, b, out, width, rows, columns: tl.constexpr, depth: tl.constexpr, lines: tl.constexpr
):
    """Every step changes the total itself, so it waits for the product before it."""
    tl.assume(width > 0)
    at = tl.program_id(0) * lines
    total = tl.zeros((lines, columns), tl.float32)
    for k in range(0, width, depth):
        total = tl.dot(a.load([at, k]), b.load([0, k]).T, total * 0.5)
    line = at + tl.arange(0, lines)
    cells = line[:, None].to(tl.int64) * columns + tl.arange(0, columns)[None, :]
    tl.store(out + cells, total, mask=line[:, None] < rows)


@triton.jit
def toy_scaled(
    a, b, out, width, rows, columns: tl.constexpr, depth: tl.constexpr, lines: tl.constexpr
):
    """Scales the left operand, which takes it through registers, in a loop that may be empty: with
    that the products wait for one another.
    """
    at = tl.program_id(0) * lines
    line = at + tl.arange(0, lines)
    total = tl.zeros((lines, columns), tl.float32)
    for k in range(0, width, depth):
        scale = tl.load(out + k + line, mask=line < rows, other=0.0)
        left = (a.load([at, k]).to(tl.float32) * scale[:, None]).to(tl.bfloat16)
        total = tl.dot(left, b.load([0, k]).T, total)
    cells = line[:, None].to(tl.int64) * columns + tl.arange(0, columns)[None, :]
    tl.store(out + cells, total, mask=line[:, None] < rows)


@triton.jit
def toy_turned(
    a, b, out, width, rows, columns: tl.constexpr, depth: tl.constexpr, lines: tl.constexpr
):
    """Takes the left operand through registers, and nothing worse."""
    tl.assume(width > 0)
    at = tl.program_id(0) * lines
    total = tl.zeros((lines, columns), tl.float32)
    for k in range(0, width, depth):
        scale = tl.load(out + k + tl.arange(0, depth))
        left = (a.load([k, at]).to(tl.float32) * scale[:, None]).to(tl.bfloat16).T
        total = tl.dot(left, b.load([0, k]).T, total)
    line = at + tl.arange(0, lines)
    cells = line[:, None].to(tl.int64) * columns + tl.arange(0, columns)[None, :]
    tl.store(out + cells, total, mask=line[:, None] < rows)


@triton.jit
def toy_precise(a, out, size: tl.constexpr):
    """Divides in float64, which also calls a subroutine."""
    at = tl.program_id(0) * size + tl.arange(0, size)
    value = tl.load(a + at).to(tl.float64)
    tl.store(out + at, (1.0 / (value + 3.0)).to(tl.float32))


@gluon.jit
def _loader(a, b, tiles_a, tiles_b, ready, empty, width, depth: gl.constexpr, stages: gl.constexpr):
    for step in range(gl.cdiv(width, depth)):
        k = step * depth
        stage = step % stages
        hopper.mbarrier.wait(empty.index(stage), (step // stages & 1) ^ 1)
        hopper.mbarrier.expect(ready.index(stage), a.block_type.nbytes + b.block_type.nbytes)
        _tma_load(a, [gl.program_id(0) * 64, k], ready.index(stage), tiles_a.index(stage))
        _tma_load(b, [0, k], ready.index(stage), tiles_b.index(stage))


@gluon.jit
def _multiplier(
    tiles_a, tiles_b, out, ready, empty, width, depth: gl.constexpr, stages: gl.constexpr,
    columns: gl.constexpr, waits: gl.constexpr, half: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns // 2, 16])
    total = gl.zeros((64, columns // 2), gl.float32, layout)
    for step in range(gl.cdiv(width, depth)):
        stage = step % stages
        hopper.mbarrier.wait(ready.index(stage), step // stages & 1)
        right = tiles_b.index(stage).slice(half * (columns // 2), columns // 2).permute((1, 0))
        total = hopper.warpgroup_mma(tiles_a.index(stage), right, total, is_async=True)
        total = hopper.warpgroup_mma_wait(waits, deps=(total,))
        before = (step + stages - waits) % stages
        hopper.mbarrier.arrive(empty.index(before), count=1, pred=step >= waits)
    total = hopper.warpgroup_mma_wait(0, deps=(total,))
    line = gl.program_id(0) * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = half * (columns // 2) + gl.arange(0, columns // 2, gl.SliceLayout(0, layout))
    gl.store(out + line[:, None] * columns + column[None, :], total)


@gluon.jit
def toy_roles(
    a, b, out, width, depth: gl.constexpr, columns: gl.constexpr, stages: gl.constexpr,
    waits: gl.constexpr,
):  # fmt: skip
    """The product with warps in three roles: one loads, two times four multiply half of the columns
    each; the second of them waits with `waits` products under way, the first with 1.
    """
    tiles_a = gl.allocate_shared_memory(a.dtype, [stages, 64, depth], a.layout)
    tiles_b = gl.allocate_shared_memory(b.dtype, [stages, columns, depth], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [stages, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(stages):
        hopper.mbarrier.init(ready.index(i), count=1)
        hopper.mbarrier.init(empty.index(i), count=2)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiplier,
                (tiles_a, tiles_b, out, ready, empty, width, depth, stages, columns, 1, 0),
            ),
            (
                _multiplier,
                (tiles_a, tiles_b, out, ready, empty, width, depth, stages, columns, waits, 1),
            ),
            (_loader, (a, b, tiles_a, tiles_b, ready, empty, width, depth, stages)),
        ],
        [4, 1],
        [168, 24],
    )


DEFAULTS: dict[str, Any] = {
    "num_warps": 8,
    "num_stages": 3,
    "target": "sm_90a",
    "default": True,
    "options": {"enable_fp_fusion": False},
    "warpgroup": True,
}
"""What a toy is, unless something else is said."""


def product(
    name: str,
    lines: int,
    columns: int,
    kernel: Any = toy_product,
    turned: bool = False,
    **more: Any,
) -> Variant:
    """A product of bf16 with tiles of lines x columns, 64 deep."""
    depth = 64
    box = f"{depth}, {lines}" if turned else f"{lines}, {depth}"
    signature = {
        "a": f"tensordesc<bf16[{box}]>",
        "b": f"tensordesc<bf16[{columns}, {depth}]>",
        "out": "*fp32",
        "width": "i32",
        "rows": "i32",
        **dict.fromkeys(("columns", "depth", "lines"), "constexpr"),
    }
    constants = {"columns": columns, "depth": depth, "lines": lines}
    aligned = {(2,): [["tt.divisibility", 16]]}
    return Variant(name, kernel, signature, constants, attrs=aligned, **{**DEFAULTS, **more})


def elements(name: str, kernel: Any, **more: Any) -> Variant:
    """Of 1,024 numbers per program."""
    signature = {"a": "*fp32", "out": "*fp32", "size": "constexpr"}
    own = {**DEFAULTS, "num_warps": 4, **more}
    return Variant(name, kernel, signature, {"size": 1024}, **own)


def roles(name: str, waits: int) -> Variant:
    """`toy_roles`, 64 x 256."""
    box = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    constants = {"depth": 64, "columns": 256, "stages": 3, "waits": waits}
    signature = {
        "a": f"tensordesc<bf16[64, 64],{box!r}>",
        "b": f"tensordesc<bf16[256, 64],{box!r}>",
        "out": "*fp32",
        "width": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    options = {"enable_fp_fusion": False, "maxnreg": 128}
    own = {**DEFAULTS, "num_warps": 4, "options": options, "gluon": True}
    return Variant(name, toy_roles, signature, constants, **own)


TOYS = (
    product("good/128x128", 128, 128),
    roles("good/roles", 1),
    elements("copy", toy_copy),
    product("spills/128x256", 128, 256, num_warps=4),
    product("thin/16x64", 16, 64, num_warps=4),
    product("allowed/16x64", 16, 64, num_warps=4, warpgroup=False),
    product("greedy/128x256", 128, 256, num_stages=6, default=False),
    product("decaying/128x128", 128, 128, toy_decaying),
    product("scaled/128x128", 128, 128, toy_scaled),
    product("turned/128x128", 128, 128, toy_turned, turned=True),
    roles("roles/in step", 0),
    elements("precise", toy_precise, default=False),
    elements("allowed/float64", toy_precise, float64=True),
    product("ampere/64x64", 64, 64, num_warps=4, target="sm_80"),
    product(
        "ampere spills/64x64",
        64,
        64,
        num_warps=4,
        target="sm_80",
        default=False,
        options={"enable_fp_fusion": False, "maxnreg": 96},
    ),
)


def variants(target: str) -> list[Variant]:
    """In the registry's place."""
    return [toy for toy in TOYS if toy.target == target]
