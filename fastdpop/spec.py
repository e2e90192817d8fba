"""How one call is computed: everything about it that is not a tensor."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import torch

from fastdpop.compiling import constant
from fastdpop.distributed.parallel import Shard
from fastdpop.engines.base import NO_GRAD, NeedsGrad, result_dtype
from fastdpop.transform import LogitTransform


@dataclass(frozen=True)
class Spec:
    """What an operator is told besides tensors.

    Operators take no Python objects, so it travels as its :meth:`text`.

    Attributes:
        transform: of the logits.
        compute_dtype: the dtype in which hidden states and weight enter the products.
        workspace_bytes: bound on scratch memory.
        engine: the name of the engine.
        statistics: names among :data:`fastdpop.engines.STATISTICS`.
        needs_grad: which gradients are asked for.
        reduction: ``"mean"`` or ``"sum"`` over pairs.
        values: names of the pairs' values, in the order in which the operator gets them.
        loss: a key of :func:`fastdpop.losses.key_of`; empty where only log-probs are asked for.
        shard: which part of the vocabulary the lm_head has; None for all of it.
    """

    transform: LogitTransform
    compute_dtype: torch.dtype
    workspace_bytes: int
    engine: str
    statistics: tuple[str, ...] = ()
    needs_grad: NeedsGrad = NO_GRAD
    reduction: str = "mean"
    loss: str = ""
    values: tuple[str, ...] = ()
    shard: Shard | None = None

    @property
    def result_dtype(self) -> torch.dtype:
        """See :func:`fastdpop.engines.base.result_dtype`."""
        return result_dtype(self.compute_dtype)

    def text(self) -> str:
        """The spec as an operator's argument; :meth:`parse` is the inverse."""
        t = self.transform
        return _text(
            (t.softcap, t.logit_scale, t.temperature),
            self.compute_dtype,
            self.workspace_bytes,
            self.engine,
            self.statistics,
            (self.needs_grad.hidden, self.needs_grad.weight, self.needs_grad.bias),
            self.reduction,
            self.loss,
            self.values,
            None if self.shard is None else self.shard.numbers(),
        )

    @staticmethod
    def parse(text: str) -> Spec:
        """The spec of a :meth:`text`."""
        return _parse(text)


@constant
def _text(
    transform: tuple[float | None, float, float],
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    engine: str,
    statistics: tuple[str, ...],
    needs_grad: tuple[bool, bool, bool],
    reduction: str,
    loss: str,
    values: tuple[str, ...],
    shard: tuple[str, int, int, int, int] | None,
) -> str:
    """A constant to torch.compile, which takes plain values for that and no objects."""
    return json.dumps(
        {
            "transform": transform,
            "compute_dtype": str(compute_dtype).removeprefix("torch."),
            "workspace_bytes": workspace_bytes,
            "engine": engine,
            "statistics": statistics,
            "needs_grad": needs_grad,
            "reduction": reduction,
            "loss": loss,
            "values": values,
            "shard": shard,
        }
    )


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Spec:
    given = json.loads(text)
    shard = given.pop("shard")
    return Spec(
        transform=LogitTransform(*given.pop("transform")),
        compute_dtype=getattr(torch, given.pop("compute_dtype")),
        statistics=tuple(given.pop("statistics")),
        values=tuple(given.pop("values")),
        needs_grad=NeedsGrad(*given.pop("needs_grad")),
        shard=None if shard is None else Shard.of_numbers(shard),
        **given,
    )
