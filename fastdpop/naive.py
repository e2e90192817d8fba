"""The definition, in float64 and with full logits: what every engine is compared with. Slow on
purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpop.rows import IGNORE
from fastdpop.transform import LogitTransform


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> Tensor:
    """``log softmax(z)[label]`` at every scored position, 0 elsewhere; float64, shaped as `labels`;
    differentiable.

    hidden ``(..., T, H)`` of any dtype, weight ``(V, H)``, labels ``(..., T)`` already aligned with
    the hidden states.
    """
    transform = transform or LogitTransform()
    z = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    z = z * transform.logit_scale
    z = z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)
    logps = torch.log_softmax(z / transform.temperature, dim=-1)
    scored = labels != IGNORE
    return logps.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * scored


def sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> Tensor:
    """Sum over each sequence of ``(S, T)`` unshifted labels, with the shift of causal language
    models; ``(S,)`` float64.
    """
    return token_logps(hidden[:, :-1], weight, labels[:, 1:], bias, transform).sum(-1)


def dpop_loss(logps: Tensor, ref_logps: Tensor, beta: float = 0.3, lam: float = 50.0) -> Tensor:
    """Eq. 3 of the paper for ``(2B,)`` log-probs, chosen first; the mean over pairs."""
    chosen, rejected = (logps - ref_logps.double()).chunk(2)
    z = beta * (chosen - rejected - lam * torch.relu(-chosen))
    return -torch.nn.functional.logsigmoid(z).mean()
