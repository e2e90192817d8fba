"""The Triton engine checks its compiled kernels before it trusts them.

Compilers miscompile: with triton 3.6, whose ptxas is 12.8, an earlier dWeight was undefined on
sm_90a, and looked like a gradient. So on a chip and a compiler whose results nobody has verified,
the first call of each kind sends a small problem ahead through the same kernels, whose answer plain
torch knows in float64: a few tiles, the last ones cut off, in pipelines that run more steps than
they have stages, with tokens near certainty, tokens of probability 1e-50, and rows whose
dlogp is 0. A second problem comes between two runs of the first, which must give the same bits:
what is undefined varies, and what was not written still holds the other problem's numbers.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from fastdpop.engines.base import NO_GRAD, PairLossPlan
from fastdpop.engines.self_check_cases import PairsCase, RowsCase, Step
from fastdpop.engines.triton_pass import TritonPass
from fastdpop.kernels import config, losses

VERIFIED: frozenset[tuple[str, str]] = frozenset()
"""Chips and assemblers, such as ``("sm_90a", "12.8.93")``, where nothing is checked.

What it takes to add a line: with every release of triton that assembles for this chip with this
ptxas, all tests of tests/gpu have passed on such a chip, and so has this check, for every dtype and
option, alone and while other work fills the chip. Reading the machine code is not enough.
"""

VARIABLE = "FASTDPOP_SELF_CHECK"
"""The environment variable that turns the check off by 0."""

_checked: set[Step] = set()
_lock = threading.Lock()


def ensure(run: TritonPass, route: str, plan: PairLossPlan | None = None) -> None:
    """Check what a pass is about to use, unless this process has done so or need not.

    Args:
        route: the method of `run` that comes next; plan: the loss that it gets.

    Raises:
        ValueError: the environment variable ``FASTDPOP_SELF_CHECK`` is neither 0 nor 1.
        RuntimeError: the kernels compute something else than plain torch.
    """
    with _on(run.problem.hidden.device):
        if not _due(run.problem.hidden.device):
            return
    for step in steps(run, route, plan):
        if step not in _checked:  # the usual answer, without waiting for other threads
            with _lock:
                if step not in _checked:
                    check(step, plan)
                    _checked.add(step)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """A device as the current one, for the launches and streams inside."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def enabled() -> bool:
    """Whether the environment variable leaves the check on.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable {VARIABLE} is {value!r}, expected 0 or 1")
    return value == "1"


def _due(device: torch.device) -> bool:
    if not enabled() or not compiled() or combination(device) in VERIFIED:
        return False
    # A graph would record the check, which waits for its results.
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def compiled() -> bool:
    """Whether there is a compiler to distrust: Triton's interpreter has none."""
    return not config.INTERPRETED


@functools.cache
def combination(device: torch.device) -> tuple[str, str]:
    """The chip that triton compiles for, as in `VERIFIED`, and the version of its assembler."""
    if device.type != "cuda":
        return "interpreter", "none"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName, f"ROCm {torch.version.hip}"
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    return f"sm_{capability}{'a' * (capability == 90)}", ptxas_version(capability)


@functools.cache
def ptxas_version(capability: int) -> str:
    """Of the ptxas that triton calls for a compute capability; it has several, and which one is for
    which chips differs between its versions.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    said = subprocess.run([get_ptxas(capability).path, "--version"], capture_output=True, text=True)
    found = re.search(r"\bV(\d[\d.]*)", said.stdout)
    return found[1] if found else "of unknown version"


def steps(run: TritonPass, route: str, plan: PairLossPlan | None) -> Iterator[Step]:
    """What a method of a pass consists of: one pass goes one of two ways, by the group's size."""
    p = run.problem
    step = Step(
        route,
        p.hidden.device,
        run.dtype,
        p.hidden.dtype,
        bias=p.bias is not None,
        softcap=p.transform.softcap is not None,
        statistics=bool(run.names),
        needs_grad=run.needs_grad,
        products=run.products,
        product=run.product,
    )
    if route != "one_pass":
        yield step
        return
    chunks = [chunk for chunk in run.chunks() if chunk.pieces]
    if any(chunk.whole and not run.twice for chunk in chunks):
        yield step
    if any(run.twice or not chunk.whole for chunk in chunks):
        yield replace(step, route="forward_only", needs_grad=NO_GRAD)
        yield replace(step, route="recompute", statistics=False)
    found = None if plan is None else losses.jitted(plan.loss, plan.options)
    if found is not None:
        yield Step("pair_loss", p.hidden.device, torch.float32, torch.float32, loss=found[0])


def check(step: Step, plan: PairLossPlan | None = None) -> None:
    """Run a step on small problems and compare; `plan` for a pair loss.

    Raises:
        RuntimeError: the results are wrong, or not the same twice.
    """
    device = step.device
    with _on(device), torch.no_grad(), torch.autocast(device.type, enabled=False):
        one: RowsCase | PairsCase
        other: RowsCase | PairsCase
        if step.route == "pair_loss":
            assert plan is not None
            one, other = PairsCase(step, plan, 1), PairsCase(step, plan, 2)
        else:
            one, other = RowsCase(step, 1), RowsCase(step, 2)
        first, _, again = one.run(), other.run(), one.run()
        wrong = [
            f"{name} {verdict}"
            for name, (value, bound) in one.exact().items()
            if (verdict := _verdict(first[name], again[name], value, bound))
        ]
    if not wrong:
        return
    target, ptxas = combination(device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    options = [name for name in ("bias", "softcap", "statistics") if getattr(step, name)]
    raise RuntimeError(
        f"kernels of the Triton engine compute wrong results on {chip} ({target}), as triton "
        f"{triton.__version__} and ptxas {ptxas} compile them ({step.route}, "
        f"{', '.join([str(step.dtype), *options])}): {'; '.join(wrong)}. Install another version "
        f"of triton, or use engine='eager'; {VARIABLE}=0 goes on without this check, at your own "
        "risk"
    )


def _verdict(first: Tensor, again: Tensor, value: Tensor, bound: Tensor) -> str:
    """What is wrong with two results, or nothing; a NaN is."""
    outside = ~((first.double() - value).abs() <= bound)
    outside |= ~((again.double() - value).abs() <= bound)
    if outside.any():
        return f"is off at {int(outside.sum())} of {outside.numel()} places"
    return "" if torch.equal(first, again) else "differs between two runs"
