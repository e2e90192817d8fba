"""The forward product of Hopper, warp-specialised: what :func:`.forward.forward_kernel` does, with
the tensor cores busy through the epilogues. In Gluon, for operands of 16 bits.

As many programs as the chip has multiprocessors share the tiles. In each of them three parts run
beside one another (:mod:`.gluon_parts`):

* the **producer**, one warp, copies operands to a ring of STAGES stages in shared memory: the
  hidden states of either consumer, and the weight that both read;
* two **consumers** of four warps multiply 64 rows of a tile each, and turn them into exponentials
  and sums. Neither waits for the other: while one is in its epilogue, the other multiplies. They
  start LAG steps apart, so as not to reach their epilogues together.

Two barriers per stage keep them in order: `ready` turns when the bytes of a stage have landed,
`empty` when both consumers have read it. tests/kernels/pipeline_model.py goes through every order
of events.

Results are those of the plain kernel, bit for bit: the same products in the same order, the same
quarters of the columns, and sums over the same registers of the same lanes. What cannot be
described to the tensor memory accelerator goes to the plain kernel; :func:`supported` says so.

Found by compiling: nothing spills, as long as all that compares columns stands under one uniform
branch, the epilogue stands under another, and a softcap comes with a bias, of zeros if need be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import config, tiles
from .config import Config
from .forward import Forward, Transform, kept_width, new_results
from .gluon_parts import consumer, jit, producer

STAGES, LAG = 4, 1
"""Stages of the ring, and steps between the consumers' starts: fewer than the stages."""

WARPS, REGISTERS = 4, 168
"""Warps of a consumer, and registers of a thread before they are shared out anew."""

BLOCKS = (128, 256, 64)
"""The one tile that is known to fit: rows, tokens, and columns of the hidden states at a time."""

MOST_TILES = 2**30
"""Tiles are counted in 32 bits, one round of the programs beyond the last one included."""


@jit
def forward_kernel(
    hidden,  # (n, H)
    weight,  # (V, H)
    exp_logits,  # (n, tiles * BLOCK_V) or None
    bias,  # (tiles * BLOCK_V,) or None
    targets,  # (n,)
    shift,  # (n,)
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
            (consumer, (
                exp_logits, h_ring, w_ring, staging, ready, empty, bias, targets, shift,
                tile_sumexp, target_logit, statistics, count, blocks, columns, rows, vocabulary,
                width, scale, cap, BLOCK_N, BLOCK_V, BLOCK_H, GROUP_N, STAGES, LAG, KEEP, BIAS,
                SOFTCAP, STATISTICS, 0,
            )),
            (consumer, (
                exp_logits, h_ring, w_ring, staging, ready, empty, bias, targets, shift,
                tile_sumexp, target_logit, statistics, count, blocks, columns, rows, vocabulary,
                width, scale, cap, BLOCK_N, BLOCK_V, BLOCK_H, GROUP_N, STAGES, LAG, KEEP, BIAS,
                SOFTCAP, STATISTICS, 1,
            )),
            (producer, (
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
        **dict.fromkeys(("shift", "tile_sumexp", "target_logit", "statistics"), "*fp32"),
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
    if not config.on_gpu(hidden.device):
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
    shift: Tensor,
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
    result = new_results(shift, vocabulary, of, exp_logits, statistics)
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
        shift,
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
