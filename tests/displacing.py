"""The numbers of a monitor by their definitions: one pair after another, one token after another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = (
    "first_logps",
    "rejected_first_logps",
    "after_logps",
    "differs",
    "ches",
    "ches_normalised",
)
"""What ``statistics=("displacement",)`` adds to an output."""


def _tokens(labels: Tensor) -> list[tuple[int, int]]:
    """Position and token of what is scored of a sequence, whose first token is not."""
    scored = enumerate(labels.tolist())
    return [(t, token) for t, token in scored if t > 0 and token != -100]


def of_pairs(
    hidden: Tensor, labels: Tensor, logps: Tensor, pairs: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """``(P,)`` values by name, in float64.

    Args:
        hidden: ``(S, T, H)``; labels: ``(S, T)``, not shifted; logps: ``(S, T)``, each beside its label.
    """
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for chosen, rejected in pairs:
        values = dict.fromkeys(NAMES, 0.0)
        if chosen >= 0 and rejected >= 0:
            own, other = _tokens(labels[chosen]), _tokens(labels[rejected])
            place = 0
            while place < min(len(own), len(other)) and own[place][1] == other[place][1]:
                place += 1
            if place < len(own):
                values["differs"] = 1.0
                values["first_logps"] = float(logps[chosen, own[place][0]])
                after = [float(logps[chosen, t]) for t, _ in own[place + 1 :]]
                values["after_logps"] = math.fsum(after) / max(len(after), 1)
                if place < len(other):
                    values["rejected_first_logps"] = float(logps[rejected, other[place][0]])
            zero = torch.zeros(hidden.shape[-1], dtype=torch.float64)
            w = sum((hidden[chosen, t - 1].double() for t, _ in own), zero)
            l = sum((hidden[rejected, t - 1].double() for t, _ in other), zero)  # noqa: E741
            values["ches"] = float(w @ l - w @ w)
            w, l = w / max(len(own), 1), l / max(len(other), 1)  # noqa: E741
            values["ches_normalised"] = float(w @ l - w @ w)
        for name, value in values.items():
            found[name].append(value)
    return {name: torch.tensor(line, dtype=torch.float64) for name, line in found.items()}
