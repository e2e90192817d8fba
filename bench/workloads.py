"""Batches to measure on, with what float64 makes of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpop import losses, naive

MODES = ("trained head", "frozen head", "log-probs only")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """P pairs of one prompt length and completions of ``completion - jitter`` to ``completion +
    jitter`` tokens; hidden size H, vocabulary V.

    Edited pairs are equal up to one token, two thirds into the completion, as when one number of a
    calculation was changed; the others have nothing in common.
    """

    pairs: int
    prompt: int
    completion: int
    hidden: int = 576
    vocabulary: int = 49_152
    jitter: int = 0
    edited: bool = False


SHAPES = {
    "gsm8k-like": Shape(16, 64, 80, jitter=20),
    "edited pairs": Shape(16, 64, 80, jitter=20, edited=True),
    "long prompt": Shape(4, 1_024, 128),
    "long completion": Shape(2, 64, 1_024),
    "one pair": Shape(1, 64, 80),
    "V 128,256": Shape(2, 64, 80, hidden=1_024, vocabulary=128_256),
    "V 262,144": Shape(2, 64, 80, hidden=640, vocabulary=262_144),
    "128 pairs": Shape(128, 8, 80, vocabulary=8_192),
}
"""The default head is SmolLM2-135M's; the two large ones have the sizes of Llama 3's vocabulary and
of Gemma 3 270M.
"""


def small(shape: Shape) -> Shape:
    """A shape for trying things out: the same kind of batch in a fraction of a second."""
    return Shape(
        min(shape.pairs, 4),
        max(8, shape.prompt // 8),
        max(12, shape.completion // 8),
        hidden=64,
        vocabulary=max(512, shape.vocabulary // 32),
        jitter=shape.jitter // 8,
        edited=shape.edited,
    )


@dataclass(frozen=True)
class Loss:
    """A loss by name and options, and the reference log-probs that go with it."""

    name: str
    beta: float
    offset: float
    """The reference is this much above the exact log-prob in every other sequence, below in the
    rest; 0: there is no reference (all zeros).
    """

    def options(self) -> dict[str, float]:
        return {"beta": self.beta} | ({"lam": 50.0} if self.name == "dpop" else {})

    def of_logps(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """In plain torch, for ``(2P,)`` log-probs, chosen first; the mean over pairs."""
        if self.name == "dpop":
            return naive.dpop_loss(logps, ref_logps, **self.options())
        chosen, rejected = (logps - ref_logps).chunk(2)
        return -torch.nn.functional.logsigmoid(self.beta * (chosen - rejected)).mean()

    def fused(self) -> losses.PreferenceLoss:
        return losses.get(self.name, **self.options())


LOSSES = {
    # The hinge is on in half of the pairs.
    "dpop": Loss("dpop", beta=0.3, offset=1.0),
    # Liger's loss takes no precomputed reference, so none has one; beta keeps sigmoid in its range.
    "dpo": Loss("dpo", beta=0.01, offset=0.0),
}


@dataclass(frozen=True)
class Exact:
    """Float64: sequence log-probs ``(2P,)``, and the softmax ``(N, C)`` at some of the vocabulary,
    `columns`, from which gradients follow.
    """

    logps: Tensor
    columns: Tensor
    softmax: Tensor


@dataclass(frozen=True)
class Batch:
    """Random inputs with logits of a spread of about 4, as language models have.

    Attributes:
        hidden: ``(2P, T, H)``, a leaf. weight: ``(V, H)``, a leaf. labels: ``(2P, T)``.
        rows: ``(N, H)`` hidden states of the scored tokens, and their targets ``(N,)`` and
            sequences ``(N,)``.
        repeated: how many rejected rows equal their pair's chosen row, target included.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    rows: Tensor
    targets: Tensor
    sequences: Tensor
    repeated: int

    @staticmethod
    def random(shape: Shape, dtype: torch.dtype, device: str) -> Batch:
        """The same numbers on every call."""
        generator = torch.Generator().manual_seed(0)
        count, length = 2 * shape.pairs, shape.prompt + shape.completion + shape.jitter
        hidden = torch.randn(count, length, shape.hidden, generator=generator)
        weight = torch.randn(shape.vocabulary, shape.hidden, generator=generator)
        weight *= 4.0 * shape.hidden**-0.5
        labels = torch.randint(shape.vocabulary, (count, length), generator=generator)
        shortened = torch.randint(2 * shape.jitter + 1, (count, 1), generator=generator)
        repeated = 0
        if shape.edited:
            shortened = shortened[: shape.pairs].repeat(2, 1)
            for i, by in enumerate(shortened[: shape.pairs, 0].tolist()):
                scored = length - by - shape.prompt
                edit = shape.prompt + 2 * scored // 3
                for tensor in (hidden, labels):
                    tensor[shape.pairs + i, :edit] = tensor[i, :edit]
                labels[shape.pairs + i, edit] = (labels[i, edit] + 1) % shape.vocabulary
                repeated += edit - shape.prompt
        position = torch.arange(length)
        labels[(position < shape.prompt) | (position >= length - shortened)] = -100
        labels = labels.to(device)
        hidden = hidden.to(device, dtype)
        sequences, at = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        return Batch(
            hidden.requires_grad_(),
            weight.to(device, dtype).requires_grad_(),
            labels,
            hidden.detach()[sequences, at],
            labels[sequences, at + 1],
            sequences,
            repeated,
        )

    def start(self, mode: str) -> None:
        """Forget gradients and set what `mode` trains."""
        self.hidden.grad = self.weight.grad = None
        self.hidden.requires_grad_(mode != "log-probs only")
        self.weight.requires_grad_(mode == "trained head")

    def ref_logps(self, loss: Loss) -> Tensor:
        """``(2P,)`` float32."""
        if loss.offset == 0.0:
            return torch.zeros(len(self.labels), device=self.labels.device)
        sign = torch.tensor([1.0, -1.0], device=self.labels.device).repeat(len(self.labels) // 2)
        return (self.exact.logps + loss.offset * sign).float()

    @functools.cached_property
    def exact(self) -> Exact:
        """Gradients on 1,024 random vocabulary rows and as many of the targets are compared."""
        generator = torch.Generator().manual_seed(1)
        vocabulary = len(self.weight)
        some = torch.randint(vocabulary, (1_024,), generator=generator)
        columns = torch.cat([some.to(self.targets.device), self.targets[:1_024]]).unique()
        weight = self.weight.detach().double()
        row_logps, parts = [], []
        for rows, targets in zip(self.rows.split(512), self.targets.split(512), strict=True):
            log_softmax = torch.log_softmax(rows.double() @ weight.T, dim=1)
            row_logps.append(log_softmax.gather(1, targets[:, None])[:, 0])
            parts.append(log_softmax[:, columns].exp())
        logps = weight.new_zeros(len(self.labels))
        logps.index_add_(0, self.sequences, torch.cat(row_logps))
        return Exact(logps, columns, torch.cat(parts))

    def exact_weight_gradient(self, loss: Loss) -> Tensor:
        """``(C, H)`` float64: ``sum_i c_i (onehot(y_i) - p_i)_v hidden_i`` for v in the columns."""
        logps = self.exact.logps.clone().requires_grad_()
        loss.of_logps(logps, self.ref_logps(loss).double()).backward()
        assert logps.grad is not None
        onehot = (self.targets[:, None] == self.exact.columns).double()
        scaled = self.rows.double() * logps.grad[self.sequences, None]
        return (onehot - self.exact.softmax).T @ scaled

    def errors(self, logps: Tensor, loss: Loss) -> dict[str, float]:
        """Worst error of `logps`, in nats and relative, and of dWeight (Frobenius norms), against
        float64.
        """
        difference = (logps.double() - self.exact.logps).abs()
        found = {
            "logp_error_nat": difference.max().item(),
            "logp_error_relative": (difference / self.exact.logps.abs()).max().item(),
        }
        if self.weight.grad is not None:
            exact = self.exact_weight_gradient(loss)
            gradient = self.weight.grad[self.exact.columns].double()
            found["dweight_error"] = ((gradient - exact).norm() / exact.norm()).item()
        return found
