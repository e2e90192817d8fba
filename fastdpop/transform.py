"""What a model does to ``hidden @ weight.T + bias`` before the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """The elementwise transform of raw logits ``u = hidden @ weight.T + bias``.

    ``z = softcap * tanh(logit_scale * u / softcap) / temperature``, and without softcap ``z =
    logit_scale * u / temperature``.

    Attributes:
        softcap: Gemma 2's ``final_logit_softcapping``, positive, or None.
        logit_scale: Cohere's ``logit_scale``; for Granite ``1 / logits_scaling``.
        temperature: divides the logits last, as samplers do.

    Raises:
        ValueError: softcap, logit_scale or temperature is not a positive finite number.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("softcap", "logit_scale", "temperature"):
            value = getattr(self, name)
            if value is None and name == "softcap":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                allowed = "a positive finite number" + (" or None" if name == "softcap" else "")
                raise ValueError(f"{name} is {value!r}, expected {allowed}")
            object.__setattr__(self, name, float(value))

    def transform_(self, logits: Tensor) -> Tensor:
        """Turn raw logits into the model's logits, in place."""
        if self.softcap is None:
            scale = self.logit_scale / self.temperature
            return logits if scale == 1.0 else logits.mul_(scale)
        logits.mul_(self.logit_scale / self.softcap).tanh_()
        return logits.mul_(self.softcap / self.temperature)

    def scale_by_slope_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Multiply a gradient with respect to ``logits`` by d logits / d raw logits, in place.

        With ``t = tanh(logit_scale * u / softcap) = logits * temperature / softcap`` the slope is
        ``(1 - t**2) * logit_scale / temperature``.
        """
        scale = self.logit_scale / self.temperature
        if self.softcap is not None:
            tanh = logits * (self.temperature / self.softcap)
            gradient.mul_(tanh.square_().neg_().add_(1.0))
        return gradient if scale == 1.0 else gradient.mul_(scale)
