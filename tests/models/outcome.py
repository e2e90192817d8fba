"""What the sweep finds out of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What became of one model."""

    name: str
    error: str | None = None
    """None for a model that is right."""
    router_loss: bool = False
    head: tuple[str, ...] = ()
    """What the head does beyond a product with an untied weight."""
    sharing: str = ""
    """How prefixes are shared: "shared", "packed" or "padded"."""
    reason: str = ""
    """Why no more than that."""
