"""Random batches, and the float64 definition of a preference loss through real logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpop import losses, reference
from fastdpop.head import Head
from fastdpop.losses.base import PairLogps

HEADS = {
    "plain": Head(),
    "softcap": Head(softcap=3.0),
    "scaled": Head(logit_scale=0.25),
    "temperature": Head(temperature=1.7),
    "all": Head(softcap=2.0, logit_scale=1.5, temperature=0.7),
}


@dataclass
class Batch:
    """2B sequences of T positions, chosen first, with ragged prompts and padding."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ref_logps: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        """The differentiable inputs."""
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def double(self) -> Batch:
        """The same numbers in float64, as new leaves."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

        hidden, weight = leaf(self.hidden), leaf(self.weight)
        assert hidden is not None
        assert weight is not None
        return Batch(hidden, weight, leaf(self.bias), self.labels, self.ref_logps.double())


def batch(
    pairs: int = 3,
    length: int = 9,
    width: int = 16,
    vocabulary: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    trained: bool = True,
    scale: float = 1.0,
) -> Batch:
    """A random batch; sequence 1 has an empty completion where there is more than one pair."""
    labels = torch.randint(0, vocabulary, (2 * pairs, length))
    for line in labels:
        prompt = int(torch.randint(0, max(length // 2, 1), ()))
        end = int(torch.randint(min(prompt + 1, length), length + 1, ()))
        line[:prompt] = -100
        line[end:] = -100
    if pairs > 1:
        labels[1] = -100
    hidden = (torch.randn(2 * pairs, length, width) * scale).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) * 0.3).to(dtype).requires_grad_(trained)
    offset = torch.randn(vocabulary).to(dtype).requires_grad_(trained) if bias else None
    example = Batch(hidden, weight, offset, labels, torch.zeros(2 * pairs))
    logps = definition(example, Head()).detach()
    example.ref_logps = (logps + torch.randn(2 * pairs)).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    return example


def definition(example: Batch, head: Head) -> Tensor:
    """Sequence log-probs by the definition: float64, full logits."""
    return reference.sequence_logps(
        example.hidden, example.weight, example.labels, example.bias, head
    )


def pairs_of(logps: Tensor, ref_logps: Tensor | None, labels: Tensor) -> PairLogps:
    """What a loss sees for the first half of the sequences against the second."""
    chosen, rejected = logps.chunk(2)
    lengths = (labels[:, 1:] != -100).sum(1).to(logps.dtype)
    ref_chosen, ref_rejected = (
        (None, None) if ref_logps is None else ref_logps.to(logps.dtype).chunk(2)
    )
    there = torch.ones(len(chosen), dtype=torch.bool)
    count = logps.new_tensor(float(len(chosen)))
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_lengths=lengths.chunk(2)[0],
        rejected_lengths=lengths.chunk(2)[1],
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_aligned_logps=None,
        rejected_aligned_logps=None,
        chosen_present=there,
        rejected_present=there,
        kl=None,
        batch_pairs=count,
        batch_sides=2 * count,
        batch_chosen_tokens=lengths.chunk(2)[0].sum(),
    )


def loss_by_definition(example: Batch, head: Head, loss: losses.PreferenceLoss) -> Tensor:
    """The mean loss in float64 through real logits."""
    ref_logps = example.ref_logps if loss.traits.needs_reference else None
    return loss(pairs_of(definition(example, head), ref_logps, example.labels)).mean()
