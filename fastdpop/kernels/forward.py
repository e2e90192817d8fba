"""The forward product: logits tile by tile, straight into partial sums of the softmax.

Every row i has one shift R_i, known beforehand, in units of log 2. For a tile of rows and tokens v,
with the accumulator ``u = hidden @ weight.T + bias``:

    t = u, or tanh(cap * u) under a softcap
    z = scale * t                               logits in units of log 2
    E[i, v] = 2**(z - R_i)                      0 at the row's target y_i and outside the vocabulary
    tile_sumexp[tile, i] = sum of E over v
    target_logit[i] = t[y_i]                    written by the tile that holds it

and, kept for the gradients of whole groups, ``exp_logits[i, v] = E * dt/du`` without its constant
factor (``1 - t**2`` under a softcap, else 1), rounded once to the products' dtype. Because all
tiles of a row share its shift, what is kept is a row of the softmax up to one factor, so the
gradients are plain matrix products. The target stays out of the sums: 1 - p of a token near
certainty is then a sum of small numbers, not a difference of large ones.

R_i is the target's own logit, rounded (:mod:`.target_logit`): bfloat16 has float32's exponents, and
nothing is lost by not subtracting the maximum, unless the target's probability is below about
2**-90. Rows whose sum passes :data:`.repair.OVERFLOW` are computed once more, with their maximum as
the shift (:mod:`.repair`); its launches end at once where there are none.

No atomics: a partial sum has one writer, and :mod:`.combine` adds them up in a fixed order. The
epilogue (:mod:`.epilogue`) takes a tile in quarters of its columns, in every variant alike: the
same row has the same bits, whatever else is computed beside it, and accumulators of 128 x 256 stay
in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from . import tiles
from .config import Config
from .epilogue import quarter
from .tiles import aligned, grid, jit, operand


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
        shift: ``(n,)`` float32, R.
        tile_sumexp: ``(tiles of the vocabulary, n)`` float32.
        target_logit: ``(n,)`` float32, t of each row's target.
        statistics: ``(4, tiles, n)`` float32, sums of ``(z - R) E``, of t (target included), and of
            ``(SQUARED * E)**2``, and the largest t beside the target; or None.
        exp_logits: ``(n, whole tiles)`` in the products' dtype, or None.
    """

    shift: Tensor
    tile_sumexp: Tensor
    target_logit: Tensor
    statistics: Tensor | None
    exp_logits: Tensor | None


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
    row_shift = tl.load(shift + r, inside, other=0.0)
    target = tl.load(targets + r, inside, other=-1)

    # Product.
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, width, BLOCK_H):
        h = tiles.load_block(hidden, row, k, rows, width, hidden_stride, BLOCK_N, BLOCK_H, USE_TMA)
        w = tiles.load_block(
            weight, token, k, vocabulary, width, weight_stride, BLOCK_V, BLOCK_H, USE_TMA
        )
        acc = tiles.dot(h, w.T, acc)

    # How many rows have their target in each quarter, one byte per quarter: BLOCK_N is at most 128.
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
    sums = quarter(
        0, first, found, bias, exp_logits, row, token, y, row_shift, rows, vocabulary, kept_stride,
        scale, cap, sums, COLUMNS, BLOCK_N, USE_TMA, KEEP, BIAS, SOFTCAP, STATISTICS,
    )  # fmt: skip
    sums = quarter(
        1, second, found, bias, exp_logits, row, token, y, row_shift, rows, vocabulary, kept_stride,
        scale, cap, sums, COLUMNS, BLOCK_N, USE_TMA, KEEP, BIAS, SOFTCAP, STATISTICS,
    )  # fmt: skip
    sums = quarter(
        2, third, found, bias, exp_logits, row, token, y, row_shift, rows, vocabulary, kept_stride,
        scale, cap, sums, COLUMNS, BLOCK_N, USE_TMA, KEEP, BIAS, SOFTCAP, STATISTICS,
    )  # fmt: skip
    sums = quarter(
        3, fourth, found, bias, exp_logits, row, token, y, row_shift, rows, vocabulary, kept_stride,
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


def kept_width(vocabulary: int, of: Config) -> int:
    """Columns of `exp_logits`: whole tiles."""
    return -(-vocabulary // of.forward.v) * of.forward.v


def padded_bias(bias: Tensor, of: Config) -> Tensor:
    """A copy of ``(V,)`` in whole tiles, 0 outside: aligned, as the kernels take for granted."""
    padded = bias.new_zeros(kept_width(len(bias), of))
    padded[: len(bias)] = bias
    return padded


def new_results(
    shift: Tensor, vocabulary: int, of: Config, exp_logits: Tensor | None, statistics: bool
) -> Forward:
    """Memory for what a forward product leaves, to be filled in; the last two as for
    :func:`forward`.
    """
    tile_count, rows = -(-vocabulary // of.forward.v), len(shift)
    new = shift.new_empty
    return Forward(
        shift=shift,
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
    shift: Tensor,
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
        shift: ``(n,)`` float32.
        exp_logits: ``(n, kept_width)`` to fill in, or None.
        statistics: whether to leave what the statistics need.
        num_active: ``()`` int32: rows from there on are not wanted, and their results are
            undefined.
    """
    blocks = of.forward
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    result = new_results(shift, vocabulary, of, exp_logits, statistics)
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
        shift,
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


def forward_naive(
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
    x = others * transform.scale - shift.double()[:, None]
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
        shift=shift,
        tile_sumexp=tiled(e).sum(2).T.float().contiguous(),
        target_logit=t.gather(1, targets[:, None]).squeeze(1).float(),
        statistics=found,
        exp_logits=exp_logits,
    )
