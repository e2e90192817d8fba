"""Batches to measure on, and the ways to get a DPOP loss out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpop import fused_dpop_loss, fused_logps, reference

MODES = ("trained head", "frozen head", "log-probs only")


@dataclass(frozen=True)
class Shape:
    """P pairs of one prompt length and completions of about one length; hidden size H, vocabulary V."""

    pairs: int
    prompt: int
    completion: int
    hidden: int
    vocabulary: int


GSM8K_LIKE = Shape(pairs=16, prompt=64, completion=80, hidden=576, vocabulary=49_152)
"""Short mathematics answers through SmolLM2-135M's head."""

LONG = Shape(pairs=8, prompt=64, completion=1_024, hidden=576, vocabulary=49_152)
"""Long answers: 3 GiB if their logits were built in fp32."""


@dataclass(frozen=True)
class Batch:
    """Random inputs with logits of a spread of about 4, as language models have.

    Attributes:
        hidden: ``(2P, T, H)``, a leaf. weight: ``(V, H)``, a leaf. labels: ``(2P, T)``.
        rows: ``(N, H)`` hidden states of the scored tokens, and their targets ``(N,)`` and sequences ``(N,)``.
        ref_logps: ``(2P,)``, a little above the policy's in half of the pairs, so that the hinge is on there.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    rows: Tensor
    targets: Tensor
    sequences: Tensor
    exact_logps: Tensor
    ref_logps: Tensor

    @staticmethod
    def random(
        shape: Shape, dtype: torch.dtype, device: str, *, exact: bool, jitter: int = 0
    ) -> Batch:
        """The same numbers on every call. `exact` also computes the log-probs in float64 (else they are 0).

        Completion lengths differ by up to `jitter` tokens either way.
        """
        generator = torch.Generator().manual_seed(0)
        count, length = 2 * shape.pairs, shape.prompt + shape.completion + jitter

        def normal(*size: int, scale: float) -> Tensor:
            return (torch.randn(size, generator=generator) * scale).to(device, dtype)

        hidden = normal(count, length, shape.hidden, scale=1.0).requires_grad_()
        weight = normal(
            shape.vocabulary, shape.hidden, scale=4.0 * shape.hidden**-0.5
        ).requires_grad_()
        labels = torch.randint(shape.vocabulary, (count, length), generator=generator)
        shortened = torch.randint(2 * jitter + 1, (count, 1), generator=generator)
        position = torch.arange(length)
        labels[(position < shape.prompt) | (position >= length - shortened)] = -100
        labels = labels.to(device)
        sequences, at = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        rows, targets = hidden.detach()[sequences, at], labels[sequences, at + 1]
        logps = torch.zeros(count, dtype=torch.float64, device=device)
        if exact:
            row_logps = [
                reference.token_logps(h, weight.detach(), y)
                for h, y in zip(rows.split(512), targets.split(512), strict=True)
            ]
            logps.index_add_(0, sequences, torch.cat(row_logps))
        ref_logps = (logps + torch.tensor([1.0, -1.0], device=device).repeat(shape.pairs)).float()
        return Batch(hidden, weight, labels, rows, targets, sequences, logps, ref_logps)

    def start(self, mode: str) -> None:
        """Forget gradients and set what `mode` trains."""
        self.hidden.grad = self.weight.grad = None
        self.hidden.requires_grad_(mode != "log-probs only")
        self.weight.requires_grad_(mode == "trained head")


def floor(batch: Batch, mode: str) -> None:
    """The bare products, on scored rows, in the batch's dtype, with nothing between them."""
    with torch.no_grad():
        logits = batch.rows @ batch.weight.T
        if mode != "log-probs only":
            logits @ batch.weight
        if mode == "trained head":
            logits.T @ batch.rows


def gathered(batch: Batch, mode: str) -> Tensor:
    """What a careful user writes in plain torch: gather the scored rows, one cross entropy in fp32, autograd."""
    sequences, at = (batch.labels[:, 1:] != -100).nonzero(as_tuple=True)
    logits = F.linear(batch.hidden[sequences, at], batch.weight).float()
    row_logps = -F.cross_entropy(logits, batch.labels[sequences, at + 1], reduction="none")
    logps = row_logps.new_zeros(len(batch.labels)).index_add(0, sequences, row_logps)
    if mode != "log-probs only":
        reference.dpop_loss(logps, batch.ref_logps).backward()
    return logps.detach()


def fused(batch: Batch, mode: str) -> Tensor:
    """fastdpop with the eager engine."""
    if mode == "log-probs only":
        return fused_logps(batch.hidden, batch.weight, batch.labels, engine="eager")
    out = fused_dpop_loss(
        batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref_logps, engine="eager"
    )
    out.loss.backward()
    return torch.cat([out.chosen_logps, out.rejected_logps])


CONTENDERS: dict[str, Callable[[Batch, str], Tensor | None]] = {
    "bare products": floor,
    "gather + cross_entropy": gathered,
    "fastdpop eager": fused,
}
