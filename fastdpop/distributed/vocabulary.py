"""An lm_head whose vocabulary is split over processes, each with consecutive rows of it.

Any engine computes with the rows of its own process as if there were no others, and gives the local
log-sum-exp of each row. From all of them follows the share of the row's probability that lies here,

    w = exp(lse here - lse of the whole vocabulary),

and ``w * p`` is the whole vocabulary's softmax, where p is the local one. So

    logp             = logp there + log w there             where the target lies
    d logp / d z_v   = onehot - w * p                       here

The engine knows ``onehot - p`` of a local target: the row's own, or where that lies elsewhere any
token. It is called with ``w * dlogp`` for the derivative, and what is left is one number per row,
at the local target alone:

    (1 - w) * dlogp                                         of the row's own target
    -w * dlogp                                              of a token that stands in for it

Between the forward product and the products of the gradients, processes exchange a few numbers per
row, and never logits. Every process computes the same log-probs from them, bit for bit.

The softmax is over a vocabulary, so 1 - w is as exact as 1 - p: the sum of the *others'* shares.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpop.distributed import collectives
from fastdpop.distributed.groups import Group
from fastdpop.engines.base import (
    NO_GRAD,
    Engine,
    EngineOutput,
    Gradients,
    GroupLoss,
    NeedsGrad,
    Problem,
    RowValues,
)
from fastdpop.engines.chunks import pieces_of, plan, rows_that_fit, zeros_where

_ANY_NUMBER = 2**62
"""Of rows: a limit that is none."""


class VocabularyParallel(Engine):
    """An engine for the whole vocabulary, of which each process of a group holds consecutive rows.

    A problem has this process's rows of `weight` and `bias` (none at all is fine), and the `hidden`,
    `targets` (tokens of the whole vocabulary) and `groups` that all processes of the group have;
    they call the same methods in the same order. Log-probs and statistics are of the whole
    vocabulary and equal everywhere; the gradients of weight and bias are those of the local rows;
    the gradient of hidden, and d logp / d hidden, are the *parts* that the local rows contribute:
    their sum over the group is the gradient. ``EngineOutput.lse`` is of the local rows, as
    :meth:`gradients` takes it.

    Args:
        inner: computes with the local rows.
        group: the processes, in the order of their rows.
        start: the token of this process's first row.
        vocabulary: how many tokens there are in all.

    Raises (in every process):
        ValueError: by the first exchange of a call: the rows of all processes are not as many as
            `vocabulary` or do not begin where `start` says, or processes were asked for different
            things.
    """

    def __init__(self, inner: Engine, group: Group, start: int, vocabulary: int) -> None:
        self.inner, self.group, self.start, self.vocabulary = inner, group, start, vocabulary
        self.name = inner.name

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """As the engine within."""
        return self.inner.unavailable(device, dtype)

    def automatic(self, device: torch.device) -> bool:
        """As the engine within."""
        return self.inner.automatic(device)

    def describe(self) -> str:
        """What computes, and among how many."""
        return f"{self.inner.describe()}, the vocabulary split over {self.group.size} processes"

    def chunk_rows(
        self, problem: Problem, statistics: tuple[str, ...], needs_grad: NeedsGrad
    ) -> int:
        """The least of all processes, who have to ask together."""
        return _Shard(self, problem, statistics).agree("chunk_rows", needs_grad)

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> EngineOutput:
        """Log-probs alone: 1 matrix product."""
        shard = _Shard(self, problem, statistics)
        shard.agree("logps", NO_GRAD)
        found = shard.engine.logps(shard.problem, shard.names)
        whole, _ = shard.whole(slice(0, len(problem.targets)), _values(found))
        return EngineOutput(whole.logps, found.lse, whole.statistics)

    def logps_and_dlogp_dhidden(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> EngineOutput:
        """Log-probs and this process's part of d logp / d hidden: 2 matrix products."""
        shard = _Shard(self, problem, statistics)
        shard.agree("logps_and_dlogp_dhidden", NO_GRAD)
        found = shard.engine.logps_and_dlogp_dhidden(shard.problem, shard.names)
        everything = slice(0, len(problem.targets))
        whole, log_share = shard.whole(everything, _values(found))
        part = found.dlogp_dhidden
        assert part is not None
        own = shard.derivatives(everything, log_share, torch.ones_like(log_share))
        for at in shard.at_targets(own.at_target):
            scaled = part[at.rows].to(problem.result_dtype) * own.everywhere[at.rows, None]
            part[at.rows] = scaled.addcmul_(at.factor[:, None], at.weight)
        return EngineOutput(whole.logps, found.lse, whole.statistics, part)

    def gradients(
        self, problem: Problem, lse: Tensor, dlogp: Tensor, needs_grad: NeedsGrad
    ) -> Gradients:
        """Gradients for derivatives that are known; `lse` is the local one. As many products as the
        engine within makes.
        """
        shard = _Shard(self, problem, ())
        log_share = shard.log_share(lse)
        own = shard.derivatives(slice(0, len(dlogp)), log_share, dlogp)
        found = shard.engine.gradients(shard.problem, lse, own.everywhere, needs_grad)
        return shard.corrected(found, own.at_target)

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        loss: GroupLoss,
        needs_grad: NeedsGrad,
    ) -> EngineOutput:
        """Both in one pass, with an exchange in each chunk: as many products as the engine within
        makes.
        """
        shard = _Shard(self, problem, statistics)
        shard.agree("logps_and_gradients", needs_grad)
        new, dtype = problem.hidden.new_empty, problem.result_dtype
        logps, at_target = new((2, len(problem.targets)), dtype=dtype)
        lines = new((len(statistics), len(problem.targets)), dtype=dtype)

        def dlogp(first: int, last: int, values: RowValues) -> Tensor:
            rows = slice(problem.groups[first], problem.groups[last])
            whole, log_share = shard.whole(rows, values)
            logps[rows], lines[:, rows] = whole.logps, whole.statistics
            own = shard.derivatives(rows, log_share, loss.dlogp(first, last, whole))
            at_target[rows] = own.at_target
            return own.everywhere

        # A plan would be of local log-probs, so the engine calls back.
        found = shard.engine.logps_and_gradients(
            shard.problem, shard.names, GroupLoss(dlogp), needs_grad
        )
        gradients = shard.corrected(found.gradients, at_target)
        return EngineOutput(logps, found.lse, lines, gradients=gradients)


def _values(found: EngineOutput) -> RowValues:
    return RowValues(found.logps, found.lse, found.statistics)


class _Derivatives(NamedTuple):
    """What rows' derivatives come to in one process, both ``(n,)`` in the result dtype.

    Attributes:
        everywhere: of the local log-probs.
        at_target: to be added for the logit of the local target.
    """

    everywhere: Tensor
    at_target: Tensor


class _AtTargets(NamedTuple):
    """Consecutive rows at their local targets, in the result dtype.

    Attributes:
        rows, tokens: the rows, and their local targets ``(n,)``.
        factor: ``(n,)`` derivative with respect to the raw logit.
        hidden, weight: ``(n, H)``, as they enter the products.
    """

    rows: slice
    tokens: Tensor
    factor: Tensor
    hidden: Tensor
    weight: Tensor


class _Shard:
    """A problem as one process of the group sees it.

    Attributes:
        problem: with local targets: the row's own, or a token that stands in for it.
        mine: ``(N,)`` whether it is the row's own.
        engine: computes with the local rows.
        names: of the statistics that it is asked for, `statistics` first.
    """

    def __init__(
        self, of: VocabularyParallel, problem: Problem, statistics: tuple[str, ...]
    ) -> None:
        self.of, self.group, self.statistics = of, of.group, statistics
        self.targets = problem.targets
        also = ("max_logit",) if "token_accuracy" in statistics else ()
        self.names = tuple(dict.fromkeys((*statistics, *also)))
        here = problem.targets - of.start
        self.mine = (here >= 0) & (here < len(problem.weight))
        others = _stand_ins(problem)
        self.engine: Engine = _NoToken() if others is None else of.inner
        others = torch.zeros_like(here) if others is None else others
        self.problem = dataclasses.replace(problem, targets=torch.where(self.mine, here, others))
        self.sizes: list[int] = []

    def agree(self, asked: str, needs_grad: NeedsGrad) -> int:
        """The first exchange of a call: with one number of rows all processes go through the same
        chunks. Also the sizes of all shards.
        """
        p, of = self.problem, self.of
        # Whether the lm_head is trained decides; a gradient of its size need not be made to tell.
        limit = self.engine.chunk_rows(p, self.names, NeedsGrad(bias=needs_grad.lm_head))
        limit = min(limit, p.chunk_rows or _ANY_NUMBER)
        same = zlib.crc32(repr((asked, self.statistics, p.groups, p.transform)).encode())
        own = [limit, len(p.weight), of.start, of.vocabulary, len(p.targets), same]
        limits, sizes, starts, totals, rows, asked_for = zip(
            *collectives.every(own, self.group, p.hidden.device), strict=True
        )
        if len(set(rows)) > 1:
            raise ValueError(
                f"hidden has {', '.join(map(str, rows))} scored tokens on the ranks of tp_group, "
                f"expected the same on all: they share the vocabulary, not the tokens"
            )
        if len(set(asked_for)) > 1:
            raise ValueError(
                "the ranks of tp_group make different calls, expected the same sequences, "
                "statistics, transform of the logits and required gradients on all"
            )
        bounds = [sum(sizes[:rank]) for rank in range(len(sizes))]
        fits = all(s == b or n == 0 for s, b, n in zip(starts, bounds, sizes, strict=True))
        if not fits or set(totals) != {sum(sizes)}:
            raise ValueError(
                f"weight has {', '.join(map(str, sizes))} rows on the ranks of tp_group, from the "
                f"tokens {', '.join(map(str, starts))} on, of {max(totals)} in all: expected each "
                f"to begin where the rank before ends, and the last to end with the vocabulary"
            )
        self.sizes = list(sizes)
        self.problem = dataclasses.replace(p, chunk_rows=min(limits))
        return min(limits)

    def log_share(self, lse: Tensor) -> Tensor:
        """``(n,)`` float64 log of the share of each row's probability that lies here."""
        return _log_shares(self._exchanged(lse[None])[:, 0])[1][self.group.rank]

    def _exchanged(self, lines: Tensor) -> Tensor:
        """``(processes, k, n)`` float64: the lines ``(k, n)`` of all processes."""
        count, size = len(lines), self.group.size
        if lines.numel() == 0:
            return lines.new_zeros((size, *lines.shape), dtype=torch.float64)
        found = collectives.concatenated(lines, [count] * size, self.group)
        return found.view(size, *lines.shape).double()

    def whole(self, rows: slice, values: RowValues) -> tuple[RowValues, Tensor]:
        """What is known of rows over the whole vocabulary, from what is known here: the one exchange
        of a chunk. Also the :meth:`log_share` of each.
        """
        dtype = values.logps.dtype
        lines = torch.cat([values.lse[None], values.logps[None], values.statistics])
        found = self._exchanged(lines)
        lse, shares = _log_shares(found[:, 0])
        ends = torch.tensor(self.sizes, device=lse.device).cumsum(0)
        owner = torch.bucketize(self.targets[rows], ends, right=True)[None]
        logps = (found[:, 1] + shares).gather(0, owner)[0]
        local = dict(zip(self.names, found[:, 2:].unbind(1), strict=True))
        lines = values.statistics.new_empty((len(self.statistics), len(logps)))
        for line, name in zip(lines, self.statistics, strict=True):
            of_shards = local[name]
            if name == "entropy":
                # That of the shares, and within them.
                p = shares.exp()
                line.copy_(_sum(torch.where(p == 0, 0.0, p * (of_shards - shares))))
            elif name == "mean_logits":
                there = [m * n for m, n in zip(of_shards, self.sizes, strict=True) if n]
                line.copy_(_sum(torch.stack(there)) / self.of.vocabulary)
            elif name == "aligned_logps":
                # log sum p**2, by which a shard's differs from its log-prob, whatever its target
                squares = 2.0 * shares + (found[:, 1] - of_shards)
                line.copy_(logps - _log_shares(squares)[0])
            elif name == "max_logit":
                line.copy_(of_shards.amax(0))
            else:
                largest = local["max_logit"]
                likeliest = largest.gather(0, owner)[0] >= largest.amax(0)
                line.copy_(of_shards.gather(0, owner)[0] * likeliest)
        return RowValues(logps.to(dtype), lse.to(dtype), lines), shares[self.group.rank]

    def derivatives(self, rows: slice, log_share: Tensor, dlogp: Tensor) -> _Derivatives:
        """From derivatives with respect to the log-probs over the whole vocabulary."""
        wide, dtype = dlogp.double(), self.problem.result_dtype
        everywhere = (log_share.exp() * wide).to(dtype)
        own = (-log_share.expm1() * wide).to(dtype)
        return _Derivatives(everywhere, torch.where(self.mine[rows], own, -everywhere))

    def at_targets(self, derivative: Tensor) -> Iterator[_AtTargets]:
        """All rows at their local targets, in pieces, for derivatives ``(N,)`` with respect to the
        logits there.
        """
        p, dtype = self.problem, self.problem.result_dtype
        if len(p.weight) == 0:
            return
        step = rows_that_fit(p.workspace_bytes // 2, 6 * p.hidden.shape[1] * dtype.itemsize)
        for rows in pieces_of(slice(0, len(p.targets)), step):
            tokens = p.targets[rows]
            hidden = p.hidden[rows].to(p.compute_dtype).to(dtype)
            weight = p.weight.index_select(0, tokens).to(p.compute_dtype).to(dtype)
            factor = derivative[rows].clone()
            logits = factor  # without a softcap the slope does not depend on them
            if p.transform.softcap is not None:
                logits = (hidden * weight).sum(1)
                if p.bias is not None:
                    logits += p.bias.index_select(0, tokens).to(p.compute_dtype)
                p.transform.transform_(logits)
            p.transform.scale_by_slope_(factor, logits)
            yield _AtTargets(rows, tokens, factor, hidden, weight)

    def corrected(self, gradients: Gradients, derivative: Tensor) -> Gradients:
        """With what the local targets' logits add, in place."""
        for at in self.at_targets(derivative):
            if gradients.hidden is not None:
                gradients.hidden[at.rows].addcmul_(at.factor[:, None], at.weight)
            if gradients.weight is not None:
                _add_rows(gradients.weight, at.tokens, at.factor[:, None] * at.hidden)
            if gradients.bias is not None:
                _add_rows(gradients.bias, at.tokens, at.factor)
        return gradients


def _stand_ins(problem: Problem) -> Tensor | None:
    """``(N,)`` local tokens for targets that may lie elsewhere: one for each target, so that rows
    that repeat still do, and spread over the vocabulary. None where all tokens are ruled out.
    """
    tokens = len(problem.weight)
    if tokens == 0:
        return None
    if problem.bias is None or problem.transform.softcap is not None:
        return problem.targets % tokens
    possible = (problem.bias != -torch.inf).nonzero()[:, 0]
    return possible[problem.targets % len(possible)] if len(possible) else None


def _log_shares(lse: Tensor) -> tuple[Tensor, Tensor]:
    """``(n,)`` log-sum-exp over shards of ``(shards, n)``, and each shard's minus that; the log of a
    share near 1 is exact.
    """
    ordered = lse.sort(dim=0, descending=True).values
    rest = _sum((ordered[1:] - ordered[0]).exp_()).log1p_()
    return ordered[0] + rest, lse - ordered[0] - rest


def _sum(parts: Tensor) -> Tensor:
    """Over the first dimension, one after another: with the same bits however many rows there are."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """``total[index] += rows`` in an order that is always the same."""
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)


class _NoToken(Engine):
    """The engine of a process without a token that is possible: it has none of the probability."""

    name = "none"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Never."""
        del device, dtype
        return None

    def describe(self) -> str:
        """What it computes with."""
        return "nothing"

    def chunk_rows(
        self, problem: Problem, statistics: tuple[str, ...], needs_grad: NeedsGrad
    ) -> int:
        """Any number."""
        del problem, statistics, needs_grad
        return _ANY_NUMBER

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> EngineOutput:
        """Logits of -inf."""
        rows, dtype = len(problem.targets), problem.result_dtype
        never = problem.hidden.new_full((rows,), -torch.inf, dtype=dtype)
        lines = never.new_zeros((len(statistics), rows))
        for line, name in zip(lines, statistics, strict=True):
            if name in ("mean_logits", "max_logit"):
                line.fill_(-torch.inf)
        return EngineOutput(never, never.clone(), lines)

    def logps_and_dlogp_dhidden(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> EngineOutput:
        """No derivative."""
        found = self.logps(problem, statistics)
        return dataclasses.replace(found, dlogp_dhidden=torch.zeros_like(problem.hidden))

    def gradients(
        self, problem: Problem, lse: Tensor, dlogp: Tensor, needs_grad: NeedsGrad
    ) -> Gradients:
        """Zeros."""
        del lse, dlogp
        dtype = problem.result_dtype
        return Gradients(
            zeros_where(needs_grad.hidden, problem.hidden, dtype),
            zeros_where(needs_grad.weight, problem.weight, dtype),
            zeros_where(needs_grad.bias, problem.weight[:, 0], dtype),
        )

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        loss: GroupLoss,
        needs_grad: NeedsGrad,
    ) -> EngineOutput:
        """The loss takes part in every chunk."""
        found = self.logps(problem, statistics)
        for chunk in plan(problem.groups, problem.chunk_rows or _ANY_NUMBER):
            rows = chunk.rows
            values = RowValues(found.logps[rows], found.lse[rows], found.statistics[:, rows])
            loss.dlogp(chunk.first, chunk.last, values)
        gradients = self.gradients(problem, found.lse, found.logps, needs_grad)
        return dataclasses.replace(found, gradients=gradients)
