"""Tile sizes and launch options: one frozen table, read by the launchers and by whoever compiles
kernels ahead of time, so that what is compiled is what runs.

Nothing is tuned at run time. The sm_90a entries are those whose compiled code keeps every
accumulator in registers and its products in flight with triton 3.6, 3.8 and 3.9.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
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
class Blocks:
    """One matrix product: two of n, v and h are the tile of its result, the third is the step of
    its sum. Powers of 2.

    Attributes:
        n: rows. v: tokens of the vocabulary. h: columns of the hidden states.
        warps, stages: its launch.
    """

    n: int
    v: int
    h: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels take them."""
        return {"BLOCK_N": self.n, "BLOCK_V": self.v, "BLOCK_H": self.h}

    @property
    def launch(self) -> Launch:
        return Launch(self.warps, self.stages)

    @property
    def name(self) -> str:
        return f"{self.n}x{self.v}x{self.h}"


@dataclass(frozen=True)
class Config:
    """The kernels of a target and a dtype.

    Attributes:
        forward, dhidden, dweight: their products.
        repair: the forward product of the rare rows that overflowed: small tiles, through pointers.
        group_n: row tiles that go through the vocabulary side by side, so that a weight tile is
            read from L2 by all but the first of them.
        use_tma: whether operands go through tensor descriptors, or through pointers.
    """

    forward: Blocks
    dhidden: Blocks
    dweight: Blocks
    repair: Blocks
    group_n: int
    use_tma: bool


SMALL = Launch(warps=4)
"""Launch of the kernels that multiply no matrices."""

TARGET_ROWS, TARGET_WIDTH = 4, 256
"""Rows of a program that forms the targets' logits, and columns that it reads at once."""

COMBINE_ROWS, COMBINE_TILES = 32, 16
"""Rows of a program that combines partial sums, and vocabulary tiles that it reads at once."""

SCAN_ROWS = 1024
"""Rows that are looked at at once in the search for those that overflowed."""

PAIR_ROWS = 256
"""Rows that a program of the pair loss reads at once."""

BIAS_ROWS, BIAS_TOKENS = 16, 128
"""Rows that a program of dBias reads at once, and tokens of a program."""

_REPAIR = Blocks(n=64, v=64, h=32, warps=4, stages=2)

_HOPPER = Config(
    forward=Blocks(n=128, v=256, h=64, warps=8, stages=4),
    dhidden=Blocks(n=128, v=64, h=256, warps=8, stages=4),
    dweight=Blocks(n=64, v=128, h=256, warps=8, stages=4),
    repair=_REPAIR,
    group_n=16,
    use_tma=True,
)
_AMPERE = Config(
    forward=Blocks(n=128, v=64, h=32, warps=4, stages=4),
    dhidden=Blocks(n=128, v=32, h=128, warps=8, stages=3),
    dweight=Blocks(n=32, v=128, h=128, warps=8, stages=3),
    repair=_REPAIR,
    group_n=16,
    use_tma=False,
)
_ANY = Config(
    forward=Blocks(n=64, v=64, h=32, warps=4, stages=2),
    dhidden=Blocks(n=64, v=32, h=64, warps=4, stages=2),
    dweight=Blocks(n=32, v=64, h=64, warps=4, stages=2),
    repair=_REPAIR,
    group_n=8,
    use_tma=False,
)
_SINGLE = Config(
    forward=Blocks(n=64, v=64, h=32, warps=8, stages=2),
    dhidden=Blocks(n=64, v=16, h=64, warps=8, stages=2),
    dweight=Blocks(n=32, v=64, h=64, warps=8, stages=2),
    repair=replace(_REPAIR, v=32),
    group_n=8,
    use_tma=False,
)
_BLACKWELL = replace(
    _HOPPER,
    forward=Blocks(n=128, v=128, h=64, warps=8, stages=3),
    dweight=replace(_HOPPER.dweight, stages=3),
)
_INTERPRETER = Config(
    forward=Blocks(n=16, v=32, h=32, warps=4, stages=1),
    dhidden=Blocks(n=16, v=16, h=32, warps=4, stages=1),
    dweight=Blocks(n=16, v=16, h=32, warps=4, stages=1),
    repair=Blocks(n=16, v=16, h=32, warps=4, stages=1),
    group_n=2,
    use_tma=True,
)

TABLE: dict[tuple[str, torch.dtype], Config] = {
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


def of(target: str, dtype: torch.dtype) -> Config:
    """The entry of a target, or the small tiles that run anywhere."""
    return TABLE.get((target, dtype), _ANY)


_assumed: tuple[str, int] | None = None


@contextlib.contextmanager
def assumed(target: str, processors: int) -> Iterator[None]:
    """Plan as if every device were a GPU of this target with so many multiprocessors, wherever the
    tensors are, the meta device included: for plans and recordings without a GPU. It holds for the
    whole process, and makes no launch possible.

    Raises:
        ValueError: the target is none of :data:`TARGETS`.
    """
    global _assumed
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    before, _assumed = _assumed, (target, processors)
    try:
        yield
    finally:
        _assumed = before


def on_gpu(device: torch.device) -> bool:
    """Whether a device is a GPU, or is :func:`assumed` to be one."""
    return device.type == "cuda" or _assumed is not None


def target_of(device: torch.device) -> str:
    """The table's name of a device. A GPU without entries gets the portable ones, and a warning
    says so once.
    """
    return detected(device) if _assumed is None else _assumed[0]


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 in the interpreter."""
    if _assumed is not None:
        return _assumed[1]
    return 1 if INTERPRETED else _multiprocessors(device)


@functools.cache
def detected(device: torch.device) -> str:
    """The table's name of a device as it is, whatever is :func:`assumed`."""
    if INTERPRETED:
        return "interpreter"
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        # ROCm's gfx9 reports capability 9 too, and is no Hopper.
        what = f"ROCm ({name})"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        if major == 9:
            return "sm_90a"
        if major == 10:
            return "sm_100"
        if major == 8:
            return "sm_80"
        what = f"compute capability {major}.{minor} ({name})"
    warnings.warn(
        f"fastdpop has no tile sizes for {what}: using the portable kernels, which load through "
        f"pointers. Tuned targets: {', '.join(TARGETS)}",
        stacklevel=3,
    )
    return "other"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
