"""The Triton engine: the kernels of ``kernels/``, driven chunk by chunk of whole groups.

    forward product      logits tile by tile into partial sums; with gradients to come, the softmax
                         of the chunk is kept beside them, relative to each tile's maximum    2 units
    combination          log-probs; for the losses that have a kernel also the loss and every row's
                         coefficient, in the same launch
    dHidden, dWeight     products with what was kept, rescaled while it is loaded     2 units each

A group beyond the workspace goes through the forward product first for its log-probs, and then tile
by tile of rows once more (8 units instead of 6). There, and where the coefficients are known
beforehand, rows with coefficient 0 are sorted to the end on the device and skipped there, without
waiting for their number.

On a CUDA device, only the callback of a loss without a kernel waits for the device.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpop.engines.base import (
    STATISTICS,
    Coefficients,
    Gradients,
    Logps,
    PairLossPlan,
    Problem,
    Wanted,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("auto", "kernels", "cublas")
"""Who forms dHidden and dWeight from the kept softmax."""


class TritonEngine:
    """Triton kernels for float32, bfloat16 and float16 on CUDA devices, or on the CPU in Triton's
    interpreter.

    Args:
        products: who forms dHidden and dWeight: ``"kernels"``; ``"cublas"`` (16-bit products only:
            float32 stays with the kernels, which are IEEE); or ``"auto"``, by :func:`cheaper` for
            each shape. The environment variable ``FASTDPOP_PRODUCTS`` takes the place of "auto".
        filter_below: gradients leave out pieces of the vocabulary in which no token of a block of
            rows has a probability of at least this, in (0, 1); None leaves out nothing. Log-probs
            and loss stay exact. It changes no row's gradient by more than its coefficient times the
            probability left out times the largest norm of a weight row (times the head's slope).
        name: under which to register it, where it is not the standard one.

    Raises:
        ValueError: an argument is not as described, or cuBLAS is to filter.
    """

    def __init__(
        self,
        *,
        products: str = "auto",
        filter_below: float | None = None,
        name: str = "triton",
    ) -> None:
        if products not in PRODUCTS:
            raise ValueError(f"products is {products!r}, expected one of {PRODUCTS}")
        if filter_below is not None:
            if not 0.0 < filter_below < 1.0:
                raise ValueError(f"filter_below is {filter_below!r}, expected a number in (0, 1)")
            if products == "cublas":
                raise ValueError(
                    "products is 'cublas' and filter_below is set: only the kernels can leave "
                    "pieces out"
                )
        self.products = products
        self.filter_below = filter_below
        self.name = name

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs triton, a CUDA device (or the interpreter), and a dtype other than float64."""
        if dtype not in _DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {dtype}"
        if device.type not in ("cuda", "cpu"):
            return f"it computes on CUDA devices, not on {device.type}"
        reason = _no_triton()
        if reason is not None:
            return reason
        interpreted = _kernels().config.INTERPRETED
        if device.type == "cpu" and not interpreted:
            return "it needs a CUDA device, or TRITON_INTERPRET=1 when triton is first imported"
        if device.type == "cuda" and interpreted:
            return "triton runs in its interpreter (TRITON_INTERPRET=1), which computes on the CPU"
        return None

    def only_by_name(self, device: torch.device) -> bool:
        """The interpreter is for tests: nobody gets it without asking."""
        return device.type == "cpu"

    def describe(self) -> str:
        """Triton's version, and how it runs."""
        how = " in the interpreter" if _kernels().config.INTERPRETED else ""
        return f"Triton {importlib.import_module('triton').__version__} kernels{how}"

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> Logps:
        """Log-probs alone: 2 units."""
        run = _Run(self, problem, statistics)
        run.forward_only(run.everything)
        return run.result()

    def logps_and_direction(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> tuple[Logps, Tensor]:
        """Log-probs and d logp / d hidden: 4 units, whatever the workspace."""
        run = _Run(self, problem, statistics)
        direction = torch.empty_like(problem.hidden)
        for rows in _pieces(run.everything, run.kept_rows):
            tile = run.tile(rows)
            tile.forward()
            run.fill_in(rows, tile)
            tile.direction(direction[rows])
        return run.result(), direction

    def gradients(
        self, problem: Problem, lse: Tensor, row_gradient: Tensor, wanted: Wanted
    ) -> Gradients:
        """Gradients for known coefficients, recomputing the logits."""
        # The partial sums are computed again, and with them a log-sum-exp more exact than its
        # rounding to float32.
        del lse
        run = _Run(self, problem, ())
        sums = run.new_gradients(wanted)
        run.recompute(run.everything, row_gradient.float(), sums)
        run.finish(sums)
        return sums

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        coefficients: Coefficients,
        wanted: Wanted,
    ) -> tuple[Logps, Gradients]:
        """Chunk by chunk of whole groups: 6 units for a trained head, 8 for a group beyond the
        workspace.
        """
        run = _Run(self, problem, statistics)
        sums = run.new_gradients(wanted)
        pairs = run.fused_loss(getattr(coefficients, "plan", None))
        for first, last, rows in run.chunks():
            if rows.stop - rows.start <= run.kept_rows:
                tile = run.tile(rows)
                tile.forward(combine=pairs is None)
                c = None if pairs is None else pairs.coefficients(first, last, tile)
                run.fill_in(rows, tile)
                if c is None:
                    c = coefficients(first, last, run.logps[rows], run.statistics[:, rows])
                tile.gradients(c.float(), sums)
            else:
                c = None if pairs is None else run.forward_and_loss(first, last, rows, pairs)
                if c is None:
                    run.forward_only(rows)
                    c = coefficients(first, last, run.logps[rows], run.statistics[:, rows])
                run.recompute(rows, c.float(), sums)
        if pairs is not None:
            pairs.hand_over()
        run.finish(sums)
        return run.result(), sums


def cheaper(
    rows: int,
    vocabulary: int,
    width: int,
    processors: int,
    tile: tuple[int, int] = (128, 256),
) -> str:
    """Which products to take for 16-bit operands: ``"kernels"`` or ``"cublas"``.

    An estimate, in bytes of tensor-core time: cuBLAS is given 95% of the tensor cores' rate (it
    picks its tiles by shape), the kernels 85% for dWeight and 60% for dHidden, whose compiled loop
    waits for each product before it rescales the next operand, times the part of their last wave of
    tiles that is busy. cuBLAS needs the softmax rescaled in memory before each product (read and written), and its
    float32 dWeight added to the sum (read twice, written twice). The chip does 295 operations of 16 bits
    in the time of one byte (989 TFLOP/s, 3.35 TB/s).
    """
    operations_per_byte = 295.0
    products = 2.0 * 2.0 * rows * vocabulary * width
    fused = 0.0
    for lines, rate in ((rows, 0.6), (vocabulary, 0.85)):
        tiles = math.ceil(lines / tile[0]) * math.ceil(width / tile[1])
        busy = tiles / (math.ceil(tiles / processors) * processors)
        fused += products / 2.0 / (rate * busy)
    moved = 2.0 * 4.0 * rows * vocabulary + 4.0 * 4.0 * vocabulary * width
    return "kernels" if fused <= products / 0.95 + moved * operations_per_byte else "cublas"


@functools.cache
def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'fastdpop[triton]'"
    return None


class _Kernels:
    """The modules of ``kernels/``, imported when they are first needed: fastdpop does without
    triton.
    """

    def __init__(self) -> None:
        for name in ("config", "tiles", "forward", "combine", "gradients", "losses"):
            setattr(self, name, importlib.import_module(f"fastdpop.kernels.{name}"))

    def __getattr__(self, name: str) -> Any:  # for the type checker
        raise AttributeError(name)


@functools.cache
def _kernels() -> _Kernels:
    return _Kernels()


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pieces(rows: slice, limit: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, limit):
        yield slice(start, min(start + limit, rows.stop))


class _Run:
    """One pass over a problem: operands as the kernels take them, limits, and results."""

    def __init__(self, engine: TritonEngine, problem: Problem, statistics: tuple[str, ...]) -> None:
        kernels = _kernels()
        self.problem, self.names = problem, statistics
        dtype = problem.compute_dtype
        weight = problem.weight.to(dtype)
        self.weight = (
            weight if weight.stride(1) == 1 and weight.stride(0) > 0 else weight.contiguous()
        )
        self.bias = None if problem.bias is None else problem.bias.to(dtype).contiguous()
        device = problem.hidden.device
        described = kernels.tiles.aligned(self.weight) and (
            problem.hidden.dtype != dtype or kernels.tiles.aligned(problem.hidden)
        )
        target = kernels.config.target_of(device)
        self.config = kernels.config.tiles(target, dtype, described=described)
        self.transform = _transform(problem)
        self.gain = -self.transform.slope
        (rows, width), vocabulary = problem.hidden.shape, len(weight)
        self.everything = slice(0, rows)
        self.products = self._choose(engine, rows)
        self.lowest = engine.filter_below

        # A row of scratch memory: partial sums, and a few numbers; with what is kept, also the row
        # of hidden states gathered or converted.
        columns = -(-vocabulary // self.config.tokens)
        partial = columns * 4 * (6 if statistics else 2) + 64
        self.forward_rows = self._limit(problem.workspace_bytes, partial + width * dtype.itemsize)
        self.kept_width = kernels.forward.kept_width(vocabulary, self.config)
        kept = (self.kept_width + width) * dtype.itemsize + partial
        room = problem.workspace_bytes
        if self.lowest is not None:
            kept += columns * 4 // self.config.hidden_rows + 1
        kept += 4 * width
        if self.products == "cublas":
            room = room * 7 // 8
        self.kept_rows = self._limit(room, kept)
        self.slice_tokens = max(1, problem.workspace_bytes // 8 // (4 * width))

        new = problem.hidden.new_empty
        self.logps = new(rows, dtype=torch.float32)
        self.lse = new(rows, dtype=torch.float32)
        self.statistics = new((len(statistics), rows), dtype=torch.float32)
        self.fresh = True
        self.memory: Tensor | None = None

    def _choose(self, engine: TritonEngine, rows: int) -> str:
        """Who forms the products of this problem."""
        products = engine.products
        if products == "auto":
            products = os.environ.get("FASTDPOP_PRODUCTS", "auto")
            if products not in PRODUCTS:
                raise ValueError(
                    f"the environment variable FASTDPOP_PRODUCTS is {products!r}, "
                    f"expected one of {PRODUCTS}"
                )
        if self.problem.compute_dtype == torch.float32 or engine.filter_below is not None:
            return "kernels"
        if products == "auto":
            vocabulary, width = self.weight.shape
            rows = min(rows, max(1, self.problem.workspace_bytes // (2 * vocabulary)))  # of a chunk
            tile = (self.config.hidden_rows, self.config.hidden_width)
            device = self.problem.hidden.device
            return cheaper(rows, vocabulary, width, _processors(device), tile)
        return products

    def _limit(self, room: int, row: int) -> int:
        """Rows that fit, whole tiles where that is possible."""
        rows = max(1, room // row)
        return rows if rows < self.config.rows else rows - rows % self.config.rows

    def chunks(self) -> Iterator[tuple[int, int, slice]]:
        """Whole groups (first, last, rows) that fit; a larger group by itself."""
        groups, first = self.problem.groups, 0
        while first < len(groups) - 1:
            last = first + 1
            while last < len(groups) - 1 and groups[last + 1] - groups[first] <= self.kept_rows:
                last += 1
            if groups[last] > groups[first]:
                yield first, last, slice(groups[first], groups[last])
            first = last

    def result(self) -> Logps:
        return Logps(self.logps, self.lse, self.statistics)

    def new_gradients(self, wanted: Wanted) -> Gradients:
        """dHidden starts from 0 (rows may be skipped); the first tile overwrites the others."""
        p = self.problem
        new = p.hidden.new_empty
        return Gradients(
            torch.zeros_like(p.hidden, dtype=torch.float32) if wanted.hidden else None,
            new(p.weight.shape, dtype=torch.float32) if wanted.weight else None,
            new(p.weight.shape[0], dtype=torch.float32) if wanted.bias else None,
        )

    def finish(self, sums: Gradients) -> None:
        """Zero sums to which no row has added."""
        for total in (sums.weight, sums.bias):
            if total is not None and self.fresh:
                total.zero_()

    def kept(self, rows: int) -> Tensor:
        """Memory for what the forward product keeps of that many rows; one piece serves all."""
        if self.memory is None:
            most = min(self.kept_rows, len(self.logps))
            self.memory = self.problem.hidden.new_empty(
                (most, self.kept_width), dtype=self.problem.compute_dtype
            )
        return self.memory[:rows]

    def tile(self, rows: slice) -> _Tile:
        p = self.problem
        return _Tile(self, p.hidden[rows].to(p.compute_dtype), p.targets[rows], rows)

    def fill_in(self, rows: slice, tile: _Tile) -> None:
        """Log-probs and statistics of rows from a tile that has been through the forward pass."""
        self.logps[rows] = tile.softmax.logps
        self.lse[rows] = tile.softmax.lse
        for line, name in zip(self.statistics, self.names, strict=True):
            line[rows] = tile.statistics[STATISTICS.index(name)]

    def forward_only(self, rows: slice) -> None:
        """Log-probs and statistics of rows, keeping nothing."""
        for piece in _pieces(rows, self.forward_rows):
            tile = self.tile(piece)
            tile.forward(keep=False)
            self.fill_in(piece, tile)

    def fused_loss(self, plan: PairLossPlan | None) -> _FusedLoss | None:
        """The loss's kernel, if it has one and the caller offers what it needs."""
        if plan is None:
            return None
        found = _kernels().losses.jitted(plan.loss, plan.options)
        return None if found is None else _FusedLoss(self, plan, *found)

    def forward_and_loss(
        self, first: int, last: int, rows: slice, pairs: _FusedLoss
    ) -> Tensor | None:
        """Log-probs and coefficients of groups too large to be kept; None if not even their partial
        sums fit.
        """
        if rows.stop - rows.start > self.forward_rows:
            pairs.complete = False
            return None
        tile = self.tile(rows)
        tile.forward(keep=False, combine=False)
        c = pairs.coefficients(first, last, tile)
        self.fill_in(rows, tile)
        return c

    def recompute(self, rows: slice, c: Tensor, sums: Gradients) -> None:
        """Gradients of rows whose coefficients ``(n,)`` are known, rows with 0 skipped."""
        p = self.problem
        order = torch.argsort((c == 0).to(torch.int8), stable=True)
        total = (c != 0).sum()
        for piece in _pieces(slice(0, len(c)), self.kept_rows):
            own = order[piece]
            places = own + rows.start
            live = (total - piece.start).clamp(0, len(own)).to(torch.int32)
            tile = _Tile(
                self,
                p.hidden.index_select(0, places).to(p.compute_dtype),
                p.targets.index_select(0, places),
                rows,
                places=places,
                live=live,
            )
            tile.forward()
            tile.gradients(c.index_select(0, own), sums)


def _transform(problem: Problem) -> Any:
    """The head's transform in the kernels' terms."""
    head = problem.head
    log2e = math.log2(math.e)
    slope = head.logit_scale / head.temperature
    kind = _kernels().forward.Transform
    if head.softcap is None:
        return kind(scale=slope * log2e, cap=1.0, softcap=False, slope=slope)
    return kind(
        scale=head.softcap / head.temperature * log2e,
        cap=head.logit_scale / head.softcap,
        softcap=True,
        slope=slope,
    )


class _Tile:
    """Rows that go through together, and what is known of them so far.

    `places` says where each row's gradient goes, where that is not `rows`; from row `live` on
    (``0-d int32``, on the device), rows are not wanted.
    """

    def __init__(
        self,
        run: _Run,
        hidden: Tensor,
        targets: Tensor,
        rows: slice,
        *,
        places: Tensor | None = None,
        live: Tensor | None = None,
    ) -> None:
        self.run, self.hidden, self.targets, self.rows = run, hidden, targets, rows
        self.places, self.live = places, live
        self.partials: Any = None
        self.softmax: Any = None
        self.statistics: Any = None

    def forward(self, *, keep: bool = True, combine: bool = True) -> None:
        """Partial sums, and their combination: the loss's kernel does that, but for statistics."""
        run, kernels = self.run, _kernels()
        self.partials = kernels.forward.forward(
            self.hidden,
            run.weight,
            run.bias,
            self.targets,
            run.transform,
            run.config,
            kept=run.kept(len(self.targets)) if keep else None,
            moments=bool(run.names),
            live=self.live,
        )
        if combine or run.names:
            self.softmax, self.statistics = kernels.combine.combine(
                self.partials, run.transform, run.weight.shape[0], live=self.live
            )

    def _prepare(self) -> tuple[Any, Any]:
        """What the products read: targets in place, and rescaled for cuBLAS, or the pieces listed
        for filtering.
        """
        run, gradients = self.run, _kernels().gradients
        gradients.place_targets(
            self.partials,
            self.softmax,
            self.targets,
            run.config,
            run.transform.softcap,
            self.live,
        )
        if run.products == "cublas":
            gradients.rescale(self.partials, run.config)
        if run.lowest is None:
            return None, None
        return gradients.list_pieces(
            self.partials, run.config, run.weight.shape[0], run.lowest, self.live
        )

    def direction(self, out: Tensor) -> None:
        """d logp / d hidden into `out`."""
        listed, _ = self._prepare()
        self._hidden(out, None, listed)

    def _hidden(self, out: Tensor, c: Tensor | None, listed: Any) -> None:
        run, kernels = self.run, _kernels()
        if run.products != "cublas":
            # Rows that are skipped are not written.
            target = (
                out
                if self.places is None
                else self.hidden.new_zeros(self.hidden.shape, dtype=out.dtype)
            )
            kernels.gradients.hidden_gradient(
                self.partials,
                run.weight,
                target,
                run.config,
                run.gain,
                coefficients=c,
                live=self.live,
                listed=listed,
            )
            if self.places is not None:
                out.index_copy_(0, self.places, target)
            return
        kept = self.partials.kept[:, : run.weight.shape[0]]
        value = kernels.gradients.product(kept, run.weight).mul_(run.gain)
        if c is not None:
            # Rows without a coefficient may never have been computed.
            value.mul_(c[:, None]).masked_fill_((c == 0)[:, None], 0.0)
        if self.places is None:
            out.copy_(value)
        else:
            out.index_copy_(0, self.places, value)

    def gradients(self, c: Tensor, sums: Gradients) -> None:
        """Add what these rows contribute to each wanted gradient."""
        run, gradients = self.run, _kernels().gradients
        of_hidden, of_weight = self._prepare()
        if sums.hidden is not None:
            out = sums.hidden if self.places is not None else sums.hidden[self.rows]
            self._hidden(out, c, of_hidden)
        if sums.weight is None and sums.bias is None:
            return
        by_cublas = run.products == "cublas"
        peak = gradients.weigh(
            self.partials,
            self.softmax,
            self.targets,
            run.config,
            run.transform.softcap,
            c * run.gain,
            self.live,
            all_rescaled=by_cublas,
        )
        if by_cublas:
            gradients.rescale(self.partials, run.config)
        if sums.bias is not None:
            gradients.bias_gradient(
                self.partials,
                peak,
                sums.bias,
                run.config,
                add=not run.fresh,
                live=self.live,
                rescaled=by_cublas,
            )
        if sums.weight is not None:
            if by_cublas:
                self._weight_by_cublas(peak, sums.weight)
            else:
                gradients.weight_gradient(
                    self.partials,
                    self.hidden,
                    peak,
                    sums.weight,
                    run.config,
                    add=not run.fresh,
                    live=self.live,
                    listed=of_weight,
                )
        run.fresh = False

    def _weight_by_cublas(self, peak: Tensor, total: Tensor) -> None:
        """In slices of the vocabulary: the product is a temporary of its own."""
        run, gradients = self.run, _kernels().gradients
        for tokens in _pieces(slice(0, len(total)), run.slice_tokens):
            part = gradients.product(self.partials.kept[:, tokens].T, self.hidden)
            gradients.unscaled(part, peak)
            if run.fresh:
                total[tokens] = part
            else:
                total[tokens].add_(part)


@dataclass
class _FusedLoss:
    """A loss that has a kernel, on its way through a problem; `complete` while every pair has gone
    through it.
    """

    run: _Run
    plan: PairLossPlan
    function: Any
    numbers: tuple[float, float, float]
    complete: bool = True

    def __post_init__(self) -> None:
        plan = self.plan
        self.kernel_plan = _kernels().combine.PairPlan(
            plan.offsets, plan.order, plan.reference, self.function, self.numbers, plan.share
        )
        pairs = len(plan.order)
        self.losses = plan.reference.new_empty(pairs)
        self.sums = plan.reference.new_empty(2 * pairs)

    def coefficients(self, first: int, last: int, tile: _Tile) -> Tensor:
        tile.softmax, c = _kernels().combine.pair_loss(
            tile.partials,
            self.run.transform,
            self.kernel_plan,
            tile.rows.start,
            first,
            last,
            self.losses,
            self.sums,
        )
        return c

    def hand_over(self) -> None:
        """Give the caller the losses and sums, if they are those of every pair."""
        if self.complete:
            self.plan.losses, self.plan.sums = self.losses, self.sums
