"""A call of a public function, its arguments grouped by what they describe and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpop import checks, engines, losses, ops
from fastdpop.choices import LossName, Reduction, Statistic, words
from fastdpop.displacement import Displacement, displacement
from fastdpop.distributed import collectives
from fastdpop.distributed.parallel import Shard
from fastdpop.engines.base import NO_GRAD, NeedsGrad, default_workspace
from fastdpop.losses.base import PairLogps, PreferenceLoss, called
from fastdpop.pair_loss import PairLoss
from fastdpop.rows import Rows
from fastdpop.spec import Spec
from fastdpop.transform import LogitTransform

# What has properties is no NamedTuple: torch 2.9 and 2.10 do not compile those of a tuple.
Pairs = Tensor | Sequence[Sequence[int]]
RefLogps = Tensor | Sequence[Tensor]
PairValues = Mapping[str, Tensor]
Loss = LossName | str | PreferenceLoss | Callable[[PairLogps], Tensor]

DISPLACEMENT = "displacement"
"""See :mod:`fastdpop.displacement`."""

LOGGED = tuple(name for name in words(Statistic) if name != DISPLACEMENT)
"""Statistics of rows that a caller may ask for."""


@dataclass(frozen=True)
class LMHead:
    """An lm_head, and how products with it are computed, as the caller gave them.

    With a `shard`, weight and bias are this process's rows of them; hidden states that were put together of the parts
    of all processes (`joined`) take the sum of their derivatives with them.
    """

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    engine: str
    workspace_bytes: int | None
    shard: Shard | None = None
    joined: bool = False

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.weight) if self.shard is None else self.shard.vocabulary


class Reference(NamedTuple):
    """What a caller gave of the reference."""

    logps: RefLogps | None
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    kl: Tensor | None

    def check(self, loss: PreferenceLoss) -> None:
        """One source of log-probs where the loss needs them, none where it reads none."""
        traits = loss.traits
        checks.reference(self.logps, self.hidden, self.weight, self.bias)
        if traits.needs_reference and self.logps is None and self.hidden is None:
            raise ValueError(f"{called(loss)} needs a reference: pass ref_logps= or ref_hidden=")
        unread = [
            ("ref_logps", self.logps, traits.may_read_reference),
            ("ref_hidden", self.hidden, traits.may_read_reference),
            ("kl", self.kl, traits.uses_kl),
        ]
        for name, value, read in unread:
            if value is not None and not read:
                raise ValueError(
                    f"{name} is given, but {called(loss)} does not read it: leave it out"
                )


NO_REFERENCE = Reference(None, None, None, None, None)


@dataclass(frozen=True)
class Options:
    """What a caller wants to be computed."""

    loss: PreferenceLoss
    pairs: Pairs | None
    reduction: str
    statistics: Sequence[str]
    check_finite: bool
    pair_values: PairValues | None
    state_columns: int | None

    def check(self, width: int) -> None:
        """Values among those that exist, and columns among the `width` that there are."""
        checks.choice("reduction", self.reduction, words(Reduction))
        checks.statistics(self.statistics, words(Statistic))
        checks.flag("check_finite", self.check_finite)
        columns = self.state_columns
        if columns is not None and (type(columns) is not int or not 1 <= columns <= width):
            raise ValueError(
                f"state_columns is {columns!r}, expected a number from 1 to {width}, the width of hidden"
            )
        if columns is not None and not self.displacement:
            raise ValueError(
                f"state_columns is {columns} without {DISPLACEMENT!r} in statistics, expected both: only the CHES "
                "score reads it"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics of rows that are logged or that the loss reads."""
        return tuple(dict.fromkeys((*self.logged, *self.loss.traits.statistics)))

    @property
    def logged(self) -> tuple[str, ...]:
        """The statistics of rows that are logged."""
        return tuple(name for name in self.statistics if name != DISPLACEMENT)

    @property
    def displacement(self) -> bool:
        """Whether it is asked for."""
        return DISPLACEMENT in self.statistics


NO_OPTIONS = Options(losses.as_loss("dpop"), None, "mean", (), False, None, None)


@dataclass(frozen=True)
class Batch:
    """Sequences as the caller laid them out."""

    hidden: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    shift: bool
    hidden_index: Tensor | None

    def check(self, empty: bool = False) -> None:
        """Hidden states and labels fit together; without sequences only where that may be (`empty`)."""
        checks.flag("shift_labels", self.shift)
        checks.batch(self.hidden, self.labels, self.cu_seqlens, self.hidden_index, empty)

    @property
    def sequences(self) -> int:
        """S."""
        return len(self.labels) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def rows(
        self,
        vocab_size: int,
        pairs: Tensor,
        *,
        keep_unpaired: bool = False,
        token_weights: Tensor | None = None,
        ld_alpha: float | None = None,
    ) -> Rows:
        """The scored tokens."""
        tensors = ops.rows_from_labels(
            self.labels,
            vocab_size,
            pairs,
            self.cu_seqlens,
            self.shift,
            keep_unpaired,
            token_weights,
            ld_alpha,
            self.hidden_index,
            self.hidden.shape[0],
        )
        weighted = token_weights is not None or ld_alpha is not None
        return Rows.of_tensors(tensors, weighted=weighted)


@dataclass(frozen=True)
class Call:
    """Hidden states and the lm_head that they go through, checked."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    spec: Spec
    joined: bool = False

    @staticmethod
    def of(hidden: Tensor, head: LMHead, prefix: str = "") -> Call:
        weight, bias = head.weight, head.bias
        checks.no_transform(hidden, weight, bias)
        checks.projection(hidden, weight, bias, prefix, empty=head.shard is not None)
        compute_dtype = checks.compute_dtype(hidden, weight, bias, prefix)
        needs_grad = NO_GRAD
        if torch.is_grad_enabled():
            of_bias = bias is not None and bias.requires_grad
            needs_grad = NeedsGrad(hidden.requires_grad, weight.requires_grad, of_bias)
        return Call(
            hidden=hidden.reshape(-1, hidden.shape[-1]),
            weight=weight,
            bias=bias,
            spec=Spec(
                transform=head.transform,
                compute_dtype=compute_dtype,
                workspace_bytes=checks.workspace(
                    head.workspace_bytes, default_workspace(hidden.device)
                ),
                engine=engines.choose(head.engine, hidden.device, compute_dtype),
                needs_grad=needs_grad,
                shard=head.shard,
            ),
            joined=head.joined,
        )

    def rows_hidden(self, rows: Rows) -> Tensor:
        """``(N, H)`` hidden states of the rows."""
        found = self.hidden.index_select(0, rows.index)
        shard = self.spec.shard
        if shard is None or self.joined or not self.spec.needs_grad.hidden:
            return found
        return collectives.copy_to(found, shard.group)

    def row_logps(self, rows: Rows, statistics: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Log-probs ``(N,)``, differentiable, and statistics ``(K, N)``."""
        logps, _, found, _ = ops.row_logps(
            self.rows_hidden(rows),
            self.weight,
            self.bias,
            rows.targets,
            rows.groups[0],
            replace(self.spec, statistics=statistics).text(),
        )
        return logps, found.detach()

    def pair_loss(
        self, loss: PairLoss, totals: Sequence[float] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, differentiable; sequence log-probs ``(S,)``, statistics ``(K, N)`` and log-probs ``(N,)`` of rows,
        detached.

        `totals`: pairs, sides and chosen tokens of the whole batch, where there is more of it.
        """
        spec = replace(
            self.spec,
            statistics=loss.statistics,
            reduction="mean" if loss.mean else "sum",
            loss=losses.key_of(loss.function),
            values=tuple(loss.values),
        )
        total, sums, found, logps, *_ = ops.pair_loss(
            self.rows_hidden(loss.rows),
            self.weight,
            self.bias,
            loss.rows.tensors(),
            loss.ref_logps,
            loss.kl,
            torch.stack(list(loss.values.values())) if loss.values else None,
            totals,
            spec.text(),
        )
        return total, sums.detach(), found.detach(), logps.detach()

    def displacement(self, rows: Rows, logps: Tensor, columns: int | None) -> Displacement:
        """Of the pairs, from the log-probs ``(N,)`` of the rows and so many columns of hidden states."""
        hidden, bound = self.hidden.detach()[:, :columns], self.spec.workspace_bytes
        return Displacement(*displacement(hidden, logps.detach(), rows.tensors(), bound))
