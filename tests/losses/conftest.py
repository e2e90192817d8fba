"""Batches of log-probabilities, as a loss sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from fastdpop.losses import PairLogps
from tests.batches import needed_values


def make_pairs(
    chosen: Sequence[float],
    rejected: Sequence[float],
    ref_chosen: Sequence[float] | None = None,
    ref_rejected: Sequence[float] | None = None,
    chosen_lengths: Sequence[float] | None = None,
    rejected_lengths: Sequence[float] | None = None,
    aligned: tuple[Sequence[float], Sequence[float]] | None = None,
    absent: tuple[Sequence[int], Sequence[int]] = ((), ()),
    kl: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> PairLogps:
    """A batch from plain numbers; log-probabilities are leaves that require gradients. Of what losses
    cannot do without, every pair is a list of its own, and rewards differ from pair to pair.
    """

    def row(values: Sequence[float] | None, default: float | None = None) -> torch.Tensor | None:
        if values is None and default is None:
            return None
        return torch.tensor(values or [default] * count, dtype=dtype)

    count = len(chosen)
    lengths = row(chosen_lengths, 10.0), row(rejected_lengths, 10.0)
    present = [torch.tensor([i not in side for i in range(count)]) for side in absent]
    return PairLogps(
        chosen=row(chosen).requires_grad_(),
        rejected=row(rejected).requires_grad_(),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        ref_chosen=row(ref_chosen),
        ref_rejected=row(ref_rejected),
        chosen_aligned_logps=None if aligned is None else row(aligned[0]),
        rejected_aligned_logps=None if aligned is None else row(aligned[1]),
        chosen_present=present[0],
        rejected_present=present[1],
        kl=None if kl is None else torch.tensor(kl, dtype=dtype),
        batch_pairs=torch.tensor(float(count), dtype=dtype),
        batch_sides=(present[0].sum() + present[1].sum()).to(dtype),
        batch_chosen_tokens=lengths[0].sum(),
        values={name: value.to(dtype) for name, value in needed_values(count).items()},
    )


@pytest.fixture(scope="session", name="make_pairs")
def make_pairs_fixture() -> Callable[..., PairLogps]:
    """:func:`make_pairs`."""
    return make_pairs


@pytest.fixture
def four_pairs() -> PairLogps:
    """Four ordinary pairs, the hinge of DPOP on in two of them, one completion's ranks out of
    order.
    """
    return make_pairs(
        chosen=[-20.0, -31.5, -12.25, -7.0],
        rejected=[-25.0, -30.0, -19.0, -6.5],
        ref_chosen=[-21.5, -30.0, -14.0, -6.25],
        ref_rejected=[-23.0, -31.0, -18.5, -8.0],
        chosen_lengths=[10.0, 16.0, 7.0, 3.0],
        rejected_lengths=[12.0, 14.0, 7.0, 5.0],
        aligned=([-4.0, -3.0, 1.5, -0.5], [-6.0, -1.0, -2.0, 0.25]),
    )
