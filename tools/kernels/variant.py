"""A kernel in one configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """What one compilation takes, and what is expected of its result.

    Attributes:
        name: kernel and options, target, dtype and tile, joined by slashes.
        kernel: the jitted function.
        signature: Triton's type of every argument, "constexpr" for constants.
        constants: their values; None for arguments that this variant does without.
        num_warps, num_stages: launch options.
        target: one of :data:`.chips.CHIPS`.
        default: whether a call without options beyond the common ones gets it.
        attrs: what is known of arguments, by path, as triton's ``ASTSource`` takes it.
        float64: whether it computes in float64 on purpose.
        warpgroup: whether its 16-bit products must be those of warpgroups where there are such
            (sm_90a); not in small kernels that are rarely used.
        gluon: whether it is written in Gluon.
        options: further launch options.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    target: str
    default: bool
    attrs: Mapping[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    float64: bool = False
    warpgroup: bool = False
    gluon: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


Variants = Callable[[str], Sequence[Variant]]
"""What there is to compile for a target. A function of a module: it travels between processes by its
name."""
