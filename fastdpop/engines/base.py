"""What an engine is given, and what it owes.

An engine gets log-probabilities and gradients through the head. It knows rows, never losses,
sequences or trainers: rows come in *groups*, and where a gradient needs a loss, the engine hands
the log-probs of whole groups to a callback, which returns one coefficient ``c_i = dL / dlogp_i`` a
row. The rest is linear algebra on ``p = softmax(z)``:

    d logp_i / d z_i = onehot(y_i) - p_i
    dHidden_i = c_i * ((onehot(y_i) - p_i) * dz/du) @ weight
    dWeight   = sum_i c_i * ((onehot(y_i) - p_i) * dz/du).T @ hidden_i
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdpop.head import Head

STATISTICS = ("entropy", "mean_logits", "token_accuracy", "aligned_logps")
"""Row statistics of the softmax that an engine computes beside the log-prob, in the same pass:

- ``entropy``: ``-sum_v p_v log p_v``, in nats;
- ``mean_logits``: the mean of the row's logits over the vocabulary;
- ``token_accuracy``: 1 where no token is likelier than the target, else 0;
- ``aligned_logps``: ``logp - log sum_v p_v**2``, the token weight of WPO (arXiv:2406.11827, Eq. 2),
  in nats.
"""

DEFAULT_WORKSPACE_BYTES = 512 * 2**20
"""Workspace of a call that names none: 512 MiB, enough for a pair of 2,048 scored tokens at V =
49,152 in fp32. On a GPU it is a sixteenth of the device's memory, if that is more.
"""


@torch.compiler.assume_constant_result
def default_workspace(device: torch.device) -> int:
    """The workspace of a call that names none, in bytes.

    On a GPU each chunk of rows reads and writes all of the float32 dWeight, 2.1 GB for Llama 3 8B,
    so chunks should be large: 5 GB of an H100's 80 hold 16,000 rows of its logits.
    """
    if device.type != "cuda":
        return DEFAULT_WORKSPACE_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    return max(DEFAULT_WORKSPACE_BYTES, total // 16)


@dataclass(frozen=True)
class Problem:
    """Rows that go through one head.

    Attributes:
        hidden: ``(N, H)`` contiguous hidden states of the rows.
        weight: ``(V, H)`` lm_head weight.
        bias: ``(V,)`` or None.
        targets: ``(N,)`` int64.
        groups: G + 1 non-decreasing bounds in [0, N]; the rows of a group belong together.
        head: the transform of the logits.
        compute_dtype: the dtype in which hidden and weight enter the products (autocast rounds
            float32 tensors to it).
        workspace_bytes: bound on scratch memory, results and gradients excluded; one row's tile is
            the least an engine takes.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    groups: list[int]
    head: Head
    compute_dtype: torch.dtype
    workspace_bytes: int

    @property
    def result_dtype(self) -> torch.dtype:
        """float32, or float64 where the products are float64."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32


class Logps(NamedTuple):
    """What the forward pass gives, row by row, in the result dtype.

    Attributes:
        logps: ``(N,)`` log-prob of each target.
        lse: ``(N,)`` log-sum-exp of each row's logits.
        statistics: ``(K, N)``, one line a name asked for.
    """

    logps: Tensor
    lse: Tensor
    statistics: Tensor


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients in the result dtype; None where not wanted. dWeight is accumulated in it, whatever
    the weight's dtype.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass
class PairLossPlan:
    """What a coefficient callback does, in plain numbers, where it is simple: group i is pair i,
    the rows of its chosen sequence followed by those of its rejected one.

    An engine that knows the loss may use this instead of calling back; it then fills in `losses`
    and `sums` for all pairs. Others ignore it.

    Attributes:
        offsets: ``(2P + 1,)`` int64 bounds of the sequences, in rows.
        order: ``(P,)`` int64, where each pair stands in `reference` and `losses`.
        reference: ``(2, P)`` float32 reference log-probs of chosen and rejected, contiguous.
        loss: the name of the loss's class in :mod:`fastdpop.losses`; options: its fields.
        share: factor of a pair's loss in the total.
        losses: ``(P,)`` float32 loss of each pair; sums: ``(2P,)`` log-prob of each sequence.
    """

    offsets: Tensor
    order: Tensor
    reference: Tensor
    loss: str
    options: dict[str, Any]
    share: float
    losses: Tensor | None = None
    sums: Tensor | None = None


class Coefficients(Protocol):
    """``(first, last, logps, statistics) -> c``: coefficients ``(n,)`` of the n rows of groups
    ``first`` to ``last - 1``.

    A callback may have an attribute ``plan``, a :class:`PairLossPlan` or None.
    """

    def __call__(self, first: int, last: int, logps: Tensor, statistics: Tensor) -> Tensor: ...


class Engine(Protocol):
    """What every engine implements. Costs are in units of ``2 * N * V * H`` floating-point
    operations x 1/2 (see the docs).
    """

    name: str

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this engine cannot compute on a device in a dtype, or None if it can."""

    def describe(self) -> str:
        """What it computes with, in a few words; asked only where it is available."""

    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> Logps:
        """Log-probs alone: 2 units."""

    def logps_and_direction(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> tuple[Logps, Tensor]:
        """Log-probs and ``d logp_i / d hidden_i`` ``(N, H)`` in the hidden states' dtype: 4 units.

        The direction does not depend on the loss, so a frozen head needs nothing else.
        """

    def gradients(
        self, problem: Problem, lse: Tensor, row_gradient: Tensor, wanted: Wanted
    ) -> Gradients:
        """Gradients for coefficients known beforehand: 2 units to recompute the logits, and 2 for
        each of hidden and weight.
        """

    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        coefficients: Coefficients,
        wanted: Wanted,
    ) -> tuple[Logps, Gradients]:
        """Both in one pass over whole groups: 6 units for a trained head; 8 for a group beyond the
        workspace.
        """


EngineFactory = Callable[[], Engine]
