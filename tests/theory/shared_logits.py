"""The paper's parameters theta: one shift of the logits per position, for both completions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastdpop.losses import PairLogps, PreferenceLoss
from tests.losses.conftest import make_pairs


def of_logps(chosen: Tensor, rejected: Tensor, r_w: float, r_l: float) -> PairLogps:
    """One pair, ``(1,)`` each, whose reference stands where the log-ratios are ``r_w`` and ``r_l``."""
    return replace(
        make_pairs([0.0], [0.0]),
        chosen=chosen,
        rejected=rejected,
        ref_chosen=chosen.detach() - r_w,
        ref_rejected=rejected.detach() - r_l,
    )


def sequence_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """``(1,)``: the sum of the log-probabilities of the tokens, by autograd's own operations."""
    return logits.log_softmax(-1).gather(-1, tokens[:, None]).sum()[None]


def theta_gradient(
    loss: PreferenceLoss,
    logits: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor],
    ratios: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """The loss's derivative in theta at 0, ``(positions, vocabulary)``.

    Args:
        logits: of the chosen and the rejected completion, ``(positions, vocabulary)`` each, held
            fixed: theta is added to the logits of both.
        tokens: ``(positions,)`` each.
        ratios: the log-ratios r_w and r_l.
    """
    theta = torch.zeros_like(logits[0], requires_grad=True)
    chosen, rejected = (
        sequence_logp(row + theta, ids) for row, ids in zip(logits, tokens, strict=True)
    )
    return torch.autograd.grad(loss(of_logps(chosen, rejected, *ratios)).sum(), theta)[0]


def one_hot(tokens: Tensor, vocabulary: int) -> Tensor:
    """``1{i = j}``, ``(positions, vocabulary)`` float64."""
    return torch.nn.functional.one_hot(tokens, vocabulary).double()
