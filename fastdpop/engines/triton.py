"""The Triton engine: the kernels of ``kernels/``, driven chunk by chunk of whole groups.

    target logits        each row's shift: a gather and a dot product
    forward product      logits tile by tile into partial sums; with gradients to come, the softmax
                         of the chunk is kept beside them, up to a factor per row      1 product
    combination          log-probs; then, for the losses that have a kernel, the loss and dlogp
    dHidden, dWeight     plain products with what was kept                             1 product each

A group beyond the workspace goes through the forward product first for its log-probs, and then
piece by piece once more (4 matrix products instead of 3); so does every group in float16, whose
range needs a shift that is known only afterwards. Where `dlogp` is known beforehand,
rows with 0 are sorted to the end on the device and skipped there, without waiting for their number.

On a CUDA device, only a loss without a kernel waits for the device.

This module does without triton; :mod:`.triton_pass` does the work and needs it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdpop.engines.base import (
    NO_GRAD,
    Engine,
    EngineOutput,
    Gradients,
    GroupLoss,
    NeedsGrad,
    PairLossPlan,
    Problem,
)
from fastdpop.installed import install

if TYPE_CHECKING:
    from fastdpop.engines.triton_pass import TritonPass

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PRODUCTS = ("auto", "kernels")
"""Who forms dHidden and dWeight: cuBLAS where it can, or our kernels always."""

OLDEST = (3, 6)
"""The oldest triton that compiles the kernels."""

FORWARDS = ("plain", "gluon")
"""Which forward product: the plain one, or the warp-specialised one on Hopper."""


class TritonEngine(Engine):
    """Triton kernels for float32, bfloat16 and float16 on CUDA devices, or on the CPU in Triton's
    interpreter.

    Args:
        products: who forms dHidden and dWeight. ``"auto"``: cuBLAS for bfloat16, our kernels for
            float32 (always IEEE), float16 and where rows are skipped; ``"kernels"``: always ours.
            The environment variable ``FASTDPOP_PRODUCTS`` takes the place of ``"auto"``.
        forward: ``"plain"``, or ``"gluon"``: the persistent, warp-specialised kernel for 16-bit
            operands on Hopper, which gives the same bits and is a little faster on an H200, but in
            which racecheck reports a hazard that is not settled; other operands take the plain one.
            The environment variable ``FASTDPOP_FORWARD`` takes the place of None.
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
        reason = unusable()
        if reason is not None:
            return reason
        interpreted = _interpreted()
        if device.type == "cpu" and not interpreted:
            return "it needs a CUDA device, or TRITON_INTERPRET=1 when triton is first imported"
        if device.type == "cuda" and interpreted:
            return "triton runs in its interpreter (TRITON_INTERPRET=1), which computes on the CPU"
        return None

    def automatic(self, device: torch.device) -> bool:
        """Not in the interpreter, which is for tests: nobody gets it without asking."""
        return device.type != "cpu"

    def describe(self) -> str:
        """Triton's version, and how it runs."""
        how = " in the interpreter" if _interpreted() else ""
        return f"Triton {_version()} kernels{how}"

    def chunk_rows(
        self, problem: Problem, statistics: tuple[str, ...], needs_grad: NeedsGrad
    ) -> int:
        """As many as the softmax is kept of; in float16, where none is, as the workspace holds
        partial sums for.
        """
        from fastdpop.engines.triton_pass import TritonPass

        return TritonPass(problem, statistics, needs_grad, self.products, self.forward).row_limit

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> EngineOutput:
        """Log-probs alone: 1 matrix product."""
        run = self._begin(problem, statistics, "forward_only")
        run.forward_only(run.everything)
        return run.output()

    def logps_and_dlogp_dhidden(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> EngineOutput:
        """Log-probs and d logp / d hidden: 2 matrix products, whatever the workspace; 3 in
        float16.
        """
        run = self._begin(problem, statistics, "dlogp_dhidden")
        found = torch.empty_like(problem.hidden)
        run.dlogp_dhidden(found)
        return run.output(dlogp_dhidden=found)

    def gradients(
        self, problem: Problem, lse: Tensor, dlogp: Tensor, needs_grad: NeedsGrad
    ) -> Gradients:
        """Gradients for derivatives that are known, computing the logits again."""
        run = self._begin(problem, (), "recompute", needs_grad)
        run.lse.copy_(lse)
        run.recompute(run.everything, dlogp.float())
        return run.finished()

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        loss: GroupLoss,
        needs_grad: NeedsGrad,
    ) -> EngineOutput:
        """Chunk by chunk of whole groups: 3 matrix products for a trained lm_head, 4 for a group
        beyond the workspace and in float16.
        """
        run = self._begin(problem, statistics, "one_pass", needs_grad, loss.plan)
        pairs = run.pair_loss(loss.plan)
        run.one_pass(loss if pairs is None else pairs.group_loss())
        if pairs is None:
            return run.output()
        return run.output(losses=pairs.losses, sequence_logps=pairs.sequence_logps)

    def _begin(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        route: str,
        needs_grad: NeedsGrad = NO_GRAD,
        plan: PairLossPlan | None = None,
    ) -> TritonPass:
        """A pass whose kernels have been checked on this chip: see :mod:`.self_check`."""
        from fastdpop.engines import self_check
        from fastdpop.engines.triton_pass import TritonPass

        run = TritonPass(problem, statistics, needs_grad, self.products, self.forward)
        if problem.hidden.device.type == "cuda":
            self_check.ensure(run, route, plan)
        return run


def _one_of(allowed: tuple[str, ...], value: str, name: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {allowed}")
    return value


def _of_environment(name: str, allowed: tuple[str, ...]) -> str:
    """A choice by an environment variable; the first of those allowed where it is not set."""
    return _one_of(allowed, os.environ.get(name, allowed[0]), f"the environment variable {name}")


@functools.cache
def unusable() -> str | None:
    """Why no kernels can be had on any device: there is no triton, or one that is too old."""
    version = _version()
    if version is None:
        return f"triton is not installed: {install('triton')}"
    from packaging.version import Version

    if Version(version).release < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"triton is {version}, expected {oldest} or later, which comes with torch 2.10"
    return None


def _version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # that of nightly builds has another name
        import triton

        return str(triton.__version__)


def _interpreted() -> bool:
    from fastdpop.kernels import config

    return config.INTERPRETED
