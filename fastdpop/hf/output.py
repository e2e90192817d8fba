"""What an attached model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class PreferenceModelOutput(ModelOutput):
    """What an attached model returns for ``preference=`` or ``return_logps=True``, and only then.

    Attributes:
        loss: scalar, or ``(P,)`` with ``reduction="none"``; the model's own router loss is included (mixtures of
            experts). Differentiable.
        logps: ``(S,)`` log-probs of the sequences in nats, in the order of the batch, 0 for one that no pair uses.
            Differentiable unless there is a loss. Shaped as the labels for ``reduction="token"``.
        aux_loss: the router loss as the model reports it, before its coefficient.
        hidden_states, attentions: the model's, if asked for.

    The others are those of :class:`~fastdpop.PreferenceOutput`; all are None without ``preference=``.
    """

    loss: Tensor | None = None
    logps: Tensor | None = None
    losses: Tensor | None = None
    chosen_logps: Tensor | None = None
    rejected_logps: Tensor | None = None
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    margins: Tensor | None = None
    accuracy: Tensor | None = None
    penalty: Tensor | None = None
    lengths: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    token_accuracy: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
