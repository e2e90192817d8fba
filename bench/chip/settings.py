"""Other settings of the kernels than those that are shipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

Setting = tuple[str, Callable[[], object]]
"""A name, and a launch."""


def settings(hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[Setting]:
    """Launches of the forward product, of dHidden and of dWeight, with ``hidden (n, H)``,
    ``weight (V, H)`` of one 16-bit dtype and ``targets (n,)``.
    """
    from fastdpop.kernels import config, forward

    base = config.of(config.target_of(hidden.device), hidden.dtype)
    kept = hidden.new_empty((len(hidden), forward.kept_width(len(weight), base)))
    yield from _forward(hidden, weight, targets, base, kept)
    yield from _gradients(hidden, weight, base, kept)


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, base: Any, kept: Tensor
) -> Iterator[Setting]:
    from fastdpop.kernels import forward, gluon_forward, target_logit

    rows, vocabulary = len(hidden), len(weight)
    plain = forward.Transform(scale=1.4427, cap=1.0, softcap=False, slope=1.0)
    capped = forward.Transform(scale=43.28, cap=1 / 30, softcap=True, slope=1.0)
    shift = target_logit.target_logit(hidden, weight, None, targets, plain)
    one_tile = targets % base.forward.v
    every_tile = torch.arange(rows, device=hidden.device) * (4 * base.forward.v) % vocabulary

    def launch(
        module: Any = forward, of: Any = base, to: Any = plain, keep: bool = True,
        statistics: bool = False, y: Tensor = targets,
    ) -> Callable[[], object]:  # fmt: skip
        return lambda: module.forward(
            hidden, weight, None, y, shift, to, of,
            exp_logits=kept if keep else None, statistics=statistics,
        )  # fmt: skip

    def blocks(**changes: int) -> Any:
        return replace(base, forward=replace(base.forward, **changes))

    yield "forward, as shipped", launch()
    yield "forward, nothing kept", launch(keep=False)
    yield "forward, 3 stages", launch(of=blocks(stages=3))
    for group in (8, 24, 32):
        yield f"forward, group {group}", launch(of=replace(base, group_n=group))
    # E is stored in quarters of a tile, and half as wide ones fill the same memory.
    yield "forward, 128 x 128, 4 warps, 4 stages", launch(of=blocks(v=128, warps=4))
    yield "forward, 128 x 128, 4 warps, 3 stages", launch(of=blocks(v=128, warps=4, stages=3))
    yield "forward, softcap", launch(to=capped)
    yield "forward, statistics", launch(keep=False, statistics=True)
    yield "forward, targets in one tile", launch(y=one_tile)
    yield "forward, targets in every tile", launch(y=every_tile)
    if gluon_forward.supported(hidden, weight, kept, base) is None:
        gluon = gluon_forward
        yield "gluon", launch(gluon)
        yield "gluon, nothing kept", launch(gluon, keep=False)
        for group in (8, 24, 32):
            yield f"gluon, group {group}", launch(gluon, of=replace(base, group_n=group))
        yield "gluon, softcap", launch(gluon, to=capped)
        yield "gluon, statistics", launch(gluon, keep=False, statistics=True)
        yield "gluon, targets in every tile", launch(gluon, y=every_tile)


def _gradients(hidden: Tensor, weight: Tensor, base: Any, kept: Tensor) -> Iterator[Setting]:
    from fastdpop.kernels import gradients

    factor = torch.ones(len(hidden), device=hidden.device)
    out_hidden = torch.empty_like(hidden, dtype=torch.float32)
    out = torch.empty_like(weight, dtype=torch.float32)

    def of_hidden(cublas: bool) -> Callable[[], object]:
        return lambda: gradients.hidden_gradient(
            kept, weight, factor, out_hidden, base, cublas=cublas
        )

    def of_weight(cublas: bool, added: bool = False, of: Any = base) -> Callable[[], object]:
        return lambda: gradients.weight_gradient(
            kept, hidden, factor, out, of, accumulate=added, cublas=cublas
        )

    for cublas in (True, False):
        by = "cuBLAS" if cublas else "kernel"
        yield f"dHidden, {by}", of_hidden(cublas)
        for added in (False, True):
            yield f"dWeight, {by}{', added' if added else ''}", of_weight(cublas, added)
    others = {"3 stages": replace(base, dweight=replace(base.dweight, stages=3))}
    others |= {f"group {group}": replace(base, group_n=group) for group in (8, 32)}
    for name, of in others.items():
        yield f"dWeight, kernel, {name}", of_weight(False, of=of)
