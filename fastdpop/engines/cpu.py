"""The CPU engine: fused kernels in C++ (``csrc/``), for AVX-512 with and without bfloat16 products,
AVX2 and anything else.

    forward   for each block of rows: logits tile by tile, softmax as it goes (2 units) and, where
              gradients are wanted, the direction d logp / d hidden beside it (2 more)
    backward  for each tile of tokens: dWeight and dBias, from the softmax that the forward pass
              kept in float16 (2 units) or from logits computed again (4 units)

dHidden is a product of direction and coefficient, so the second pass serves the weights alone, and
skips rows whose coefficient is 0. Rows that repeat (same hidden state, same target: the common
prefix of a pair) are computed once, and where the softmax is kept their direction waits until one of
their coefficients is known not to be 0.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastdpop.engines.base import (
    DEFAULT_WORKSPACE_BYTES,
    Coefficients,
    Gradients,
    Logps,
    Problem,
    Wanted,
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KEPT_BYTES = 64 * 2**20
"""Memory for the softmax kept for the second pass, unless the gradient is larger or the caller gives
more than the default workspace.
"""


class _Problem(ctypes.Structure):
    """``Problem`` in csrc/head.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "width")),
        *((name, ctypes.c_void_p) for name in ("hidden", "weight")),
        ("weight_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bias", "targets")),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "compute_dtype", "softcap")),
        *((name, ctypes.c_float) for name in ("scale", "cap_in", "cap_out")),
        ("threads", ctypes.c_int32),
        ("scratch_bytes", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "logps",
                "lse",
                "entropy",
                "mean_logits",
                "token_accuracy",
                "aligned_logps",
                "direction",
                "kept",
                "kept_max",
            )
        ),
        *((name, ctypes.c_int64) for name in ("direction_from", "direction_to")),
        *((name, ctypes.c_int32) for name in ("again", "fresh")),
        *((name, ctypes.c_void_p) for name in ("coefficients", "weight_gradient", "bias_gradient")),
    ]


class _Library:
    """The shared library, and the instruction set in use: the best one, or the one named."""

    def __init__(self, path: Path, instructions: str | None) -> None:
        self.calls = ctypes.CDLL(str(path))
        self.calls.fastdpop_name.restype = ctypes.c_char_p
        self.calls.fastdpop_supported.restype = ctypes.c_bool
        for name in ("panel", "tile", "problem_size", "distinct"):
            getattr(self.calls, f"fastdpop_{name}").restype = ctypes.c_int64
        if self.calls.fastdpop_problem_size() != ctypes.sizeof(_Problem):
            raise OSError(f"{path} was built from another version of fastdpop")
        names = [self.calls.fastdpop_name(i).decode() for i in range(self.calls.fastdpop_count())]
        self.supported = [n for i, n in enumerate(names) if self.calls.fastdpop_supported(i)]
        self.instructions = instructions or self.supported[0]
        if self.instructions not in self.supported:
            raise ValueError(
                f"instructions is {self.instructions!r}, expected one of {self.supported}"
            )
        self.index = names.index(self.instructions)
        self.panel: int = self.calls.fastdpop_panel(self.index)
        self.tile: int = self.calls.fastdpop_tile(self.index)

    def forward(self, problem: _Problem) -> None:
        self.calls.fastdpop_forward(self.index, ctypes.byref(problem))

    def backward(self, problem: _Problem) -> None:
        self.calls.fastdpop_backward(self.index, ctypes.byref(problem))

    def distinct(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows that repeat no earlier one, and which of them each row is; None if none repeats."""
        rows = len(targets)
        first, which = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
        count = self.calls.fastdpop_distinct(
            ctypes.c_int64(rows),
            ctypes.c_int64(hidden.shape[1] * hidden.element_size()),
            ctypes.c_void_p(hidden.data_ptr()),
            ctypes.c_void_p(targets.data_ptr()),
            ctypes.c_void_p(first.data_ptr()),
            ctypes.c_void_p(which.data_ptr()),
        )
        return None if count == rows else (first[:count], which)


@functools.cache
def _library(instructions: str | None = None) -> _Library | str:
    """The library, or why there is none."""
    other = os.environ.get("FASTDPOP_LIBRARY")  # another build of it, for `make sanitize`
    found = [Path(other)] if other else sorted(Path(__file__).parent.glob("_head*.so"))
    if not found:
        return (
            "its C++ library was not built: no C++ compiler was found when fastdpop was installed"
        )
    try:
        return _Library(found[0], instructions)
    except OSError as error:
        return str(error)


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this processor and the library both know, best first."""
    library = _library()
    return () if isinstance(library, str) else tuple(library.supported)


class CPUEngine:
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
        if dtype not in _DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {dtype}"
        library = _library(self.instructions)
        return library if isinstance(library, str) else None

    def describe(self) -> str:
        """The instruction set in use."""
        return f"C++ kernels for {self._loaded().instructions}"

    def _loaded(self) -> _Library:
        library = _library(self.instructions)
        assert isinstance(library, _Library), library
        return library

    def _call(self, problem: Problem, statistics: tuple[str, ...]) -> _Call:
        return _Call(problem, statistics, self._loaded())

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> Logps:
        """Log-probs alone: 2 units."""
        call = self._call(problem, statistics)
        call.run(call.everything).forward()
        return call.result()

    def logps_and_direction(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> tuple[Logps, Tensor]:
        """Log-probs and d logp / d hidden: 4 units."""
        call = self._call(problem, statistics)
        direction = torch.empty_like(problem.hidden)
        # The direction is made in float32, so in 16 bits it takes a detour through scratch memory.
        step = max(1, problem.workspace_bytes // (8 * problem.hidden.shape[1]))
        for start in range(0, len(direction), step):
            rows = slice(start, min(start + step, len(direction)))
            run = call.run(rows)
            run.forward(want_direction=True)
            direction[rows] = run.directions()
        return call.result(), direction

    def gradients(
        self, problem: Problem, lse: Tensor, row_gradient: Tensor, wanted: Wanted
    ) -> Gradients:
        """Gradients for known coefficients: 4 units for hidden, 4 for weight and bias."""
        call = self._call(problem, ())
        run = call.run(call.everything)
        run.forward(want_direction=wanted.hidden)
        per_row = run.per_distinct_row(row_gradient)
        hidden = run.directions() * row_gradient[:, None] if wanted.hidden else None
        sums = call.new_sums(wanted)
        run.backward(per_row, sums)
        call.finish(sums)
        return sums._replace(hidden=hidden)

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        coefficients: Coefficients,
        wanted: Wanted,
    ) -> tuple[Logps, Gradients]:
        """Chunk by chunk of whole groups: 6 units, or 8 where a group's softmax is not kept."""
        call = self._call(problem, statistics)
        sums = call.new_sums(wanted)
        hidden = torch.empty_like(problem.hidden, dtype=torch.float32) if wanted.hidden else None
        limit = call.kept_rows() if wanted.weight or wanted.bias else len(problem.targets)
        for first, last, rows in _chunks(problem.groups, call.distinct_rows(), max(limit, 1)):
            run = call.run(rows)
            run.forward(want_direction=wanted.hidden, keep=wanted.weight or wanted.bias)
            c = coefficients(first, last, call.logps[rows], call.statistics[:, rows])
            per_row = run.per_distinct_row(c)
            if hidden is not None:
                # Coefficients that cancel in the weight's gradient do not in the rows' own.
                active = run.per_distinct_row(c.abs())
                torch.mul(run.directions(active), c[:, None], out=hidden[rows])
            run.backward(per_row, sums)
        call.finish(sums)
        return call.result(), sums._replace(hidden=hidden)


def _chunks(groups: list[int], distinct: list[int], limit: int) -> Iterator[tuple[int, int, slice]]:
    """Whole groups (first, last, rows), up to `limit` distinct rows at once; a larger group by
    itself.
    """
    first = 0
    while first < len(groups) - 1:
        last, count = first + 1, distinct[first]
        while last < len(groups) - 1 and count + distinct[last] <= limit:
            count += distinct[last]
            last += 1
        if groups[last] > groups[first]:
            yield first, last, slice(groups[first], groups[last])
        first = last


class _Call:
    """A problem, its results, and the scratch memory that its runs of rows share."""

    def __init__(self, problem: Problem, statistics: tuple[str, ...], library: _Library) -> None:
        self.problem = problem
        self.names = statistics
        self.library = library
        rows = len(problem.targets)
        self.everything = slice(0, rows)
        self.logps = torch.empty(rows)
        self.lse = torch.empty(rows)
        self.statistics = torch.empty(len(statistics), rows)
        weight, bias = problem.weight, problem.bias
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.to(problem.compute_dtype).float().contiguous()
        self.tiles = -(-weight.shape[0] // self.library.tile)
        self.distinct = library.distinct(problem.hidden, problem.targets.contiguous())
        # Fresh memory costs a page fault every 4 KiB, so one piece serves all chunks.
        self.kept: tuple[Tensor, Tensor] | None = None
        self.fresh = True

    def result(self) -> Logps:
        return Logps(self.logps, self.lse, self.statistics)

    def new_sums(self, wanted: Wanted) -> Gradients:
        """Memory for the sums over rows; the first run overwrites it, which spares clearing it."""
        shape = self.problem.weight.shape
        return Gradients(
            None,
            torch.empty(shape) if wanted.weight else None,
            torch.empty(shape[0]) if wanted.bias else None,
        )

    def finish(self, sums: Gradients) -> None:
        """Zero sums to which no row has added."""
        for total in (sums.weight, sums.bias):
            if total is not None and self.fresh:
                total.zero_()

    def run(self, rows: slice) -> _Run:
        return _Run(self, rows)

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
        if self.problem.compute_dtype == torch.float32 or self.problem.head.softcap is not None:
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


class _Run:
    """Consecutive rows on their way through the library, each distinct one once."""

    def __init__(self, call: _Call, rows: slice) -> None:
        self.call, self.rows = call, rows
        hidden, targets = call.problem.hidden, call.problem.targets
        self.which: Tensor | None = None
        self.later = 0
        if call.distinct is None:
            self.hidden, self.targets = hidden[rows], targets[rows].contiguous()
        else:
            # Rows that repeat come first: where a loss gives them the coefficient 0, as DPO does,
            # whole panels have nothing to do.
            own, which, counts = torch.unique(
                call.distinct[1][rows], return_inverse=True, return_counts=True
            )
            repeats = counts > 1
            order = torch.argsort(~repeats, stable=True)
            at = call.distinct[0][own[order]]
            self.hidden, self.targets = hidden[at], targets[at]
            self.which = torch.argsort(order)[which]
            panel = call.library.panel
            self.later = int(repeats.sum()) // panel * panel
        count = len(self.targets)
        self.logps, self.lse = torch.empty(count), torch.empty(count)
        self.kept: tuple[Tensor, Tensor] | None = None
        self.direction = self.hidden.new_empty(0, self.hidden.shape[1], dtype=torch.float32)

    def _spread(self, values: Tensor) -> Tensor:
        return values if self.which is None else values[self.which]

    def per_distinct_row(self, c: Tensor) -> Tensor:
        """Coefficients of the distinct rows: sums over what repeats."""
        if self.which is None:
            return c.contiguous()
        return torch.zeros(len(self.targets)).index_add_(0, self.which, c)

    def forward(self, *, want_direction: bool = False, keep: bool = False) -> None:
        """Fill in the call's results; directions are kept for :meth:`directions`.

        With the softmax kept, those of rows that repeat wait until their coefficients are known.
        """
        call, count = self.call, len(self.targets)
        if count == 0:
            return
        if keep:
            self.kept = call.room_to_keep(count)
        if self.kept is None:
            self.later = 0
        found = torch.empty(len(call.names), count)
        outputs = dict(zip(call.names, found, strict=True))
        if want_direction:
            outputs["direction"] = self.direction = torch.empty(count, self.hidden.shape[1])
        call.library.forward(self._problem(**outputs, **self._kept(), direction_from=self.later))
        call.logps[self.rows] = self._spread(self.logps)
        call.lse[self.rows] = self._spread(self.lse)
        for line, values in zip(call.statistics, found, strict=True):
            line[self.rows] = self._spread(values)

    def directions(self, c: Tensor | None = None) -> Tensor:
        """d logp / d hidden of every row, float32; 0 is as good where the coefficient `c` of a
        distinct row is.
        """
        if self.later:
            assert c is not None
            self.direction[: self.later] = 0.0
            if c[: self.later].any():
                problem = self._problem(
                    direction=self.direction,
                    coefficients=c,
                    **self._kept(),
                    direction_to=self.later,
                    again=1,
                )
                self.call.library.forward(problem)
        return self._spread(self.direction)

    def backward(self, c: Tensor, sums: Gradients) -> None:
        """Add the weight's and the bias's gradient to the sums, for one coefficient a distinct
        row.
        """
        if sums.weight is None and sums.bias is None:
            return
        live = c != 0
        count = int(live.sum())
        if count == 0:
            return
        # The kept softmax is that of all rows, of which the library skips idle panels.
        if count < len(c) and self.kept is None:
            c = c[live]
            for name in ("hidden", "targets", "logps", "lse"):
                setattr(self, name, getattr(self, name)[live])
        outputs = {"coefficients": c}
        if sums.weight is not None:
            outputs["weight_gradient"] = sums.weight
        if sums.bias is not None:
            outputs["bias_gradient"] = sums.bias
        problem = self._problem(**outputs, **self._kept(), fresh=int(self.call.fresh))
        self.call.fresh = False
        self.call.library.backward(problem)

    def _kept(self) -> dict[str, Tensor]:
        return {} if self.kept is None else {"kept": self.kept[0], "kept_max": self.kept[1]}

    def _problem(self, **given: Tensor | int) -> _Problem:
        """The library's arguments; the tensors are the caller's to keep alive."""
        numbers = {name: value for name, value in given.items() if isinstance(value, int)}
        tensors = {n: value for n, value in given.items() if isinstance(value, Tensor)}
        p, head = self.call.problem, self.call.problem.head
        softcap = head.softcap or 1.0
        tensors |= {
            "hidden": self.hidden,
            "weight": self.call.weight,
            "targets": self.targets,
            "logps": self.logps,
            "lse": self.lse,
        }
        if self.call.bias is not None:
            tensors["bias"] = self.call.bias
        return _Problem(
            rows=len(self.targets),
            vocabulary=p.weight.shape[0],
            width=p.weight.shape[1],
            weight_stride=self.call.weight.stride(0),
            dtype=_DTYPES[p.hidden.dtype],
            weight_dtype=_DTYPES[p.weight.dtype],
            compute_dtype=_DTYPES[p.compute_dtype],
            softcap=int(head.softcap is not None),
            scale=head.logit_scale / head.temperature,
            cap_in=head.logit_scale / softcap,
            cap_out=softcap / head.temperature,
            threads=torch.get_num_threads(),
            scratch_bytes=p.workspace_bytes // 4,
            **({"direction_to": len(self.targets)} | numbers),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
