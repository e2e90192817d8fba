"""From partial sums to log-probs, row by row.

With R the row's shift (see :mod:`.forward`), and the target's own term apart from the sum over the other tokens:

    rest    = sum over tiles of tile_sumexp
    x       = scale * t[y] - R
    sumexp  = rest + 2**x
    lse     = (R + log2 sumexp) * ln 2
    logp    = -log1p(rest / 2**x)

in float64, a few operations per row. What was kept is completed here: its entry at the target, 0 so
far, becomes ``-rest * (1 - t**2)``, so that with ``p = exp_logits / sumexp``

    d logp_i / d u_iv = -slope * exp_logits[i, v] / sumexp_i

holds in every column. ``1 - p`` of a token near certainty keeps all its bits that way, where
rounding p would leave none. That entry is the row's largest, so its rounding would be the largest
error; the row's `row_scale` makes up for it. It is ``1 / sumexp`` times what the entry should be over
what it was rounded to, so the target's part is exact, and the others', which has the same sum but
is spread over the vocabulary, carries the relative error instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .config import COMBINE_ROWS, COMBINE_TILES, SMALL
from .epilogue import SQUARED
from .forward import Forward, Transform
from .repair import OVERFLOW
from .tiles import LN2, grid, jit


@dataclass(frozen=True)
class Softmax:
    """What is known of n rows once their partial sums are combined; float32.

    Attributes:
        logps, lse: ``(n,)``, in nats.
        rest: ``(n,)`` sum of E over all tokens but the target.
        row_scale: ``(n,)``: what was kept, times this, is a probability; 1 / sumexp where nothing was.
        statistics: ``(5, n)``, the lines of :data:`fastdpop.engines.STATISTICS`, or None.
    """

    logps: Tensor
    lse: Tensor
    rest: Tensor
    row_scale: Tensor
    statistics: Tensor | None


@triton.jit
def _log1p(x):
    """Natural logarithm of ``1 + x``, float64, x >= 0, to float32's precision of the result: by its
    series where ``1 + x`` would leave nothing of x.
    """
    return tl.where(x < 2.0**-20, x - 0.5 * x * x, tl.log(1.0 + x))


@jit
def combine_kernel(
    tile_sumexp,  # (tiles, n)
    target_logit,  # (n,)
    shift,  # (n,)
    targets,  # (n,)
    tile_statistics,  # (4, tiles, n) or None
    exp_logits,  # (n, tiles * BLOCK_V) or None
    logps,  # (n,)
    lse,  # (n,)
    rest,  # (n,)
    row_scale,  # (n,)
    statistics,  # (5, n) or None
    rows,
    tile_count,
    vocabulary,
    kept_stride,
    scale,
    again,
    BLOCK_N: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    KEEP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """A block of rows, see the module; `again`, after the repair: of rows that overflowed only.
    With STATISTICS also, in the order of :data:`fastdpop.engines.STATISTICS`,

        entropy  = (log2 sumexp - Q / sumexp) * ln 2,   Q = x 2**x + sum (z - R) E
        mean     = scale * ln 2 * sum t / V
        accuracy = t[y] >= max t
        aligned  = logp - ln(4**x + sum E**2) + 2 ln sumexp
        largest  = scale * ln 2 * max t
    """
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = r < rows
    if again != 0:
        before = tl.load(rest + r, inside, other=0.0)
        inside = inside & tl.where(before < OVERFLOW, False, True)
        if tl.sum(inside.to(tl.int32), 0) == 0:
            return

    # The sum over tiles.
    others = tl.zeros((BLOCK_N,), tl.float64)
    for first in range(0, tile_count, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        at = tile.to(tl.int64)[:, None] * rows + r[None, :]
        there = (tile < tile_count)[:, None] & inside[None, :]
        others += tl.sum(tl.load(tile_sumexp + at, there, other=0.0).to(tl.float64), 0)

    # Log-prob and log-sum-exp.
    t = tl.load(target_logit + r, inside, other=0.0)
    row_shift = tl.load(shift + r, inside, other=0.0)
    x = tl.fma(t, scale, -row_shift)
    own = tl.exp2(x.to(tl.float64))
    s = others + own
    log_s = tl.log(s)
    # Where the target's own term underflows, its logarithm does not.
    far = x.to(tl.float64) * LN2 - log_s
    logp = tl.where(x < -64.0, far, -_log1p(others / own))
    tl.store(logps + r, logp.to(tl.float32), inside)
    tl.store(lse + r, (row_shift.to(tl.float64) * LN2 + log_s).to(tl.float32), inside)
    tl.store(rest + r, others.to(tl.float32), inside)
    factor = 1.0 / s

    # What was kept, at the target.
    if KEEP:
        entry = -others
        if SOFTCAP:
            entry = entry * tl.maximum(tl.fma(-t, t, 1.0), 0.0).to(tl.float64)
        y = tl.load(targets + r, inside, other=0)
        place = exp_logits + r.to(tl.int64) * kept_stride + y
        rounded = tiles.narrow(entry.to(tl.float32), exp_logits.dtype.element_ty)
        tl.store(place, rounded, inside)
        rounded = rounded.to(tl.float32).to(tl.float64)
        # Only where it was rounded: beyond the dtype's range, an infinity has to show.
        usual = (rounded != 0.0) & (tl.abs(rounded) < float("inf"))
        factor *= tl.where(usual, entry / rounded, 1.0)
    tl.store(row_scale + r, factor.to(tl.float32), inside)

    if STATISTICS:
        q = tl.zeros((BLOCK_N,), tl.float64)
        plain = tl.zeros((BLOCK_N,), tl.float64)
        squares = tl.zeros((BLOCK_N,), tl.float64)
        highest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        step = tile_count.to(tl.int64) * rows
        for first in range(0, tile_count, BLOCK_TILES):
            tile = first + tl.arange(0, BLOCK_TILES)
            own_at = tile_statistics + tile.to(tl.int64)[:, None] * rows + r[None, :]
            there = (tile < tile_count)[:, None] & inside[None, :]
            q += tl.sum(tl.load(own_at, there, other=0.0).to(tl.float64), 0)
            plain += tl.sum(tl.load(own_at + step, there, other=0.0).to(tl.float64), 0)
            squares += tl.sum(tl.load(own_at + 2 * step, there, other=0.0).to(tl.float64), 0)
            top = tl.load(own_at + 3 * step, there, other=float("-inf"))
            highest = tl.maximum(highest, tl.max(top, 0))
        q += tl.where(own > 0.0, x.to(tl.float64) * own, 0.0)
        entropy = log_s - q / s * LN2
        mean = plain * (scale * LN2) / vocabulary
        small = own * SQUARED
        collision = tl.log(squares + small * small) + 80.0 * LN2
        tl.store(statistics + r, entropy.to(tl.float32), inside)
        tl.store(statistics + rows + r, mean.to(tl.float32), inside)
        tl.store(statistics + 2 * rows + r, (t >= highest).to(tl.float32), inside)
        tl.store(statistics + 3 * rows + r, (logp - collision + 2.0 * log_s).to(tl.float32), inside)
        largest = tl.maximum(highest, t).to(tl.float64) * (scale * LN2)
        tl.store(statistics + 4 * rows + r, largest.to(tl.float32), inside)


def combine(
    done: Forward,
    targets: Tensor,
    transform: Transform,
    vocabulary: int,
    *,
    again: Softmax | None = None,
) -> Softmax:
    """Launch the combination, which completes `done.exp_logits` at the targets `targets` ``(n,)``.

    With `again`, an earlier result, of rows that :mod:`.repair` has computed once more; it
    is changed and returned.
    """
    tile_count, rows = done.tile_sumexp.shape
    result = again
    if result is None:
        new = done.shift.new_empty
        found = None if done.statistics is None else new((5, rows))
        result = Softmax(new(rows), new(rows), new(rows), new(rows), found)
    if rows == 0:
        return result
    kept = done.exp_logits
    combine_kernel[grid(-(-rows // COMBINE_ROWS))](
        done.tile_sumexp,
        done.target_logit,
        done.shift,
        targets,
        done.statistics,
        kept,
        result.logps,
        result.lse,
        result.rest,
        result.row_scale,
        result.statistics,
        rows,
        tile_count,
        vocabulary,
        0 if kept is None else kept.stride(0),
        transform.scale,
        int(again is not None),
        BLOCK_N=COMBINE_ROWS,
        BLOCK_TILES=COMBINE_TILES,
        KEEP=kept is not None,
        SOFTCAP=transform.softcap and kept is not None,
        STATISTICS=done.statistics is not None,
        **SMALL.options(),
    )
    return result


def combine_naive(done: Forward, targets: Tensor, transform: Transform, vocabulary: int) -> Softmax:
    """The same in plain torch and float64."""
    ln2 = math.log(2.0)
    others = done.tile_sumexp.double().sum(0)
    t, row_shift = done.target_logit.double(), done.shift.double()
    x = t * transform.scale - row_shift
    s = others + torch.exp2(x)
    logp = torch.where(x < -64, x * ln2 - s.log(), -torch.log1p(others / torch.exp2(x)))
    scale = 1 / s
    if done.exp_logits is not None:
        entry = -others * (1 - t**2 if transform.softcap else 1.0)
        rounded = entry.to(done.exp_logits.dtype)
        rows = torch.arange(len(t), device=t.device)
        done.exp_logits[rows, targets] = rounded
        usual = (rounded != 0) & rounded.isfinite()
        scale *= torch.where(usual, entry / rounded.double(), 1.0)
    statistics = None
    if done.statistics is not None:
        weighted, plain, squares, highest = done.statistics.double()
        own = torch.exp2(x)
        collision = squares.sum(0) * 2.0**80 + own**2
        statistics = torch.stack(
            [
                s.log() - (weighted.sum(0) + torch.where(own > 0, x * own, 0)) / s * ln2,
                plain.sum(0) * transform.scale * ln2 / vocabulary,
                (t >= highest.amax(0)).double(),
                logp - collision.log() + 2 * s.log(),
                torch.maximum(highest.amax(0), t) * transform.scale * ln2,
            ]
        ).float()
    return Softmax(
        logps=logp.float(),
        lse=(row_shift * ln2 + s.log()).float(),
        rest=others.float(),
        row_scale=scale.float(),
        statistics=statistics,
    )
