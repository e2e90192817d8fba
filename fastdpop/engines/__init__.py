"""Engines: who computes log-probs and gradients through the head, chosen by device and overridable
by name.

    fastdpop.engines.available("cpu")      # names that can run there, best first
    fastdpop.engines.explain("cuda")       # every engine, with the reason it can or cannot run
    fused_dpop_loss(..., engine="eager")

:mod:`fastdpop.engines.base` says what an engine owes; :func:`register` adds one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdpop.compiling import constant
from fastdpop.engines.base import (
    DEFAULT_WORKSPACE_BYTES,
    NO_GRAD,
    STATISTICS,
    Engine,
    EngineOutput,
    Gradients,
    GroupLoss,
    NeedsGrad,
    PairLossPlan,
    Problem,
    RowValues,
    default_workspace,
)
from fastdpop.engines.cpu import CPUEngine
from fastdpop.engines.cpu_library import DTYPES, warn_if_missing
from fastdpop.engines.eager import EagerEngine
from fastdpop.engines.triton import TritonEngine
from fastdpop.names import hint

__all__ = [
    "DEFAULT_WORKSPACE_BYTES",
    "NO_GRAD",
    "STATISTICS",
    "Engine",
    "EngineOutput",
    "Explanation",
    "Gradients",
    "GroupLoss",
    "NeedsGrad",
    "PairLossPlan",
    "Problem",
    "RowValues",
    "available",
    "choose",
    "default_workspace",
    "explain",
    "get",
    "register",
]


class Explanation(NamedTuple):
    """One engine's answer for one device."""

    name: str
    available: bool
    reason: str
    chosen: bool


_ENGINES: dict[str, Engine] = {}


def register(engine: Engine, *, first: bool = True) -> None:
    """Add an engine; `first` lets ``engine="auto"`` prefer it to those registered so far.

    Raises:
        ValueError: its name is taken, or is ``"auto"``.
    """
    if engine.name in _ENGINES or engine.name == "auto":
        raise ValueError(f"an engine named {engine.name!r} cannot be registered: the name is taken")
    others = dict(_ENGINES)
    _ENGINES.clear()
    _ENGINES.update({engine.name: engine, **others} if first else {**others, engine.name: engine})


def get(name: str) -> Engine:
    """The engine of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in _ENGINES:
        raise ValueError(
            f"engine is {name!r}, expected 'auto' or one of {sorted(_ENGINES)}"
            + hint(name, ("auto", *_ENGINES))
        )
    return _ENGINES[name]


def explain(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Explanation]:
    """Every engine, in order of preference, with what speaks for or against it.

    One that ``engine="auto"`` does not take there (:meth:`Engine.automatic`) comes last.
    """
    where = torch.device(device)
    names = sorted(_ENGINES, key=lambda name: not _ENGINES[name].automatic(where))
    reasons = {name: _ENGINES[name].unavailable(where, dtype) for name in names}
    chosen = next((name for name, reason in reasons.items() if reason is None), None)
    return [
        Explanation(name, reason is None, reason or _ENGINES[name].describe(), name == chosen)
        for name, reason in reasons.items()
    ]


def available(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[str, ...]:
    """Names of the engines that can compute on a device in a dtype, best first."""
    return tuple(line.name for line in explain(device, dtype) if line.available)


@constant
def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the engine that ``engine=name`` means on a device, for products in a dtype.

    Warns once where ``"auto"`` would have meant ``"cpu"``, had its C++ library been built.

    Raises:
        ValueError: there is no such engine, or it cannot compute that.
    """
    if name == "auto":
        if device.type == "cpu" and dtype in DTYPES:
            warn_if_missing()
        return available(device, dtype)[0]
    reason = get(name).unavailable(device, dtype)
    if reason is not None:
        raise ValueError(f"engine {name!r} cannot run on {device}: {reason}")
    return name


register(EagerEngine())
register(CPUEngine())
register(TritonEngine())
