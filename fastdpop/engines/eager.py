"""The exact engine: plain torch, any device, float64, float32, bfloat16 and float16.

    for each chunk of whole groups, as many rows as the workspace holds logits for:
        z = transform(hidden @ weight.T + bias)      1 product, fp32, vocabulary tile by tile, kept
        logp = z[target] - logsumexp(z)
        dlogp = loss(logp)                           on a few numbers
        g = (onehot - exp(z - lse)) * dz/du          tile by tile, never whole
        dHidden = dlogp * (g @ weight)               1 product
        dWeight += g.T @ (dlogp * hidden)            1 product, fp32

A group whose logits exceed the workspace goes through in pieces and computes its logits twice (4
matrix products instead of 3). The chunks and pieces depend only on the groups, the shapes and the
workspace, so every route gives a row the same log-prob, bit for bit: a policy equal to its reference
has a log-ratio of exactly 0.

Products of 16-bit inputs are exact in fp32 and are accumulated there: on a GPU by the tensor cores,
elsewhere after widening one weight tile at a time. 16-bit logits never exist.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdpop.engines.base import (
    NO_GRAD,
    Engine,
    EngineOutput,
    Gradients,
    GroupLoss,
    NeedsGrad,
    Problem,
)
from fastdpop.engines.chunks import Chunk, Pass, plan, zeros_where


class EagerEngine(Engine):
    """Plain torch, chunked; the engine that runs everywhere and that the others are compared
    with.
    """

    name = "eager"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Never: plain torch runs on every device, in every dtype."""
        del device, dtype
        return None

    def describe(self) -> str:
        """What it computes with."""
        return "plain torch, chunked"

    def chunk_rows(
        self, problem: Problem, statistics: tuple[str, ...], needs_grad: NeedsGrad
    ) -> int:
        """As many as the workspace holds logits for."""
        return EagerPass(problem, statistics, needs_grad).row_limit

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> EngineOutput:
        """Log-probs alone: 1 matrix product."""
        run = EagerPass(problem, statistics)
        for chunk in run.chunks():
            run.forward(chunk)
        return run.output()

    def logps_and_dlogp_dhidden(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> EngineOutput:
        """Log-probs and d logp / d hidden, which needs no loss: 2 matrix products."""
        run = EagerPass(problem, statistics)
        found = torch.empty_like(problem.hidden)
        for piece in run.pieces():
            logits = run.forward_piece(piece)
            found[piece] = run.backward_piece(piece, logits, None, needs_hidden=True)
        return run.output(dlogp_dhidden=found)

    def gradients(
        self, problem: Problem, lse: Tensor, dlogp: Tensor, needs_grad: NeedsGrad
    ) -> Gradients:
        """Gradients for derivatives that are known, computing the logits again."""
        run = EagerPass(problem, (), needs_grad)
        run.lse.copy_(lse)
        for piece in run.pieces():
            run.add_gradients(piece, run.logits(piece), dlogp[piece])
        return run.finished()

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        loss: GroupLoss,
        needs_grad: NeedsGrad,
    ) -> EngineOutput:
        """Log-probs, and gradients of a loss that is known once a group's log-probs are."""
        run = EagerPass(problem, statistics, needs_grad)
        run.one_pass(loss)
        return run.output()


class EagerPass(Pass[Tensor | None]):
    """One pass over a problem: its tiling, its buffers, and the arithmetic of one piece of rows.

    What is kept of a chunk is its logits, where it goes through at once.
    """

    def __init__(
        self, problem: Problem, statistics: tuple[str, ...], needs_grad: NeedsGrad = NO_GRAD
    ) -> None:
        super().__init__(problem, statistics)
        self.dtype = problem.result_dtype
        vocabulary, width = problem.weight.shape
        # Of the workspace, 6/8 hold logits, 1/8 the rows' hidden states, scaled states and
        # derivatives, and 1/8 a vocabulary tile's gradients and widened weights. None of it depends
        # on the number of rows: tiles decide the order of additions.
        eighth = problem.workspace_bytes // 8 // self.dtype.itemsize
        limit = max(1, min(6 * eighth // vocabulary, eighth // (3 * width)))
        self.vocabulary_limit = min(vocabulary, max(1, eighth // (2 * limit + 2 * width)))
        self.row_limit = min(limit, problem.chunk_rows or limit)
        self.memory: Tensor | None = None
        self.gradients = Gradients(
            zeros_where(needs_grad.hidden, problem.hidden, self.dtype),
            zeros_where(needs_grad.weight, problem.weight, self.dtype),
            zeros_where(needs_grad.bias, problem.weight[:, 0], self.dtype),
        )

    def chunks(self) -> list[Chunk]:
        """As many rows as the workspace holds logits for."""
        return plan(self.problem.groups, self.row_limit)

    def pieces(self) -> Iterator[slice]:
        """Of all chunks."""
        for chunk in self.chunks():
            yield from chunk.pieces

    def forward(self, chunk: Chunk) -> Tensor | None:
        """Log-probs and statistics of a chunk; its logits, where it goes through at once."""
        logits = None
        for piece in chunk.pieces:
            logits = self.forward_piece(piece)
        return logits if chunk.whole else None

    def backward(self, chunk: Chunk, kept: Tensor | None, dlogp: Tensor) -> None:
        """Add the gradients of a chunk's rows."""
        for piece in chunk.pieces:
            logits = self.logits(piece) if kept is None else kept
            start = piece.start - chunk.rows.start
            own = dlogp[start : start + piece.stop - piece.start]
            self.add_gradients(piece, logits, own)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Vocabulary slices with their weights in the compute dtype."""
        weight = self.problem.weight
        for start in range(0, weight.shape[0], self.vocabulary_limit):
            tile = slice(start, min(start + self.vocabulary_limit, weight.shape[0]))
            yield tile, weight[tile].to(self.problem.compute_dtype)

    def logits(self, rows: slice) -> Tensor:
        """The transformed logits of a piece of rows, ``(n, V)`` in the result dtype; overwrites
        those of the piece before.
        """
        p = self.problem
        count = rows.stop - rows.start
        if self.memory is None:
            widest = max(piece.stop - piece.start for piece in self.pieces())
            self.memory = p.hidden.new_empty((widest, p.weight.shape[0]), dtype=self.dtype)
        logits = self.memory[:count]
        hidden = p.hidden[rows].to(p.compute_dtype)
        for tile, weight in self.tiles():
            part = logits[:, tile]
            self._product(hidden, weight.T, part)
            if p.bias is not None:
                part.add_(p.bias[tile].to(p.compute_dtype))
            p.transform.transform_(part)
        return logits

    def forward_piece(self, rows: slice) -> Tensor:
        """Log-probs and statistics of a piece of rows; returns its logits."""
        logits = self.logits(rows)
        lowest = torch.finfo(self.dtype).min
        # A row that is -inf throughout a tile (masked vocabulary) must not turn into inf - inf.
        largest = logits.amax(dim=1)
        top = largest.clamp_min(lowest)
        norm, moments = self._moments(logits, top)
        lse = norm.log() + top
        target = logits.gather(1, self.problem.targets[rows, None]).squeeze(1)
        self.lse[rows] = lse
        self.logps[rows] = target - lse
        for line, name in zip(self.statistics, self.names, strict=True):
            if name == "entropy":
                line[rows] = norm.log() - moments["entropy"] / norm
            elif name == "mean_logits":
                line[rows] = moments["mean_logits"] / logits.shape[1]
            elif name == "aligned_logps":
                line[rows] = target - lse - (moments["aligned_logps"].log() - 2.0 * norm.log())
            elif name == "max_logit":
                line[rows] = largest
            else:
                line[rows] = (target >= top).to(self.dtype)
        return logits

    def _moments(self, logits: Tensor, top: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """``sum exp(z - top)`` and the sums that the statistics ask for, tile by tile."""
        norm = torch.zeros_like(top)
        moments = {name: torch.zeros_like(top) for name in self.names}
        for start in range(0, logits.shape[1], self.vocabulary_limit):
            part = logits[:, start : start + self.vocabulary_limit]
            weights = (part - top[:, None]).exp_()
            norm += weights.sum(dim=1)
            if "mean_logits" in moments:
                moments["mean_logits"] += part.sum(dim=1)
            if "entropy" in moments:
                # p log p is 0 at p = 0, where log p is -inf.
                shifted = (part - top[:, None]).clamp_min_(torch.finfo(self.dtype).min)
                moments["entropy"] += shifted.mul_(weights).sum(dim=1)
            if "aligned_logps" in moments:
                moments["aligned_logps"] += weights.square_().sum(dim=1)
        return norm, moments

    def add_gradients(self, rows: slice, logits: Tensor, dlogp: Tensor) -> None:
        """Add what a piece of rows with derivatives `dlogp` contributes to each gradient."""
        hidden = self.gradients.hidden
        found = self.backward_piece(rows, logits, dlogp, needs_hidden=hidden is not None)
        if hidden is not None:
            torch.mul(found, dlogp[:, None], out=hidden[rows])

    def backward_piece(
        self, rows: slice, logits: Tensor, dlogp: Tensor | None, *, needs_hidden: bool
    ) -> Tensor:
        """``d logp / d hidden`` of a piece of rows, ``(n, H)`` (empty if not needed); with `dlogp`,
        adds to dWeight and dBias.
        """
        p = self.problem
        # As the forward pass saw them: autocast rounds hidden states here too.
        hidden = p.hidden[rows].to(p.compute_dtype).to(self.dtype)
        _, weight_sum, bias_sum = self.gradients
        scaled = None
        if dlogp is not None and weight_sum is not None:
            scaled = hidden * dlogp[:, None]
        found = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
        targets, lse = p.targets[rows], self.lse[rows, None]
        line = torch.arange(len(targets), device=targets.device)
        for tile, weight in self.tiles():
            part = logits[:, tile]
            # onehot - softmax, then through the transform
            g = (part - lse).exp_().neg_()
            here = targets - tile.start
            inside = ((here >= 0) & (here < g.shape[1])).to(g.dtype)
            g.index_put_((line, here.clamp(0, g.shape[1] - 1)), inside, accumulate=True)
            p.transform.scale_by_slope_(g, part)
            if needs_hidden:
                self._add_product(g, weight, found)
            if scaled is not None and weight_sum is not None:
                self._add_product(g.T, scaled, weight_sum[tile])
            if dlogp is not None and bias_sum is not None:
                bias_sum[tile] += dlogp @ g
        return found

    def _product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """``out = a @ b``, accumulated in the result dtype."""
        if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
            out.copy_(torch.mm(a, b, out_dtype=self.dtype))
        else:
            torch.mm(a.to(self.dtype), b.to(self.dtype), out=out)

    def _add_product(self, a: Tensor, b: Tensor, total: Tensor) -> None:
        """``total += a @ b`` in the result dtype, through the tensor cores where the compute dtype
        is bfloat16.

        float16 is widened instead: its range does not hold small derivatives.
        """
        if a.is_cuda and self.problem.compute_dtype == torch.bfloat16:
            total.add_(torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=self.dtype))
        else:
            total.addmm_(a.to(self.dtype), b.to(self.dtype))
