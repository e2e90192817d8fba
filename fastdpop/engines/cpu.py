"""The CPU engine: fused kernels in C++ (``csrc/``), for AVX-512 with and without bfloat16 products,
AVX2 and anything else.

    forward   for each block of rows: logits tile by tile, softmax as it goes (1 matrix product)
              and, where gradients are asked for, d logp / d hidden beside it (1 more)
    backward  for each tile of tokens: dWeight and dBias, from the softmax that the forward pass
              kept in float16 (1 product) or from logits computed again (2 products)

dHidden is d logp / d hidden times dlogp, so the backward pass serves the weights alone, and skips
rows whose dlogp is 0.

Rows that repeat (same hidden state, same target, at different positions) are computed once, and
where the softmax is kept their d logp / d hidden waits until one of their dlogp is known not to be 0.
A layout that names shared rows once (:mod:`fastdpop.rows`) leaves nothing to find here. What the
search still buys is a padded batch, in which chosen and rejected each went through the trunk with
the prefix that they share: in DPO their shared rows then cost nothing in the backward pass.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastdpop.engines.base import (
    DEFAULT_WORKSPACE_BYTES,
    NO_GRAD,
    Engine,
    EngineOutput,
    Gradients,
    GroupLoss,
    NeedsGrad,
    Problem,
)
from fastdpop.engines.chunks import Chunk, Pass, pieces_of, plan, rows_that_fit
from fastdpop.engines.cpu_library import DTYPES, CProblem, Library, instruction_sets, load, missing

__all__ = ["CPUEngine", "instruction_sets"]

_KEPT_BYTES = 64 * 2**20
"""Memory for the softmax kept for the second pass, unless the gradient is larger or the caller gives
more than the default workspace.
"""
_CACHED_BYTES = 8 * 2**20
"""Hidden states that go through at once where no softmax is kept."""


class CPUEngine(Engine):
    """Fused C++ kernels for float32, bfloat16 and float16.

    Args:
        instructions: one of :func:`instruction_sets`; the best one by default.
    """

    name = "cpu"

    def __init__(self, instructions: str | None = None) -> None:
        self.instructions = instructions

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs its library, a CPU, and a dtype other than float64."""
        if device.type != "cpu":
            return f"it computes on the CPU, not on {device.type}"
        if dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {dtype}"
        return missing() if isinstance(load(self.instructions), str) else None

    def describe(self) -> str:
        """The instruction set in use, and whether it is used on one thread alone."""
        library = self._loaded()
        alone = "" if library.openmp else ", on one thread: its compiler had no OpenMP"
        return f"C++ kernels for {library.instructions}{alone}"

    def _loaded(self) -> Library:
        library = load(self.instructions)
        assert isinstance(library, Library), library
        return library

    def _begin(
        self, problem: Problem, statistics: tuple[str, ...], needs_grad: NeedsGrad = NO_GRAD
    ) -> CPUPass:
        return CPUPass(problem, statistics, needs_grad, self._loaded())

    def chunk_rows(
        self, problem: Problem, statistics: tuple[str, ...], needs_grad: NeedsGrad
    ) -> int:
        """As many as the softmax is kept of; where none is, as many as the caches hold."""
        return self._begin(problem, statistics, needs_grad).row_limit

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> EngineOutput:
        """Log-probs alone: 1 matrix product."""
        run = self._begin(problem, statistics)
        run.rows(run.everything).forward()
        return run.output()

    def logps_and_dlogp_dhidden(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> EngineOutput:
        """Log-probs and d logp / d hidden: 2 matrix products."""
        run = self._begin(problem, statistics)
        found = torch.empty_like(problem.hidden)
        # It is made in float32, so in 16 bits it takes a detour through scratch memory.
        step = rows_that_fit(problem.workspace_bytes, 8 * problem.hidden.shape[1])
        for piece in pieces_of(run.everything, step):
            rows = run.rows(piece)
            rows.forward(needs_hidden=True)
            found[piece] = rows.dlogp_dhidden()
        return run.output(dlogp_dhidden=found)

    def gradients(
        self, problem: Problem, lse: Tensor, dlogp: Tensor, needs_grad: NeedsGrad
    ) -> Gradients:
        """Gradients for derivatives that are known: 2 matrix products for hidden, 2 for weight and
        bias.
        """
        run = self._begin(problem, (), needs_grad)
        rows = run.rows(run.everything)
        rows.forward(needs_hidden=needs_grad.hidden)
        if run.gradients.hidden is not None:
            torch.mul(rows.dlogp_dhidden(), dlogp[:, None], out=run.gradients.hidden)
        rows.backward(rows.per_distinct_row(dlogp))
        return run.finished()

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        loss: GroupLoss,
        needs_grad: NeedsGrad,
    ) -> EngineOutput:
        """Chunk by chunk of whole groups: 3 matrix products, or 4 where a softmax is not kept."""
        run = self._begin(problem, statistics, needs_grad)
        run.one_pass(loss)
        return run.output()


class CPUPass(Pass["CPURows"]):
    """One pass over a problem, and the scratch memory that its chunks share.

    What is kept of a chunk is its rows on their way through the library.
    """

    def __init__(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        needs_grad: NeedsGrad,
        library: Library,
    ) -> None:
        super().__init__(problem, statistics)
        self.library, self.needs_grad = library, needs_grad
        self.everything = slice(0, len(problem.targets))
        weight, bias = problem.weight, problem.bias
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.to(problem.compute_dtype).float().contiguous()
        self.tiles = -(-weight.shape[0] // self.library.tile)
        self.distinct = library.distinct(problem.hidden, problem.targets.contiguous())
        # Fresh memory costs a page fault every 4 KiB, so one piece serves all chunks.
        self.kept: tuple[Tensor, Tensor] | None = None
        # The first chunk overwrites the sums over rows, which spares clearing them.
        self.fresh = True
        self.gradients = Gradients(
            torch.empty_like(problem.hidden, dtype=torch.float32) if needs_grad.hidden else None,
            torch.empty(weight.shape, dtype=torch.float32) if needs_grad.weight else None,
            torch.empty(weight.shape[0], dtype=torch.float32) if needs_grad.bias else None,
        )

    @property
    def row_limit(self) -> int:
        """Rows of whole groups that go through at once."""
        most = max(len(self.problem.targets), 1)
        if not self.needs_grad.lm_head:
            return most
        limit = self.kept_rows()
        if limit == 0:
            # Each chunk passes dWeight through memory once and reads its hidden states once for
            # every tile of tokens: so many that the former does not count, and few enough that
            # they, and what d logp / d hidden takes beside them, stay in the caches.
            limit = rows_that_fit(
                min(_CACHED_BYTES, self.problem.workspace_bytes), 8 * self.weight.shape[1]
            )
        return min(limit, most)

    def chunks(self) -> list[Chunk]:
        """Where rows repeat, only distinct ones count, unless processes must agree."""
        agreed = self.problem.chunk_rows
        if agreed is not None:
            return plan(self.problem.groups, agreed)
        return plan(self.problem.groups, self.row_limit, sizes=self.distinct_rows())

    def forward(self, chunk: Chunk) -> CPURows:
        """Log-probs and statistics of a chunk, and its rows."""
        rows = self.rows(chunk.rows)
        rows.forward(needs_hidden=self.needs_grad.hidden, keep=self.needs_grad.lm_head)
        return rows

    def backward(self, chunk: Chunk, kept: CPURows, dlogp: Tensor) -> None:
        """Add the gradients of a chunk's rows."""
        if self.gradients.hidden is not None:
            # Derivatives that cancel in the weight's gradient do not in the rows' own.
            active = kept.per_distinct_row(dlogp.abs())
            own = self.gradients.hidden[chunk.rows]
            torch.mul(kept.dlogp_dhidden(active), dlogp[:, None], out=own)
        kept.backward(kept.per_distinct_row(dlogp))

    def finished(self) -> Gradients:
        """The gradients; sums to which no row has added are 0."""
        for total in (self.gradients.weight, self.gradients.bias):
            if total is not None and self.fresh:
                total.zero_()
        return self.gradients

    def rows(self, rows: slice) -> CPURows:
        """Consecutive rows."""
        return CPURows(self, rows)

    def distinct_rows(self) -> list[int]:
        """How many rows of each group do not repeat one of that group."""
        bounds = list(itertools.pairwise(self.problem.groups))
        if self.distinct is None:
            return [b - a for a, b in bounds]
        return [len(self.distinct[1][a:b].unique()) for a, b in bounds]

    def _rows_in(self, size: int) -> int:
        """How many rows' softmax fits a number of bytes, in whole panels.

        float16 is exact enough for 16-bit products only; under softcap the slope needs the logits.
        """
        if (
            self.problem.compute_dtype == torch.float32
            or self.problem.transform.softcap is not None
        ):
            return 0
        panel_bytes = self.tiles * self.library.panel * (2 * self.library.tile + 4)
        return size // panel_bytes * self.library.panel

    def kept_rows(self) -> int:
        """How many rows are kept at a time.

        Each chunk of rows passes the sums through memory. As much as rounding a 16-bit weight's
        gradient takes at the end, when this is free again, adds nothing to the peak.
        """
        workspace = self.problem.workspace_bytes
        room = max(_KEPT_BYTES, 2 * self.problem.weight.numel())
        if workspace > DEFAULT_WORKSPACE_BYTES:
            room = max(room, workspace // 2)
        return self._rows_in(min(room, workspace // 2))

    def room_to_keep(self, rows: int) -> tuple[Tensor, Tensor] | None:
        """Memory for the softmax of `rows` rows, or None if there is not enough."""
        panel = self.library.panel
        rows = -(-rows // panel) * panel
        if rows > self.kept_rows():
            return None
        if self.kept is None:
            everything = -(-len(self.logps) // panel) * panel
            most = min(self.kept_rows(), everything) * self.tiles
            self.kept = (
                torch.empty(most * self.library.tile, dtype=torch.int16),
                torch.empty(most, dtype=torch.float32),
            )
        return self.kept


class CPURows:
    """Consecutive rows on their way through the library, each distinct one once."""

    def __init__(self, run: CPUPass, rows: slice) -> None:
        self.run, self.rows = run, rows
        hidden, targets = run.problem.hidden, run.problem.targets
        self.which: Tensor | None = None
        self.later = 0
        if run.distinct is None:
            self.hidden, self.targets = hidden[rows], targets[rows].contiguous()
        else:
            # Rows that repeat come first: where a loss gives them the derivative 0, as DPO does,
            # whole panels have nothing to do.
            own, which, counts = torch.unique(
                run.distinct[1][rows], return_inverse=True, return_counts=True
            )
            repeats = counts > 1
            order = torch.argsort(~repeats, stable=True)
            at = run.distinct[0][own[order]]
            self.hidden, self.targets = hidden[at], targets[at]
            self.which = torch.argsort(order)[which]
            panel = run.library.panel
            self.later = int(repeats.sum()) // panel * panel
        count = len(self.targets)
        self.logps, self.lse = torch.empty(2, count, dtype=torch.float32)
        self.kept: tuple[Tensor, Tensor] | None = None
        self.direction = self.hidden.new_empty(0, self.hidden.shape[1], dtype=torch.float32)

    def _per_row(self, values: Tensor) -> Tensor:
        return values if self.which is None else values[self.which]

    def per_distinct_row(self, dlogp: Tensor) -> Tensor:
        """Derivatives of the distinct rows: sums over what repeats."""
        if self.which is None:
            return dlogp.contiguous()
        return dlogp.new_zeros(len(self.targets)).index_add_(0, self.which, dlogp)

    def forward(self, *, needs_hidden: bool = False, keep: bool = False) -> None:
        """Fill in the pass's results; with `needs_hidden`, d logp / d hidden is kept for
        :meth:`dlogp_dhidden`.

        With the softmax kept, that of rows that repeat waits until their `dlogp` is known.
        """
        run, count = self.run, len(self.targets)
        if count == 0:
            return
        if keep:
            self.kept = run.room_to_keep(count)
        if self.kept is None:
            self.later = 0
        found = torch.empty(len(run.names), count, dtype=torch.float32)
        outputs = dict(zip(run.names, found, strict=True))
        if needs_hidden:
            self.direction = torch.empty(count, self.hidden.shape[1], dtype=torch.float32)
            outputs["dlogp_dhidden"] = self.direction
        run.library.forward(self._problem(**outputs, **self._kept(), dhidden_from=self.later))
        run.logps[self.rows] = self._per_row(self.logps)
        run.lse[self.rows] = self._per_row(self.lse)
        for line, values in zip(run.statistics, found, strict=True):
            line[self.rows] = self._per_row(values)

    def dlogp_dhidden(self, dlogp: Tensor | None = None) -> Tensor:
        """d logp / d hidden of every row, float32; 0 is as good where `dlogp` of a distinct row
        is.
        """
        if self.later:
            assert dlogp is not None
            self.direction[: self.later] = 0.0
            if dlogp[: self.later].any():
                problem = self._problem(
                    dlogp_dhidden=self.direction,
                    dlogp=dlogp,
                    **self._kept(),
                    dhidden_to=self.later,
                    again=1,
                )
                self.run.library.forward(problem)
        return self._per_row(self.direction)

    def backward(self, dlogp: Tensor) -> None:
        """Add to the gradients of weight and bias, for one derivative per distinct row."""
        _, dweight, dbias = self.run.gradients
        if dweight is None and dbias is None:
            return
        live = dlogp != 0
        count = int(live.sum())
        if count == 0:
            return
        # The kept softmax is that of all rows, of which the library skips idle panels.
        if count < len(dlogp) and self.kept is None:
            dlogp = dlogp[live]
            for name in ("hidden", "targets", "logps", "lse"):
                setattr(self, name, getattr(self, name)[live])
        outputs = {"dlogp": dlogp}
        if dweight is not None:
            outputs["dweight"] = dweight
        if dbias is not None:
            outputs["dbias"] = dbias
        problem = self._problem(**outputs, **self._kept(), fresh=int(self.run.fresh))
        self.run.fresh = False
        self.run.library.backward(problem)

    def _kept(self) -> dict[str, Tensor]:
        return {} if self.kept is None else {"kept": self.kept[0], "kept_max": self.kept[1]}

    def _problem(self, **given: Tensor | int) -> CProblem:
        """The library's arguments; the tensors are the caller's to keep alive."""
        numbers = {name: value for name, value in given.items() if isinstance(value, int)}
        tensors = {n: value for n, value in given.items() if isinstance(value, Tensor)}
        p, transform = self.run.problem, self.run.problem.transform
        softcap = transform.softcap or 1.0
        tensors |= {
            "hidden": self.hidden,
            "weight": self.run.weight,
            "targets": self.targets,
            "logps": self.logps,
            "lse": self.lse,
        }
        if self.run.bias is not None:
            tensors["bias"] = self.run.bias
        return CProblem(
            rows=len(self.targets),
            vocabulary=p.weight.shape[0],
            width=p.weight.shape[1],
            weight_stride=self.run.weight.stride(0),
            dtype=DTYPES[p.hidden.dtype],
            weight_dtype=DTYPES[p.weight.dtype],
            compute_dtype=DTYPES[p.compute_dtype],
            softcap=int(transform.softcap is not None),
            scale=transform.logit_scale / transform.temperature,
            cap_in=transform.logit_scale / softcap,
            cap_out=softcap / transform.temperature,
            threads=torch.get_num_threads(),
            scratch_bytes=p.workspace_bytes // 4,
            **({"dhidden_to": len(self.targets)} | numbers),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
