"""From partial sums to log-probs, and from log-probs to a pair's loss.

With the partial sums of a row, tile by tile, and M the largest of its m:

    R       = sum_tiles 2**(m - M) * total
    x       = scale * t[y] - M
    S       = R + 2**x                            the target is not in the totals
    lse     = (M + log2 S) * ln 2
    logp    = (x - log2 S) * ln 2                 near certainty -log1p(R / 2**x)
    rest    = R / S                               1 - p of the target

M and log2 S stay apart: their sum would lose the bits that ``p = e * 2**(m - M - log2 S)`` needs.
The order of additions depends on the number of tiles alone.

:func:`pair_loss_kernel` goes on in the same launch, one program a pair: sums over each of its two
sequences, in float64 as everywhere in this package, the loss, its derivatives, and the coefficient
of every row. The loss is an argument, a jitted function; :mod:`.losses` has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import COMBINE_ROWS, COMBINE_TILES, SMALL
from .forward import Partials, Transform
from .tiles import LN2, LOWEST, grid


@dataclass(frozen=True)
class Softmax:
    """What is known of n rows once their partial sums are combined; float32, ``(n,)`` each."""

    logps: Tensor
    lse: Tensor
    rests: Tensor
    tops: Tensor
    logs: Tensor


@dataclass(frozen=True)
class PairPlan:
    """Pairs whose rows lie side by side: pair i's chosen rows are ``offsets[2i]`` to
    ``offsets[2i + 1]``, its rejected ones follow.

    Attributes:
        offsets: ``(2P + 1,)`` int64.
        order: ``(P,)`` int64, where each pair stands in `reference` and in the results.
        reference: ``(2, P)`` float32 log-probs of chosen and rejected.
        loss: a jitted function of :mod:`.losses`, and its three numbers.
        share: factor of a pair's loss in the total.
    """

    offsets: Tensor
    order: Tensor
    reference: Tensor
    loss: Any
    numbers: tuple[float, float, float]
    share: float


@triton.jit
def _finish(m, others, target, scale):
    """S, its log2, logp, lse and 1 - p of rows, from M, R and t of the target."""
    x = tl.fma(target, scale, -m)
    own = tl.exp2(x)
    s = others + own
    log = tl.log2(s)
    odds = others / own
    near = -odds * (1.0 - odds * (0.5 - odds * (0.3333333333333333 - odds * 0.25)))
    logp = tl.where(odds < 0.03, near, (x - log) * LN2)
    return s, log, logp, (m + log) * LN2, others / s


@triton.jit
def _combined(tops, totals, r, inside, rows, columns, ROWS: tl.constexpr, TILES: tl.constexpr):
    """M and R of a block of rows."""
    m = tl.full((ROWS,), LOWEST, tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    for first in range(0, columns, TILES):
        tile = first + tl.arange(0, TILES)
        at = tile.to(tl.int64)[:, None] * rows + r[None, :]
        there = (tile < columns)[:, None] & inside[None, :]
        top = tl.load(tops + at, there, other=LOWEST)
        total = tl.load(totals + at, there, other=0.0)
        highest = tl.maximum(m, tl.max(top, 0))
        s = s * tl.exp2(m - highest) + tl.sum(total * tl.exp2(top - highest[None, :]), 0)
        m = highest
    return m, s


@triton.jit(do_not_specialize=["rows", "columns", "vocabulary"])
def combine_kernel(
    tops,
    totals,
    targets,
    moments,
    logps,
    lse,
    rests,
    row_tops,
    logs,
    statistics,
    live,
    rows,
    columns,
    vocabulary,
    scale,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    MOMENTS: tl.constexpr,
    LIVE: tl.constexpr,
):
    """A block of rows, see the module. With MOMENTS also, in the order of
    :data:`fastdpop.engines.STATISTICS`,

        entropy  = (log2 S - Q / S) * ln 2,   Q = x 2**x + sum 2**(m - M) * (q + (m - M) * total)
        mean     = scale * ln 2 * sum t / V
        accuracy = t[y] >= max t
        aligned  = logp - ln(4**x + sum 4**(m - M) * squares) + 2 ln S
    """
    first_row = tl.program_id(0) * ROWS
    if LIVE:
        if first_row >= tl.load(live):
            return
    r = first_row + tl.arange(0, ROWS)
    inside = r < rows
    m, others = _combined(tops, totals, r, inside, rows, columns, ROWS, TILES)
    target = tl.load(targets + r, inside, other=0.0)
    s, log, logp, row_lse, rest = _finish(m, others, target, scale)
    tl.store(logps + r, logp, inside)
    tl.store(lse + r, row_lse, inside)
    tl.store(rests + r, rest, inside)
    tl.store(row_tops + r, m, inside)
    tl.store(logs + r, log, inside)
    if MOMENTS:
        x = tl.fma(target, scale, -m)
        own_e = tl.exp2(x)
        q = tl.where(own_e > 0.0, x * own_e, 0.0)
        plain = tl.zeros((ROWS,), tl.float32)
        squares = own_e * own_e
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        step = columns.to(tl.int64) * rows
        for first in range(0, columns, TILES):
            tile = first + tl.arange(0, TILES)
            at = tile.to(tl.int64)[:, None] * rows + r[None, :]
            there = (tile < columns)[:, None] & inside[None, :]
            off = tl.load(tops + at, there, other=LOWEST) - m[None, :]
            total = tl.load(totals + at, there, other=0.0)
            share = tl.exp2(off)
            own = tl.load(moments + at, there, other=0.0)
            q += tl.sum(share * (own + off * total), 0)
            plain += tl.sum(tl.load(moments + step + at, there, other=0.0), 0)
            own = tl.load(moments + 2 * step + at, there, other=0.0)
            squares += tl.sum(share * share * own, 0)
            top = tl.load(moments + 3 * step + at, there, other=float("-inf"))
            highest = tl.maximum(highest, tl.max(top, 0))
        tl.store(statistics + r, (log - q / s) * LN2, inside)
        tl.store(statistics + rows + r, plain * (scale * LN2) / vocabulary, inside)
        tl.store(statistics + 2 * rows + r, (target >= highest).to(tl.float32), inside)
        aligned = logp - (tl.log2(squares) - 2.0 * log) * LN2
        tl.store(statistics + 3 * rows + r, aligned, inside)


@triton.jit(do_not_specialize=["rows", "columns", "first_row", "first_pair"])
def pair_loss_kernel(
    tops,
    totals,
    targets,
    logps,
    lse,
    rests,
    row_tops,
    logs,
    offsets,
    order,
    reference,
    losses,
    sums,
    coefficients,
    rows,
    columns,
    first_row,
    first_pair,
    pairs,
    scale,
    share,
    number0,
    number1,
    number2,
    LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """One pair, see the module: rows ``first_row`` on of a batch, pairs ``first_pair`` on."""
    own = first_pair + tl.program_id(0)
    start = tl.load(offsets + 2 * own) - first_row
    middle = tl.load(offsets + 2 * own + 1) - first_row
    stop = tl.load(offsets + 2 * own + 2) - first_row
    chosen = tl.zeros((ROWS,), tl.float64)
    rejected = tl.zeros((ROWS,), tl.float64)
    for first in range(start, stop, ROWS):
        r = first + tl.arange(0, ROWS)
        inside = r < stop
        m, others = _combined(tops, totals, r, inside, rows, columns, ROWS, TILES)
        target = tl.load(targets + r, inside, other=0.0)
        _, log, logp, row_lse, rest = _finish(m, others, target, scale)
        tl.store(logps + r, logp, inside)
        tl.store(lse + r, row_lse, inside)
        tl.store(rests + r, rest, inside)
        tl.store(row_tops + r, m, inside)
        tl.store(logs + r, log, inside)
        wide = logp.to(tl.float64)
        chosen += tl.where(inside & (r < middle), wide, 0.0)
        rejected += tl.where(inside & (r >= middle), wide, 0.0)
    s_w = tl.sum(chosen, 0).to(tl.float32)
    s_l = tl.sum(rejected, 0).to(tl.float32)
    place = tl.load(order + own)
    loss, d_w, d_l = LOSS(
        s_w - tl.load(reference + place),
        s_l - tl.load(reference + pairs + place),
        tl.maximum(middle - start, 1).to(tl.float32),
        tl.maximum(stop - middle, 1).to(tl.float32),
        number0,
        number1,
        number2,
    )
    tl.store(losses + place, loss)
    tl.store(sums + 2 * own, s_w)
    tl.store(sums + 2 * own + 1, s_l)
    for first in range(start, stop, ROWS):
        r = first + tl.arange(0, ROWS)
        tl.store(coefficients + r, tl.where(r < middle, d_w * share, d_l * share), r < stop)


def _softmax(partials: Partials) -> Softmax:
    return Softmax(*(torch.empty_like(partials.targets) for _ in range(5)))


def combine(
    partials: Partials,
    transform: Transform,
    vocabulary: int,
    *,
    live: Tensor | None = None,
) -> tuple[Softmax, Tensor | None]:
    """Launch the combination; returns the statistics ``(4, n)`` too, where moments were left."""
    rows = len(partials.targets)
    result = _softmax(partials)
    statistics = None
    if partials.moments is not None:
        statistics = partials.targets.new_empty((4, rows))
    if rows == 0:
        return result, statistics
    unused = partials.targets
    combine_kernel[grid(-(-rows // COMBINE_ROWS))](
        partials.tops,
        partials.totals,
        partials.targets,
        unused if partials.moments is None else partials.moments,
        result.logps,
        result.lse,
        result.rests,
        result.tops,
        result.logs,
        unused if statistics is None else statistics,
        unused if live is None else live,
        rows,
        partials.tops.shape[0],
        vocabulary,
        transform.scale,
        ROWS=COMBINE_ROWS,
        TILES=COMBINE_TILES,
        MOMENTS=statistics is not None,
        LIVE=live is not None,
        **SMALL.options(),
    )
    return result, statistics


def pair_loss(
    partials: Partials,
    transform: Transform,
    plan: PairPlan,
    first_row: int,
    first_pair: int,
    last_pair: int,
    losses: Tensor,
    sums: Tensor,
) -> tuple[Softmax, Tensor]:
    """Launch combination and loss of pairs ``first_pair`` to ``last_pair - 1``, whose rows are
    those of the partial sums; returns the rows' coefficients.

    Args:
        losses: ``(P,)`` and sums: ``(2P,)`` float32, of which the pairs' own entries are filled in.
    """
    result = _softmax(partials)
    coefficients = torch.empty_like(partials.targets)
    if last_pair > first_pair:
        pair_loss_kernel[grid(last_pair - first_pair)](
            partials.tops,
            partials.totals,
            partials.targets,
            result.logps,
            result.lse,
            result.rests,
            result.tops,
            result.logs,
            plan.offsets,
            plan.order,
            plan.reference,
            losses,
            sums,
            coefficients,
            len(partials.targets),
            partials.tops.shape[0],
            first_row,
            first_pair,
            len(plan.order),
            transform.scale,
            plan.share,
            *plan.numbers,
            LOSS=plan.loss,
            ROWS=COMBINE_ROWS,
            TILES=COMBINE_TILES,
            **SMALL.options(),
        )
    return result, coefficients


def combine_twin(
    partials: Partials, transform: Transform, vocabulary: int
) -> tuple[Softmax, Tensor | None]:
    """The same in plain torch and float64."""
    tops, totals = partials.tops.double(), partials.totals.double()
    m = tops.amax(0)
    share = torch.exp2(tops - m)
    others = (totals * share).sum(0)
    x = partials.targets.double() * transform.scale - m
    s = others + torch.exp2(x)
    log = s.log2()
    ln2 = math.log(2.0)
    logp = -torch.log1p(others / torch.exp2(x))
    numbers = (logp, (m + log) * ln2, others / s, m, log)
    statistics = None
    if partials.moments is not None:
        weighted, plain, squares, highest = partials.moments.double()
        own = torch.exp2(x)
        q = (share * (weighted + (tops - m) * totals)).sum(0) + torch.where(own > 0, x * own, 0)
        collision = (share**2 * squares).sum(0) + own**2
        statistics = torch.stack(
            [
                (log - q / s) * ln2,
                plain.sum(0) * transform.scale * ln2 / vocabulary,
                (partials.targets >= highest.amax(0)).double(),
                logp - (collision.log2() - 2 * log) * ln2,
            ]
        ).float()
    return Softmax(*(n.float() for n in numbers)), statistics
