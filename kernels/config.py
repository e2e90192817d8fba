"""Tile sizes and launch options: one frozen table, read by the launchers and by the registry, so
that what is compiled ahead of time is what runs.

Nothing is tuned at run time. The sm_90a entries are those whose compiled code keeps every
accumulator in registers (stack 0) with triton 3.6 and 3.9.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on the CPU (``TRITON_INTERPRET=1``)."""

TARGETS = ("sm_80", "sm_90a", "sm_100")
"""Targets with entries of their own."""

MOST_PROGRAMS = 2**31 - 1
"""Largest size of a grid's first dimension; the kernels use no other."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled: its warps and the stages of its pipelined loads."""

    warps: int
    stages: int = 1

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch. Products and sums are never contracted by the compiler:
        the variants of a kernel must round alike.
        """
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the three products; every size is a power of 2.

    Attributes:
        rows, tokens, depth: the forward product's tile of logits and the piece of H of a step.
        group: row tiles that go through the vocabulary side by side, so that a weight tile is read
            from L2 by all but the first of them.
        hidden_rows, hidden_width, hidden_depth: dHidden's tile and its step along the vocabulary.
        weight_tokens, weight_width, weight_depth: dWeight's tile and its step along the rows.
        forward, hidden, weight: their launches.
        descriptors: whether tensor descriptors (TMA) are used where the operands allow it.
    """

    rows: int
    tokens: int
    depth: int
    group: int
    hidden_rows: int
    hidden_width: int
    hidden_depth: int
    weight_tokens: int
    weight_width: int
    weight_depth: int
    forward: Launch
    hidden: Launch
    weight: Launch
    descriptors: bool

    @property
    def name(self) -> str:
        """For the registry: the forward product's tile."""
        return f"{self.rows}x{self.tokens}x{self.depth}"

    def hidden_name(self) -> str:
        return f"{self.hidden_rows}x{self.hidden_width}x{self.hidden_depth}"

    def weight_name(self) -> str:
        return f"{self.weight_tokens}x{self.weight_width}x{self.weight_depth}"


SMALL = Launch(warps=4)
"""Launch of the kernels that move memory only."""

COMBINE_ROWS, COMBINE_TILES = 32, 16
"""Rows of a program that combines partial sums, and vocabulary tiles that it reads at once."""

TARGET_ROWS = 4
"""Rows of a program that places targets."""

SCALE_ROWS, SUM_WIDTH = 16, 128
"""Rows of a program that rescales, or step of one that sums over rows, for so many tokens."""

_HOPPER = Tiles(
    rows=128,
    tokens=256,
    depth=64,
    group=16,
    hidden_rows=128,
    hidden_width=256,
    hidden_depth=64,
    weight_tokens=128,
    weight_width=256,
    weight_depth=64,
    forward=Launch(warps=8, stages=3),
    hidden=Launch(warps=8, stages=3),
    weight=Launch(warps=8, stages=3),
    descriptors=True,
)
_AMPERE = Tiles(
    rows=128,
    tokens=128,
    depth=32,
    group=16,
    hidden_rows=128,
    hidden_width=128,
    hidden_depth=32,
    weight_tokens=128,
    weight_width=128,
    weight_depth=32,
    forward=Launch(warps=8, stages=3),
    hidden=Launch(warps=8, stages=3),
    weight=Launch(warps=8, stages=3),
    descriptors=False,
)
_ANY = Tiles(
    rows=64,
    tokens=64,
    depth=32,
    group=8,
    hidden_rows=64,
    hidden_width=64,
    hidden_depth=32,
    weight_tokens=64,
    weight_width=64,
    weight_depth=32,
    forward=Launch(warps=4, stages=2),
    hidden=Launch(warps=4, stages=2),
    weight=Launch(warps=4, stages=2),
    descriptors=False,
)
_WIDE = Launch(warps=8, stages=2)
_SINGLE = replace(_ANY, forward=_WIDE, hidden=_WIDE, weight=_WIDE, hidden_depth=16)
_BLACKWELL = replace(_HOPPER, tokens=128)
_INTERPRETER = Tiles(
    rows=16,
    tokens=32,
    depth=32,
    group=2,
    hidden_rows=16,
    hidden_width=32,
    hidden_depth=16,
    weight_tokens=16,
    weight_width=32,
    weight_depth=16,
    forward=Launch(warps=4),
    hidden=Launch(warps=4),
    weight=Launch(warps=4),
    descriptors=True,
)

TABLE: dict[tuple[str, torch.dtype], Tiles] = {
    **{("sm_90a", dtype): _HOPPER for dtype in (torch.bfloat16, torch.float16)},
    **{("sm_100", dtype): _BLACKWELL for dtype in (torch.bfloat16, torch.float16)},
    **{("sm_80", dtype): _AMPERE for dtype in (torch.bfloat16, torch.float16)},
    # float32 products are IEEE and run outside the tensor cores: small tiles everywhere.
    **{(target, torch.float32): _SINGLE for target in TARGETS},
    **{
        ("interpreter", dtype): _INTERPRETER
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    },
}


def tiles(target: str, dtype: torch.dtype, *, described: bool = True) -> Tiles:
    """The entry of a target, or the small pointer-load tiles that run anywhere.

    Where the operands are not `described`, loads through pointers need registers of their own, and
    tiles are smaller.
    """
    entry = TABLE.get((target, dtype), _ANY)
    if described or not entry.descriptors:
        return entry
    return replace(entry, descriptors=False) if target == "interpreter" else _AMPERE


@functools.cache
def target_of(device: torch.device) -> str:
    """The table's name of a device. A chip without entries gets the portable ones, and a warning
    says so once.
    """
    if INTERPRETED:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 9:
        return "sm_90a"
    if major == 10:
        return "sm_100"
    if major == 8:
        return "sm_80"
    warnings.warn(
        f"fastdpop has no tile sizes for compute capability {major}.{minor} "
        f"({torch.cuda.get_device_name(device)}): using the portable kernels, which load through "
        f"pointers. Tuned targets: {', '.join(TARGETS)}",
        stacklevel=2,
    )
    return "other"
