"""Gradients from the kept softmax.

With the share of a tile in a row's softmax, ``share = 2**(m - M - log2 S)``, a probability is
``p = kept * share`` (and kept has the slope in it already). Let A be that, and at the target
``-(1 - p) * slope``. Then, slope0 being the constant part of the slope,

    d logp_i / d u_iv = -slope0 * A[i, v]
    dHidden_i = -slope0 * c_i * (A @ weight)_i
    dWeight   = (-slope0 * c * A).T @ hidden

What was kept is multiplied by shares in float32 while operands are loaded, and rounded to the
products' dtype again; or A is formed in memory beforehand (:func:`rescale`), and cuBLAS takes the
products. The target's 1 - p is a number of its own (:mod:`.combine`), or a token near certainty would
lose its gradient in the rounding of p: :func:`place_targets` writes it, and with it that tile of its
row as A, whose share is 1 from then on. :func:`weigh` does the same with coefficients, between
dHidden (c times a product) and dWeight (a product with c under the sum), so that the largest number
of a row is rounded once in each. It divides them by a power of 2 near the largest, `peak`, which
dWeight is multiplied by: float16's range does not hold small ones.

A row's coefficient may be 0. Where rows were sorted so that those come last (`live` counts the
others on the device), tiles of such rows end at once, and sums over rows stop before them. In the
tile where they begin, dHidden is set to 0 and shares of dWeight are.

`listed` is gradient filtering: only the listed pieces of the sums are added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles as t
from .combine import Softmax
from .config import (
    COMBINE_ROWS,
    COMBINE_TILES,
    INTERPRETED,
    SCALE_ROWS,
    SMALL,
    SUM_WIDTH,
    TARGET_ROWS,
    Tiles,
)
from .forward import Partials
from .tiles import (
    aligned,
    dot,
    grid,
    grouped,
    load_block,
    narrow,
    operand,
    rescaled,
    store_block,
)


@dataclass(frozen=True)
class Listed:
    """Which pieces of the sum behind each block of a result count: ``(blocks, pieces)`` int32 with
    the numbers of the pieces in ascending order, and how many there are, ``(blocks,)`` int32.
    """

    pieces: Tensor
    counts: Tensor


@triton.jit
def _power_of(peak):
    """The power of 2 that coefficients are divided by: the largest is near 1 then. 0 for 0."""
    return tl.where(peak > 0.0, tl.ceil(tl.log2(tl.maximum(peak, 1e-38))), 0.0)


@triton.jit
def _coefficient(coefficients, peak, r, inside):
    """Coefficients of rows, divided."""
    return tl.load(coefficients + r, inside, other=0.0) * tl.exp2(-_power_of(tl.load(peak)))


@triton.jit(do_not_specialize=["rows"])
def place_targets_kernel(
    kept,
    targets,
    target_logits,
    rests,
    tops,
    row_tops,
    logs,
    coefficients,
    peak,
    live,
    rows,
    kept_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WEIGH: tl.constexpr,
    LIVE: tl.constexpr,
):
    """A in the tile of each row that holds its target; with WEIGH, c * A there."""
    first = tl.program_id(0) * ROWS
    if LIVE:
        if first >= tl.load(live):
            return
    r = first + tl.arange(0, ROWS)
    inside = r < rows
    y = tl.load(targets + r, inside, other=0)
    tile = y // TOKENS
    v = (tile * TOKENS)[:, None] + tl.arange(0, TOKENS)[None, :]
    at = r.to(tl.int64)[:, None] * kept_stride + v
    own = -tl.load(rests + r, inside, other=0.0)
    if WEIGH:
        factor = _coefficient(coefficients, peak, r, inside)
        own = own * factor
    else:
        power = tl.load(tops + tile * rows + r, inside, other=0.0)
        power = power - tl.load(row_tops + r, inside, other=0.0)
        factor = tl.exp2(power - tl.load(logs + r, inside, other=0.0))
    a = rescaled(tl.load(kept + at, inside[:, None], other=0.0), factor)
    if SOFTCAP:
        own_t = tl.load(target_logits + r, inside, other=0.0)
        own = own * (1.0 - own_t * own_t)
    a = tl.where(v == y[:, None], narrow(own, DTYPE)[:, None], a)
    tl.store(kept + at, a, inside[:, None])


@triton.jit(do_not_specialize=["rows", "columns"])
def shares_kernel(
    tops,
    row_tops,
    logs,
    targets,
    coefficients,
    peak,
    rows,
    columns,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    WEIGH: tl.constexpr,
    RESCALED: tl.constexpr,
):
    """The share of each tile in each row's softmax, in the place of the tile's maximum; with WEIGH,
    c times the share (of 1 where everything is RESCALED) in its place, 0 where c is 0. 1 where the
    target has been placed.
    """
    blocks = tl.cdiv(rows, ROWS)
    r = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) // blocks * TILES + tl.arange(0, TILES)
    inside = r < rows
    there = (tile < columns)[:, None] & inside[None, :]
    at = tops + tile.to(tl.int64)[:, None] * rows + r[None, :]
    placed = tile[:, None] == (tl.load(targets + r, inside, other=0) // TOKENS)[None, :]
    before = tl.load(at, there, other=0.0)
    if WEIGH:
        c = _coefficient(coefficients, peak, r, inside)[None, :]
        share = c + tl.zeros_like(before) if RESCALED else c * before
        share = tl.where(placed, 1.0, share)
        share = tl.where(c == 0.0, 0.0, share)
    else:
        power = before - tl.load(row_tops + r, inside, other=0.0)[None, :]
        share = tl.exp2(power - tl.load(logs + r, inside, other=0.0)[None, :])
        share = tl.where(placed, 1.0, share)
    tl.store(at, share, there)


@triton.jit(do_not_specialize=["rows"])
def rescale_kernel(
    kept,
    shares,
    rows,
    kept_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What was kept times its share, in its place: one tile of the vocabulary, ROWS rows."""
    blocks = tl.cdiv(rows, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    tile = tl.program_id(0) // blocks
    r = first + tl.arange(0, ROWS)
    inside = r < rows
    v = tile * TOKENS + tl.arange(0, TOKENS)
    at = kept + r.to(tl.int64)[:, None] * kept_stride + v[None, :]
    share = tl.load(shares + tile.to(tl.int64) * rows + r, inside, other=0.0)
    a = rescaled(tl.load(at, inside[:, None], other=0.0), share)
    # Rows that were not wanted were not written: 0 times NaN is not 0.
    tl.store(at, tl.where((share == 0.0)[:, None], 0.0, a).to(a.dtype), inside[:, None])


@triton.jit(do_not_specialize=["rows", "vocabulary", "width"])
def hidden_kernel(
    kept,
    weight,
    out,
    shares,
    coefficients,
    live,
    pieces,
    counts,
    rows,
    vocabulary,
    width,
    kept_stride,
    weight_stride,
    gain,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    LIVE: tl.constexpr,
    LISTED: tl.constexpr,
):
    """A tile of dHidden, or without COEFFICIENTS of the direction d logp / d hidden."""
    row_block, column = grouped(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(width, WIDTH), GROUP)
    row = row_block * ROWS
    if LIVE:
        if row >= tl.load(live):
            return
    r = row + tl.arange(0, ROWS)
    inside = r < rows
    first = column * WIDTH
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    STEPS: tl.constexpr = TOKENS // DEPTH
    if LISTED:
        steps = tl.load(counts + row_block) * STEPS
        own_pieces = pieces + row_block.to(tl.int64) * tl.cdiv(vocabulary, TOKENS)
    else:
        steps = tl.cdiv(vocabulary, DEPTH)
    for step in range(0, steps):
        if LISTED:
            tile = tl.load(own_pieces + step // STEPS)
            v = tile * TOKENS + step % STEPS * DEPTH
        else:
            tile = step // STEPS
            v = step * DEPTH
        a = load_block(kept, row, v, rows, kept_stride, kept_stride, ROWS, DEPTH, DESCRIPTORS)
        a = rescaled(a, tl.load(shares + tl.cast(tile, tl.int64) * rows + r, inside, other=0.0))
        w = load_block(
            weight, v, first, vocabulary, width, weight_stride, DEPTH, WIDTH, DESCRIPTORS
        )
        acc = dot(a, w, acc)
    factor = tl.full((ROWS,), gain, tl.float32)
    if COEFFICIENTS:
        factor *= tl.load(coefficients + r, inside, other=0.0)
    HALF: tl.constexpr = WIDTH // 2
    left, right = t.halves(acc, ROWS, WIDTH)
    # A row with coefficient 0 may not have been computed: 0 times NaN is not 0.
    left = tl.where((factor == 0.0)[:, None], 0.0, left * factor[:, None])
    store_block(out, row, first, rows, width, narrow(left, DTYPE), ROWS, HALF, DESCRIPTORS)
    right = tl.where((factor == 0.0)[:, None], 0.0, right * factor[:, None])
    store_block(out, row, first + HALF, rows, width, narrow(right, DTYPE), ROWS, HALF, DESCRIPTORS)


@triton.jit(do_not_specialize=["rows", "vocabulary", "width"])
def weight_kernel(
    kept,
    hidden,
    out,
    shares,
    peak,
    live,
    pieces,
    counts,
    rows,
    vocabulary,
    width,
    kept_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ADD: tl.constexpr,
    LIVE: tl.constexpr,
    LISTED: tl.constexpr,
):
    """A tile of dWeight, ROWS tokens by WIDTH; one program writes it, so with ADD it reads what
    earlier chunks left there and adds to it: the order of additions is that of the chunks.
    """
    block, column = grouped(
        tl.program_id(0), tl.cdiv(vocabulary, ROWS), tl.cdiv(width, WIDTH), GROUP
    )
    token = block * ROWS
    first = column * WIDTH
    tile = token // TOKENS
    stop = rows
    if LIVE:
        stop = tl.load(live)
    if LISTED:
        steps = tl.load(counts + block)
        own_pieces = pieces + block.to(tl.int64) * tl.cdiv(rows, DEPTH)
    else:
        steps = tl.cdiv(stop, DEPTH)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in range(0, steps):
        if LISTED:
            row = tl.load(own_pieces + step) * DEPTH
        else:
            row = step * DEPTH
        a = load_block(kept, row, token, rows, kept_stride, kept_stride, DEPTH, ROWS, DESCRIPTORS)
        r = row + tl.arange(0, DEPTH)
        inside = r < stop
        a = rescaled(a, tl.load(shares + tile.to(tl.int64) * rows + r, inside, other=0.0))
        h = load_block(hidden, row, first, rows, width, width, DEPTH, WIDTH, DESCRIPTORS)
        acc = dot(a.T, h, acc)
    acc = acc * tl.exp2(_power_of(tl.load(peak)))
    HALF: tl.constexpr = WIDTH // 2
    left, right = t.halves(acc, ROWS, WIDTH)
    if ADD:
        left += load_block(out, token, first, vocabulary, width, width, ROWS, HALF, DESCRIPTORS)
    store_block(out, token, first, vocabulary, width, left, ROWS, HALF, DESCRIPTORS)
    middle = first + HALF
    if ADD:
        right += load_block(out, token, middle, vocabulary, width, width, ROWS, HALF, DESCRIPTORS)
    store_block(out, token, middle, vocabulary, width, right, ROWS, HALF, DESCRIPTORS)


@triton.jit(do_not_specialize=["rows", "vocabulary"])
def bias_kernel(
    kept,
    out,
    shares,
    peak,
    live,
    rows,
    vocabulary,
    kept_stride,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    RESCALE: tl.constexpr,
    ADD: tl.constexpr,
    LIVE: tl.constexpr,
):
    """dBias of WIDTH tokens: ``sum_i c_i * A[i, v]``, in the order of the rows."""
    token = tl.program_id(0) * WIDTH
    v = token + tl.arange(0, WIDTH)
    tile = token // TOKENS
    stop = rows
    if LIVE:
        stop = tl.load(live)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, stop, ROWS):
        r = first + tl.arange(0, ROWS)
        inside = r < stop
        at = r.to(tl.int64)[:, None] * kept_stride + v[None, :]
        a = tl.load(kept + at, inside[:, None], other=0.0).to(tl.float32)
        if RESCALE:
            a *= tl.load(shares + tile.to(tl.int64) * rows + r, inside, other=0.0)[:, None]
        total += tl.sum(a, 0)
    total *= tl.exp2(_power_of(tl.load(peak)))
    inside = v < vocabulary
    if ADD:
        total += tl.load(out + v, inside, other=0.0)
    tl.store(out + v, total, inside)


@triton.jit(do_not_specialize=["rows", "columns"])
def list_kernel(
    shares,
    live,
    pieces,
    counts,
    rows,
    columns,
    lowest,
    ROWS: tl.constexpr,
    PER_TILE: tl.constexpr,
    BY_TILE: tl.constexpr,
    LIVE: tl.constexpr,
):
    """Which (ROWS rows, vocabulary tile) pieces can hold a probability of at least `lowest`.

    No probability is above its tile's share, and the target's tile has share 1. One program a
    row block lists its tiles; BY_TILE, one program a dWeight block (PER_TILE of them a tile) lists
    its row blocks.
    """
    own = tl.program_id(0)
    stop = rows
    if LIVE:
        stop = tl.load(live)
    if BY_TILE:
        candidates = tl.cdiv(stop, ROWS)
        width = tl.cdiv(rows, ROWS)
    else:
        candidates = columns
        width = columns
    count = 0
    for candidate in range(0, candidates):
        if BY_TILE:
            r = candidate * ROWS + tl.arange(0, ROWS)
            tile = own // PER_TILE
        else:
            r = own * ROWS + tl.arange(0, ROWS)
            tile = candidate
        inside = r < stop
        at = tl.cast(tile, tl.int64) * rows + r
        bound = tl.load(shares + at, inside, other=0.0)
        # Written so that a NaN, which must show in the result, is never left out.
        if tl.max(tl.where(bound < lowest, 0, 1) * inside.to(tl.int32), 0) > 0:
            tl.store(pieces + tl.cast(own, tl.int64) * width + count, candidate)
            count += 1
    tl.store(counts + own, count)


def place_targets(
    partials: Partials,
    softmax: Softmax,
    targets: Tensor,
    config: Tiles,
    softcap: bool,
    live: Tensor | None = None,
) -> None:
    """Launch it; changes `kept`, and `tops` into shares: what dHidden is formed of."""
    _place(partials, softmax, targets, config, softcap, None, live, False)


def weigh(
    partials: Partials,
    softmax: Softmax,
    targets: Tensor,
    config: Tiles,
    softcap: bool,
    coefficients: Tensor,
    live: Tensor | None = None,
    *,
    all_rescaled: bool = False,
) -> Tensor:
    """Launch it, after :func:`place_targets`; changes `kept` and the shares into what dWeight and
    dBias are formed of. `coefficients` are those of A: slope0 is theirs. Returns the largest, 0-d.

    With `all_rescaled`, :func:`rescale` has made A of all that was kept.
    """
    peak = coefficients.abs().amax()
    of = (coefficients, peak)
    _place(partials, softmax, targets, config, softcap, of, live, all_rescaled)
    return peak


def _place(
    partials: Partials,
    softmax: Softmax,
    targets: Tensor,
    config: Tiles,
    softcap: bool,
    coefficients: tuple[Tensor, Tensor] | None,
    live: Tensor | None,
    all_rescaled: bool,
) -> None:
    assert partials.kept is not None
    columns, rows = partials.tops.shape
    c, peak = coefficients or (partials.targets, partials.targets)
    place_targets_kernel[grid(-(-rows // TARGET_ROWS))](
        partials.kept,
        targets,
        partials.targets,
        softmax.rests,
        partials.tops,
        softmax.tops,
        softmax.logs,
        c,
        peak,
        targets if live is None else live,
        rows,
        partials.kept.stride(0),
        TOKENS=config.tokens,
        ROWS=TARGET_ROWS,
        DTYPE=t.DTYPES[partials.kept.dtype],
        SOFTCAP=softcap,
        WEIGH=coefficients is not None,
        LIVE=live is not None,
        **SMALL.options(),
    )
    blocks = -(-rows // COMBINE_ROWS) * -(-columns // COMBINE_TILES)
    shares_kernel[grid(blocks)](
        partials.tops,
        softmax.tops,
        softmax.logs,
        targets,
        c,
        peak,
        rows,
        columns,
        TOKENS=config.tokens,
        ROWS=COMBINE_ROWS,
        TILES=COMBINE_TILES,
        WEIGH=coefficients is not None,
        RESCALED=all_rescaled,
        **SMALL.options(),
    )


def rescale(partials: Partials, config: Tiles) -> None:
    """Launch it: for cuBLAS, after :func:`place_targets` and again after :func:`weigh`."""
    assert partials.kept is not None
    columns, rows = partials.tops.shape
    rescale_kernel[grid(-(-rows // SCALE_ROWS) * columns)](
        partials.kept,
        partials.tops,
        rows,
        partials.kept.stride(0),
        TOKENS=config.tokens,
        ROWS=SCALE_ROWS,
        **SMALL.options(),
    )


def hidden_gradient(
    partials: Partials,
    weight: Tensor,
    out: Tensor,
    config: Tiles,
    gain: float,
    *,
    coefficients: Tensor | None = None,
    live: Tensor | None = None,
    listed: Listed | None = None,
) -> None:
    """Launch dHidden, or the direction without coefficients, into `out` ``(n, H)``.

    Rows from `live` on are written only where they share a tile with rows before it.
    """
    kept = partials.kept
    assert kept is not None
    rows, (vocabulary, width) = partials.tops.shape[1], weight.shape
    described = config.descriptors and aligned(kept) and aligned(weight) and aligned(out)
    programs = -(-rows // config.hidden_rows) * -(-width // config.hidden_width)
    unused = partials.tops
    hidden_kernel[grid(programs)](
        operand(kept, (config.hidden_rows, config.hidden_depth), described),
        operand(weight, (config.hidden_depth, config.hidden_width), described),
        operand(out, (config.hidden_rows, config.hidden_width // 2), described),
        partials.tops,
        unused if coefficients is None else coefficients,
        unused if live is None else live,
        unused if listed is None else listed.pieces,
        unused if listed is None else listed.counts,
        rows,
        vocabulary,
        width,
        kept.stride(0),
        weight.stride(0),
        gain,
        TOKENS=config.tokens,
        ROWS=config.hidden_rows,
        WIDTH=config.hidden_width,
        DEPTH=config.hidden_depth,
        GROUP=config.group,
        DESCRIPTORS=described,
        DTYPE=t.DTYPES[out.dtype],
        COEFFICIENTS=coefficients is not None,
        LIVE=live is not None,
        LISTED=listed is not None,
        **config.hidden.options(),
    )


def weight_gradient(
    partials: Partials,
    hidden: Tensor,
    peak: Tensor,
    out: Tensor,
    config: Tiles,
    *,
    add: bool,
    live: Tensor | None = None,
    listed: Listed | None = None,
) -> None:
    """Launch dWeight into `out` ``(V, H)`` float32: over what is there, or added to it."""
    kept = partials.kept
    assert kept is not None
    rows, width = hidden.shape
    vocabulary = out.shape[0]
    described = config.descriptors and aligned(kept) and aligned(hidden) and aligned(out)
    programs = -(-vocabulary // config.weight_tokens) * -(-width // config.weight_width)
    unused = partials.tops
    weight_kernel[grid(programs)](
        operand(kept, (config.weight_depth, config.weight_tokens), described),
        operand(hidden, (config.weight_depth, config.weight_width), described),
        operand(out, (config.weight_tokens, config.weight_width // 2), described),
        partials.tops,
        peak,
        unused if live is None else live,
        unused if listed is None else listed.pieces,
        unused if listed is None else listed.counts,
        rows,
        vocabulary,
        width,
        kept.stride(0),
        TOKENS=config.tokens,
        ROWS=config.weight_tokens,
        WIDTH=config.weight_width,
        DEPTH=config.weight_depth,
        GROUP=config.group,
        DESCRIPTORS=described,
        ADD=add,
        LIVE=live is not None,
        LISTED=listed is not None,
        **config.weight.options(),
    )


def bias_gradient(
    partials: Partials,
    peak: Tensor,
    out: Tensor,
    config: Tiles,
    *,
    add: bool,
    live: Tensor | None = None,
    rescaled: bool = False,
) -> None:
    """Launch dBias into `out` ``(V,)`` float32."""
    assert partials.kept is not None
    rows, vocabulary = partials.tops.shape[1], len(out)
    width = min(SUM_WIDTH, config.tokens)
    bias_kernel[grid(-(-vocabulary // width))](
        partials.kept,
        out,
        partials.tops,
        peak,
        peak if live is None else live,
        rows,
        vocabulary,
        partials.kept.stride(0),
        TOKENS=config.tokens,
        WIDTH=width,
        ROWS=SCALE_ROWS,
        RESCALE=not rescaled,
        ADD=add,
        LIVE=live is not None,
        **SMALL.options(),
    )


def list_pieces(
    partials: Partials,
    config: Tiles,
    vocabulary: int,
    lowest: float,
    live: Tensor | None = None,
) -> tuple[Listed, Listed]:
    """Launch the listing for dHidden and for dWeight, after :func:`place_targets`: pieces that can
    hold a probability of at least `lowest`.
    """
    columns, rows = partials.tops.shape

    def listed(blocks: int, pieces: int, size: int, by_tile: bool) -> Listed:
        new = partials.tops.new_empty
        result = Listed(new((blocks, pieces), dtype=torch.int32), new(blocks, dtype=torch.int32))
        list_kernel[grid(blocks)](
            partials.tops,
            partials.tops if live is None else live,
            result.pieces,
            result.counts,
            rows,
            columns,
            lowest,
            ROWS=size,
            PER_TILE=config.tokens // config.weight_tokens,
            BY_TILE=by_tile,
            LIVE=live is not None,
            **SMALL.options(),
        )
        return result

    of_hidden = listed(-(-rows // config.hidden_rows), columns, config.hidden_rows, False)
    blocks = -(-vocabulary // config.weight_tokens)
    of_weight = listed(blocks, -(-rows // config.weight_depth), config.weight_depth, True)
    return of_hidden, of_weight


def softmax_twin(
    partials: Partials, softmax: Softmax, targets: Tensor, config: Tiles, softcap: bool
) -> Tensor:
    """A in plain torch and float64, ``(n, whole tiles)``, of what :func:`.forward.forward` left."""
    assert partials.kept is not None
    kept = partials.kept.double().view(len(targets), -1, config.tokens)
    power = partials.tops.double() - softmax.tops.double() - softmax.logs.double()
    a = (kept * torch.exp2(power).T[..., None]).view(len(targets), -1)
    own = -softmax.rests.double()
    if softcap:
        own = own * (1 - partials.targets.double() ** 2)
    return a.scatter_(1, targets[:, None], own[:, None])


def gradients_twin(
    a: Tensor, hidden: Tensor, weight: Tensor, c: Tensor, gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dHidden, dWeight and dBias in plain torch and float64, from A."""
    a = a[:, : weight.shape[0]].double()
    factor = (gain * c.double())[:, None]
    return factor * (a @ weight.double()), a.T @ (factor * hidden.double()), (factor * a).sum(0)


def unscaled(value: Tensor, peak: Tensor) -> Tensor:
    """A product of cuBLAS times what dWeight is multiplied by, in place."""
    power = torch.where(peak > 0, peak.clamp_min(1e-38).log2().ceil(), 0.0)
    return value.mul_(torch.exp2(power))


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32 by cuBLAS, of 16-bit operands; in the interpreter by plain torch."""
    if INTERPRETED:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
