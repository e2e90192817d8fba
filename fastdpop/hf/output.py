"""What an attached model returns."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from fastdpop.measures import means, shown


class _Source:
    """Which output one is a copy of. Casts pass it on as it is; a pickle does not know."""

    __slots__ = ("find",)

    def __init__(self, output: PreferenceModelOutput | None = None) -> None:
        self.find = (lambda: None) if output is None else weakref.ref(output)

    def __reduce__(self) -> Any:
        return _Source, ()


@dataclass(repr=False)
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

    FSDP2 copies the outputs of a module with their tensors cast, if its mixed precision has an ``output_dtype``
    (accelerate's has). Where such a copy would have a tensor in 16 bits, it keeps the one that was to be rounded.
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
    pairs: Tensor | None = None
    chosen_logratios: Tensor | None = None
    rejected_logratios: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    token_accuracy: Tensor | None = None
    first_logps: Tensor | None = None
    rejected_first_logps: Tensor | None = None
    after_logps: Tensor | None = None
    differs: Tensor | None = None
    ches: Tensor | None = None
    ches_normalised: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    _source: _Source | None = field(default=None, repr=False, compare=False)

    def metrics(self) -> dict[str, float]:
        """As :meth:`PreferenceOutput.metrics`; with the router's ``aux_loss`` where the model reports one.

        Raises:
            ValueError: there is no loss, as with ``return_logps=True``.
        """
        if self.loss is None or self.pairs is None:
            raise ValueError(
                "metrics() needs the loss of pairs, expected a call with preference=: return_logps=True gives "
                "log-probs alone, which are in .logps"
            )
        return means(self)

    def __repr__(self) -> str:
        return shown(self)

    def __post_init__(self) -> None:
        source = None if self._source is None else self._source.find()
        self._source = None  # no item of the mapping
        super().__post_init__()
        if source is not None:
            for name, own in list(self.items()):
                if _rounded(own, vars(source)[name]):
                    self[name] = vars(source)[name]
        self._source = _Source(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_source":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def _rounded(value: Any, source: Any) -> bool:
    """Whether one tensor is the other in 16 bits."""
    return (
        isinstance(value, Tensor)
        and isinstance(source, Tensor)
        and value.dtype in (torch.bfloat16, torch.float16)
        and source.dtype in (torch.float32, torch.float64)
        and value.shape == source.shape
    )
