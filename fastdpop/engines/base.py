"""What an engine is given, and what it owes.

An engine gets log-probabilities and gradients through the lm_head. It knows rows, never sequences
or trainers: rows come in *groups*, and where a gradient needs a loss, the engine hands the log-probs
of whole groups to a :class:`GroupLoss`, which returns one derivative ``dlogp_i = dL / dlogp_i`` per
row. The rest is linear algebra on ``p = softmax(z)``:

    d logp_i / d z_i = onehot(y_i) - p_i
    dHidden_i = dlogp_i * ((onehot(y_i) - p_i) * dz/du) @ weight
    dWeight   = sum_i dlogp_i * ((onehot(y_i) - p_i) * dz/du).T @ hidden_i

Costs are counted in matrix products, each of ``2 * N * V * H`` floating-point operations: the logits
are one, dHidden is one, dWeight is one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpop.compiling import constant
from fastdpop.transform import LogitTransform

STATISTICS = ("entropy", "mean_logits", "token_accuracy", "aligned_logps", "max_logit")
"""Row statistics of the softmax that an engine computes beside the log-prob, in the same pass:

- ``entropy``: ``-sum_v p_v log p_v``, in nats;
- ``mean_logits``: the mean of the row's logits over the vocabulary;
- ``token_accuracy``: 1 where no token is likelier than the target, else 0;
- ``aligned_logps``: ``logp - log sum_v p_v**2``, the token weight of WPO (arXiv:2406.11827, Eq. 2),
  in nats;
- ``max_logit``: the largest of the row's logits, by which parts of a vocabulary are compared.
"""

DEFAULT_WORKSPACE_BYTES = 512 * 2**20
"""Workspace of a call that names none: 512 MiB, enough for a pair of 2,048 scored tokens at V =
49,152 in fp32. On a GPU it is a sixteenth of the device's memory, if that is more.
"""


@constant
def default_workspace(device: torch.device) -> int:
    """The workspace of a call that names none, in bytes.

    On a GPU each chunk of rows reads and writes all of the float32 dWeight, 2.1 GB for Llama 3 8B,
    so chunks should be large: 5 GB of an H100's 80 hold 16,000 rows of its logits.
    """
    if device.type != "cuda":
        return DEFAULT_WORKSPACE_BYTES
    total = torch.cuda.get_device_properties(device).total_memory
    return max(DEFAULT_WORKSPACE_BYTES, total // 16)


def result_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs and of accumulated gradients: float32, or float64 where the products
    are float64.
    """
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """Rows that go through one lm_head.

    Attributes:
        hidden: ``(N, H)`` contiguous hidden states of the rows.
        weight: ``(V, H)`` lm_head weight.
        bias: ``(V,)`` or None.
        targets: ``(N,)`` int64.
        groups: G + 1 non-decreasing bounds in [0, N]; the rows of a group belong together.
        transform: of the logits.
        compute_dtype: the dtype in which hidden and weight enter the products (autocast rounds
            float32 tensors to it).
        workspace_bytes: bound on scratch memory, results and gradients excluded; one row's tile is
            the least an engine takes.
        chunk_rows: the most rows of whole groups that go through at once, for processes that must
            go through the same number of chunks: the least :meth:`Engine.chunk_rows` among them.
            None leaves it to the engine.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    groups: list[int]
    transform: LogitTransform
    compute_dtype: torch.dtype
    workspace_bytes: int
    chunk_rows: int | None = None

    @property
    def result_dtype(self) -> torch.dtype:
        """See :func:`result_dtype`."""
        return result_dtype(self.compute_dtype)


class NeedsGrad(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def lm_head(self) -> bool:
        """Whether the lm_head is trained."""
        return self.weight or self.bias


NO_GRAD = NeedsGrad()


class Gradients(NamedTuple):
    """Gradients in the result dtype; None where not asked for. dWeight is accumulated in it,
    whatever the weight's dtype.
    """

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


NO_GRADIENTS = Gradients()


@dataclass(frozen=True)
class EngineOutput:
    """What one pass over a problem gives; row values are in the result dtype.

    Attributes:
        logps: ``(N,)`` log-prob of each target.
        lse: ``(N,)`` log-sum-exp of each row's logits.
        statistics: ``(K, N)``, one line for each name asked for.
        dlogp_dhidden: ``(N, H)``, in the hidden states' dtype, where it was asked for.
        gradients: of the loss; all None where there is none.
        losses: ``(P,)`` float32 loss of each pair, and sequence_logps: ``(2P,)`` float64, two per
            pair, group by group: from an engine that took the loss from a :class:`PairLossPlan`.
            None from all others.
    """

    logps: Tensor
    lse: Tensor
    statistics: Tensor
    dlogp_dhidden: Tensor | None = None
    gradients: Gradients = NO_GRADIENTS
    losses: Tensor | None = None
    sequence_logps: Tensor | None = None


class RowValues(NamedTuple):
    """What is known of n consecutive rows once their logits have gone by; see :class:`EngineOutput`.

    Attributes:
        logps, lse: ``(n,)``; statistics: ``(K, n)``.
    """

    logps: Tensor
    lse: Tensor
    statistics: Tensor


@dataclass(frozen=True)
class PairLossPlan:
    """A loss in plain numbers, where it is simple: group i is pair i, the rows of its chosen
    sequence followed by those of its rejected one.

    Attributes:
        offsets: ``(2P + 1,)`` int64 bounds of the sequences, in rows.
        order: ``(P,)`` int64, where each pair stands in `ref_logps` and in the losses.
        ref_logps: ``(2, P)`` float64 reference log-probs of chosen and rejected, contiguous.
        rounded: the policy's sequence log-probs are rounded to float32 before they are compared, as
            the reference's were.
        loss: the name of the loss's class in :mod:`fastdpop.losses`; options: its fields.
        share: factor of a pair's loss in the total.
    """

    offsets: Tensor
    order: Tensor
    ref_logps: Tensor
    rounded: bool
    loss: str
    options: Mapping[str, Any]
    share: float


@dataclass(frozen=True)
class GroupLoss:
    """A loss, as far as an engine needs to know it.

    Attributes:
        dlogp: ``(first, last, values) -> (n,)``: the derivatives of the loss with respect to the
            log-probs of the n rows of groups ``first`` to ``last - 1``, from what is known of
            these rows. They may come in another dtype, float64 as a rule.
        plan: the same in plain numbers, or None. An engine that knows the loss may use this instead
            of calling back; it then gives `losses` and `sequence_logps`.
    """

    dlogp: Callable[[int, int, RowValues], Tensor]
    plan: PairLossPlan | None = None


class Engine(ABC):
    """What every engine implements."""

    name: str

    @abstractmethod
    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this engine cannot compute on a device in a dtype, or None if it can."""

    def automatic(self, device: torch.device) -> bool:
        """Whether ``engine="auto"`` may take it on a device; if not, it is there by name only."""
        del device
        return True

    @abstractmethod
    def describe(self) -> str:
        """What it computes with, in a few words; asked only where it is available."""

    @abstractmethod
    def chunk_rows(
        self, problem: Problem, statistics: tuple[str, ...], needs_grad: NeedsGrad
    ) -> int:
        """The most rows of whole groups that :meth:`logps_and_gradients` takes through at once; a
        larger group goes through by itself, in pieces.
        """

    @abstractmethod
    def logps(self, problem: Problem, statistics: tuple[str, ...]) -> EngineOutput:
        """Log-probs alone: 1 matrix product."""

    @abstractmethod
    def logps_and_dlogp_dhidden(
        self, problem: Problem, statistics: tuple[str, ...]
    ) -> EngineOutput:
        """Log-probs and ``d logp_i / d hidden_i`` ``(N, H)`` in the hidden states' dtype: 2 matrix
        products.

        This does not depend on the loss, so a frozen lm_head needs nothing else.
        """

    @abstractmethod
    def gradients(
        self, problem: Problem, lse: Tensor, dlogp: Tensor, needs_grad: NeedsGrad
    ) -> Gradients:
        """Gradients for derivatives `dlogp` ``(N,)`` known beforehand: 1 matrix product to compute
        the logits again, and 1 for each of hidden and weight.
        """

    @abstractmethod
    def logps_and_gradients(
        self,
        problem: Problem,
        statistics: tuple[str, ...],
        loss: GroupLoss,
        needs_grad: NeedsGrad,
    ) -> EngineOutput:
        """Both in one pass over whole groups: 3 matrix products for a trained lm_head; 4 for a group
        beyond the workspace.
        """
