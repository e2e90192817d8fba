"""A margin and an offset of each pair, which the data give: by how much its chosen completion must be
ahead.
"""

from __future__ import annotations

from torch import Tensor

from .base import PairLogps

SHIFTS = ("margin", "offset")
"""The names of the pairs' values that :func:`shifted` reads."""


def shifted(
    difference: Tensor, pairs: PairLogps, beta: float, *, with_offset: bool = True
) -> Tensor:
    """``difference - offset - margin / beta``, for a difference between chosen and rejected that the
    loss multiplies by beta, ``(P,)``; without the offset where the difference is not of log-probs.

    So the offset has the unit of the difference (nats, or nats per token), and the margin that of the
    implicit reward: ``-log sigmoid(beta * shifted)`` is Llama 2's ``-log sigmoid(z - margin)``
    (arXiv:2307.09288, Eq. 2) and, with ``margin`` its Delta_r, ODPO's loss (arXiv:2402.10571).
    """
    offset, margin = pairs.values.get("offset"), pairs.values.get("margin")
    if offset is not None and with_offset:
        difference = difference - offset
    return difference if margin is None else difference - margin / beta


def given(pairs: PairLogps, name: str) -> Tensor:
    """
    Raises:
        ValueError: the pairs have no value of that name.
    """
    if name not in pairs.values:
        raise ValueError(
            f"this loss reads the pairs' {name!r}, which are not there: pass pair_values={{{name!r}: ...}}"
        )
    return pairs.values[name]
