"""What is logged of pairs: the names, TRL's where TRL has one, and what each is the mean of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpop.rows import wide_dtype


class Measure(NamedTuple):
    """Numbers whose weighted mean is a metric.

    Attributes:
        values, weights: of one shape, pairs first. Where a weight is 0, so counts the value.
    """

    values: Tensor
    weights: Tensor

    def sums(self, pairs: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Of the first so many pairs: the weighted sum, the weights' sum, and the weighted sum of squares around the
        mean, 0-d each.
        """
        dtype = wide_dtype(self.values.device)
        values, weights = (each.detach()[:pairs].to(dtype) for each in self)
        values = values.masked_fill(weights == 0, 0.0)
        total, count = (values * weights).sum(), weights.sum()
        around = values - total / count.clamp_min(1)
        return total, count, (weights * around.square()).sum()


def measures(output: Any) -> dict[str, Measure]:
    """Of a :class:`~fastdpop.PreferenceOutput`, or what has its fields: means over the pairs that have the sides that
    a metric is of, or over the tokens of these.
    """
    there = output.pairs >= 0
    chosen, rejected = there.unbind(1)
    both = chosen & rejected
    found = {
        "rewards/chosen": Measure(output.chosen_rewards, chosen),
        "rewards/rejected": Measure(output.rejected_rewards, rejected),
        "rewards/accuracies": Measure(_above_0(output.margins), both),
        "rewards/margins": Measure(output.margins, both),
        "logps/chosen": Measure(output.chosen_logps, chosen),
        "logps/rejected": Measure(output.rejected_logps, rejected),
    }
    if output.chosen_logratios is not None:
        found["logratios/chosen"] = Measure(output.chosen_logratios, chosen)
        found["logratios/rejected"] = Measure(output.rejected_logratios, rejected)
    if output.penalty is not None:
        found["penalty"] = Measure(output.penalty, chosen)
        found["hinge_on"] = Measure(_above_0(output.penalty), chosen)
    sequences = output.pairs.clamp_min(0)
    tokens = output.lengths[sequences] * there
    if output.entropy is not None:
        found["entropy"] = Measure(output.entropy[sequences], tokens)
    if output.mean_logits is not None:
        by_side = zip(output.mean_logits[sequences].unbind(1), tokens.unbind(1), strict=True)
        found["logits/chosen"], found["logits/rejected"] = (Measure(*side) for side in by_side)
    if output.token_accuracy is not None:
        correct = output.token_accuracy[sequences[:, 0]]
        found["mean_token_accuracy"] = Measure(correct, tokens[:, 0])
    if output.ches is not None:
        found["ches"] = Measure(output.ches, both)
        found["ches_normalised"] = Measure(output.ches_normalised, both)
        # 0 where a pair does not differ, or has nothing behind the difference.
        found["logps/first_difference"] = Measure(output.first_logps, output.differs)
        found["logps/after_difference"] = Measure(output.after_logps, output.after_logps != 0)
    return found


def _above_0(values: Tensor) -> Tensor:
    """1 where a value is above 0, else 0; NaN where it is NaN, which is neither."""
    return torch.where(values.isnan(), values, values > 0)


def means(output: Any) -> dict[str, float]:
    """``metrics()`` of an output; one copy from its device."""
    loss = output.loss.reshape(-1)
    found = {"loss": Measure(loss, torch.ones_like(loss))}
    found |= measures(output)
    router_loss = getattr(output, "aux_loss", None)
    if router_loss is not None:
        router_loss = router_loss.reshape(-1).to(loss.device)
        found["aux_loss"] = Measure(router_loss, torch.ones_like(router_loss))
    sums = torch.stack([torch.stack(measure.sums()[:2]) for measure in found.values()])
    return {
        name: total / count
        for name, (total, count) in zip(found, sums.tolist(), strict=True)
        if count
    }


def shown(output: Any) -> str:
    """The repr of an output: what to look at first, in one line."""
    kind = type(output).__name__
    if output.loss is not None and output.pairs is not None:
        try:
            found = means(output)
        except RuntimeError:  # not to be read: in a graph, on the meta device, under a transform
            found = {}
        if found:
            first = {
                "loss": found.get("loss"),
                "accuracy": found.get("rewards/accuracies"),
                "margins": found.get("rewards/margins"),
                "penalty": found.get("penalty"),
            }
            numbers = [f"{name}={value:.4g}" for name, value in first.items() if value is not None]
            return f"{kind}({', '.join(numbers)}; means of P={len(output.pairs)} pairs)"
    tensors = {n: v for n, v in vars(output).items() if isinstance(v, Tensor)}
    return f"{kind}({', '.join(f'{name}: {tuple(v.shape)}' for name, v in tensors.items())})"
