"""How to train: every setting with its default and what it means, in one place.

``fastdpop train`` reads the defaults and the help of its options from the fields of
:class:`Settings`; nothing here imports a package beyond torch, so that help costs little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastdpop import checks, engines, losses
from fastdpop.losses import PreferenceLoss

LOSS = "dpop"
"""The name of the default loss."""

_LARGEST = 2**63 - 1  # what torch takes as a seed, with an epoch's number added to it


def _is(text: str, *choices: str) -> Mapping[str, Any]:
    """What a field's metadata say: ``help`` for a command line, and the ``choices`` if they are few."""
    return {"help": text, "choices": choices or None}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; checked when it is made, so that a bad value fails before a model is loaded.

    Each field's ``metadata["help"]`` says what it is, ``metadata["choices"]`` what it may be. Beyond
    that:

    - Gradients are averaged over the ``accumulate`` forward passes of a step.
    - ``reference="precomputed"`` scores the reference once before training. ``"online"`` keeps a
      frozen copy (of a PEFT model: disables its adapter) and scores it in every step: the same
      numbers for more time and memory.
    - Under ``bf16`` the weights that are trained stay in their own type.
    - An engine of your own is registered (:func:`fastdpop.engines.register`) before it is named.

    Raises:
        ValueError: a value is out of its range; the message names field, value and range.
    """

    steps: int = field(metadata=_is("optimizer steps"))
    loss: PreferenceLoss = field(
        default_factory=lambda: losses.get(LOSS), metadata=_is("the preference loss")
    )
    batch_pairs: int = field(default=4, metadata=_is("pairs in one forward pass"))
    accumulate: int = field(default=1, metadata=_is("forward passes in one step"))
    learning_rate: float = field(default=5e-6, metadata=_is("of AdamW, after warm-up"))
    weight_decay: float = field(default=0.0, metadata=_is("of AdamW"))
    warmup: int = field(default=10, metadata=_is("steps of linear warm-up of the learning rate"))
    schedule: str = field(
        default="constant",
        metadata=_is(
            "of the learning rate after warm-up; cosine ends at zero", "constant", "cosine"
        ),
    )
    max_grad_norm: float = field(
        default=1.0, metadata=_is("gradients are clipped to this global norm")
    )
    reference: str = field(
        default="precomputed",
        metadata=_is(
            "score the reference once before training, or in every step", "precomputed", "online"
        ),
    )
    bf16: bool = field(
        default=False,
        metadata=_is("autocast to bfloat16; weights that are trained stay in their own type"),
    )
    seed: int = field(default=0, metadata=_is("of the order of the data, and of dropout"))
    eval_every: int = field(
        default=50, metadata=_is("steps between evaluations, 0 for first and last only")
    )
    save_every: int = field(default=100, metadata=_is("steps between checkpoints, 0 for none"))
    engine: str = field(
        default="auto", metadata=_is("what computes the loss, see `fastdpop doctor`")
    )
    workspace_bytes: int | None = field(
        default=None,
        metadata=_is("bytes that bound the loss's scratch memory (default: the library's)"),
    )

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_pairs": 1, "accumulate": 1}
        least |= {"warmup": 0, "eval_every": 0, "save_every": 0, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not bound <= value <= _LARGEST:
                expected = f"at least {bound}" if value < bound else f"at most {_LARGEST}"
                raise ValueError(f"{name} is {value}, expected {expected}")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, expected a positive number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}, expected a number >= 0")
        for its in fields(self):
            value, allowed = getattr(self, its.name), its.metadata["choices"]
            if allowed and value not in allowed:
                raise ValueError(f"{its.name} is {value!r}, expected one of {allowed}")
        if self.engine != "auto":
            engines.get(self.engine)
        checks.workspace(self.workspace_bytes, engines.DEFAULT_WORKSPACE_BYTES)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2
