"""One batch, as a single process has it and as several have it; every process can make both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpop import PreferenceOutput, fused_preference_loss, losses
from fastdpop.losses import PreferenceLoss
from tests.batches import needed_values

VOCABULARY, WIDTH, LENGTH = 53, 24, 12
CLOSE = 1e-6
"""Largest error, relative to the largest value, in float32."""


@dataclass
class World:
    """P pairs as sequences ``(2P, T)``, chosen first; labels are shifted already."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ref_logps: Tensor
    values: dict[str, Tensor]

    @staticmethod
    def of(
        pairs: int, *, dtype: torch.dtype = torch.float32, bias: bool = False, seed: int = 1
    ) -> World:
        """Ragged completions, one of them empty."""
        draw = torch.Generator().manual_seed(seed)
        labels = torch.randint(VOCABULARY, (2 * pairs, LENGTH), generator=draw)
        for line in labels:
            first, last = torch.randint(LENGTH, (2,), generator=draw).sort().values.tolist()
            line[:first] = -100
            line[last:] = -100
        weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64) * 0.5
        return World(
            torch.randn(2 * pairs, LENGTH, WIDTH, generator=draw, dtype=torch.float64).to(dtype),
            weight.to(dtype),
            torch.randn(VOCABULARY, generator=draw, dtype=torch.float64).to(dtype)
            if bias
            else None,
            labels,
            -10.0 - 5.0 * torch.rand(2 * pairs, generator=draw, dtype=torch.float64),
            needed_values(pairs),
        )

    def pairs(self, own: Sequence[int]) -> World:
        """Some of the pairs."""
        count = len(self.labels) // 2
        at = torch.tensor([*own, *(count + p for p in own)], dtype=torch.int64)
        return replace(
            self,
            hidden=self.hidden[at],
            labels=self.labels[at],
            ref_logps=self.ref_logps[at],
            values={name: value[list(own)] for name, value in self.values.items()},
        )

    def positions(self, own: slice) -> World:
        """Some of the positions of every sequence."""
        return replace(self, hidden=self.hidden[:, own], labels=self.labels[:, own])

    def tokens(self, own: slice) -> World:
        """Some of the vocabulary."""
        bias = None if self.bias is None else self.bias[own]
        return replace(self, weight=self.weight[own], bias=bias)

    def run(
        self,
        loss: PreferenceLoss | str,
        *,
        trained: bool = True,
        **given: Any,
    ) -> tuple[PreferenceOutput, list[Tensor]]:
        """The output, and the gradients of hidden states, weight and bias."""
        hidden = self.hidden.clone().requires_grad_()
        head = [
            t.clone().requires_grad_(trained) for t in (self.weight, self.bias) if t is not None
        ]
        reference = given.pop("reference", True)
        # A name that no loss has is the call's to refuse, on all ranks.
        if not isinstance(loss, str) or loss in losses.available():
            traits = losses.as_loss(loss).traits
            reference = reference and traits.may_read_reference
            needed = traits.needs
            if needed:
                given.setdefault("pair_values", {name: self.values[name] for name in needed})
        out = fused_preference_loss(
            hidden,
            head[0],
            self.labels,
            bias=head[1] if len(head) > 1 else None,
            loss=loss,
            ref_logps=self.ref_logps if reference else None,
            shift_labels=False,
            **given,
        )
        out.loss.sum().backward()
        zero = [torch.zeros_like(t) if t.grad is None else t.grad for t in (hidden, *head)]
        return out, zero if trained else zero[:1]


def mean_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """What DDP and FSDP make of a gradient."""
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def assert_close(found: Tensor, expected: Tensor, what: object, close: float = CLOSE) -> None:
    """In relation to the largest value expected."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape, what
    assert found.isfinite().all(), what
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((found.double() - expected.double()).abs().max()) if scale else 0.0
    assert difference <= close * max(scale, 1e-12), (what, difference / max(scale, 1e-12))
