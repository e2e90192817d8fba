"""Small kernels that compile well or badly, and a registry of them, for ``tests/test_aot.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl


@triton.jit
def toy_product(
    a, b, out, width, rows, columns: tl.constexpr, depth: tl.constexpr, lines: tl.constexpr
):
    """``(rows, width) @ (columns, width).T``, one tile a program, descriptors in."""
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


@dataclass(frozen=True)
class Toy:
    """A variant as :class:`fastdpop.aot.Variant` wants it."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    attrs: Mapping[Any, Any]
    num_warps: int = 8
    num_stages: int = 3
    target: str = "sm_90a"
    default: bool = True
    options: Mapping[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": False})


def product(name: str, lines: int, columns: int, dtype: str = "bf16", **options: Any) -> Toy:
    """`toy_product` with tiles of lines x columns, 64 deep."""
    depth = 64 if dtype == "bf16" else 32
    signature = {
        "a": f"tensordesc<{dtype}[{lines}, {depth}]>",
        "b": f"tensordesc<{dtype}[{columns}, {depth}]>",
        "out": "*fp32",
        "width": "i32",
        "rows": "i32",
        **dict.fromkeys(("columns", "depth", "lines"), "constexpr"),
    }
    constants = {"columns": columns, "depth": depth, "lines": lines}
    return Toy(
        name, toy_product, signature, constants, {(2,): [["tt.divisibility", 16]]}, **options
    )


TOYS = (
    product("good/128x128", 128, 128),
    product("spills/128x256", 128, 256, num_warps=4),
    product("spills/by choice", 128, 256, num_warps=4, default=False),
    product("thin/16x64", 16, 64, num_warps=4),
    product("greedy/128x256", 128, 256, num_stages=6, default=False),
    Toy(
        "copy",
        toy_copy,
        {"a": "*fp32", "out": "*fp32", "size": "constexpr"},
        {"size": 1024},
        {},
        num_warps=4,
    ),
    product("ampere/64x64", 64, 64, num_warps=4, target="sm_80"),
)


def variants(target: str) -> list[Toy]:
    return [toy for toy in TOYS if toy.target == target]
