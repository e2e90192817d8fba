"""The Triton engine: the kernels of ``kernels/``, driven chunk by chunk of whole groups.

    target logits        each row's reference: a gather and a dot product
    forward product      logits tile by tile into partial sums; with gradients to come, the softmax
                         of the chunk is kept beside them, up to a factor a row              2 units
    combination          log-probs; then, for the losses that have a kernel, the loss and dlogp
    dHidden, dWeight     plain products with what was kept                             2 units each

A group beyond the workspace goes through the forward product first for its log-probs, and then tile
by tile of rows once more (8 units instead of 6); so does every group in float16, whose range needs
a reference that is known only afterwards. Where coefficients are known beforehand, rows with
coefficient 0 are sorted to the end on the device and skipped there, without waiting for their
number.

On a CUDA device, only the callback of a loss without a kernel waits for the device.

This module does without triton; :mod:`.triton_pass` does the work and needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdpop.engines.base import (
    Coefficients,
    Gradients,
    Logps,
    PairLossPlan,
    Problem,
    Wanted,
)

if TYPE_CHECKING:
    from fastdpop.engines.triton_pass import Pass

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NOTHING = Wanted(False, False, False)

PRODUCTS = ("auto", "kernels")
"""Who forms dHidden and dWeight: cuBLAS where it can, or our kernels always."""

FORWARDS = ("plain", "gluon")
"""Which forward product: the plain one, or the warp-specialised one on Hopper."""


class TritonEngine:
    """Triton kernels for float32, bfloat16 and float16 on CUDA devices, or on the CPU in Triton's
    interpreter.

    Args:
        products: who forms dHidden and dWeight. ``"auto"``: cuBLAS for bfloat16, our kernels for
            float32 (always IEEE), float16 and where rows are skipped; ``"kernels"``: always ours.
            The environment variable ``FASTDPOP_PRODUCTS`` takes the place of ``"auto"``.
        forward: ``"plain"``, or ``"gluon"``: the persistent, warp-specialised kernel for 16-bit
            operands on Hopper, which has not been measured yet and gives the same bits; other
            operands take the plain one. The environment variable ``FASTDPOP_FORWARD`` takes the
            place of None.
        name: under which to register it, where it is not the standard one.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(
        self, *, products: str = "auto", forward: str | None = None, name: str = "triton"
    ) -> None:
        self._products = _one_of(PRODUCTS, products, "products")
        self._forward = forward if forward is None else _one_of(FORWARDS, forward, "forward")
        self.name = name

    @property
    def products(self) -> str:
        """One of :data:`PRODUCTS`."""
        if self._products != "auto":
            return self._products
        return _of_environment("FASTDPOP_PRODUCTS", PRODUCTS)

    @property
    def forward(self) -> str:
        """One of :data:`FORWARDS`."""
        return self._forward or _of_environment("FASTDPOP_FORWARD", FORWARDS)

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs triton, a CUDA device (or the interpreter), and a dtype other than float64."""
        if dtype not in _DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {dtype}"
        if device.type not in ("cuda", "cpu"):
            return f"it computes on CUDA devices, not on {device.type}"
        if not _has_triton():
            return "triton is not installed: pip install 'fastdpop[triton]'"
        interpreted = _interpreted()
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
        how = " in the interpreter" if _interpreted() else ""
        return f"Triton {importlib.import_module('triton').__version__} kernels{how}"

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> Logps:
        """Log-probs alone: 2 units."""
        run = self._begin(problem, statistics, "forward_only")
        run.forward_only(run.everything)
        return run.result()

    def logps_and_direction(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> tuple[Logps, Tensor]:
        """Log-probs and d logp / d hidden: 4 units, whatever the workspace; 6 in float16."""
        run = self._begin(problem, statistics, "dlogp_dhidden")
        direction = torch.empty_like(problem.hidden)
        run.dlogp_dhidden(direction)
        return run.result(), direction

    def gradients(
        self, problem: Problem, lse: Tensor, row_gradient: Tensor, wanted: Wanted
    ) -> Gradients:
        """Gradients for known coefficients, recomputing the logits."""
        run = self._begin(problem, (), "recompute", wanted)
        sums = run.new_gradients(wanted)
        run.lse.copy_(lse)
        run.recompute(run.everything, row_gradient.float(), sums)
        return run.finish(sums)

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        coefficients: Coefficients,
        wanted: Wanted,
    ) -> tuple[Logps, Gradients]:
        """Chunk by chunk of whole groups: 6 units for a trained head, 8 for a group beyond the
        workspace and in float16.
        """
        plan = getattr(coefficients, "plan", None)
        run = self._begin(problem, statistics, "one_pass", wanted, plan)
        sums = run.new_gradients(wanted)
        run.one_pass(coefficients, sums)
        return run.result(), run.finish(sums)

    def _begin(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        route: str,
        wanted: Wanted = _NOTHING,
        plan: PairLossPlan | None = None,
    ) -> Pass:
        """A pass whose kernels have been checked on this chip: see :mod:`.self_check`."""
        from fastdpop.engines import self_check
        from fastdpop.engines.triton_pass import Pass

        run = Pass(problem, statistics, self.products, self.forward)
        if problem.hidden.device.type == "cuda":
            self_check.ensure(run, route, wanted, plan)
        return run


def _one_of(allowed: tuple[str, ...], value: str, name: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {allowed}")
    return value


def _of_environment(name: str, allowed: tuple[str, ...]) -> str:
    """A choice by an environment variable; the first of those allowed where it is not set."""
    return _one_of(allowed, os.environ.get(name, allowed[0]), f"the environment variable {name}")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    from fastdpop.kernels import config

    return config.INTERPRETED
