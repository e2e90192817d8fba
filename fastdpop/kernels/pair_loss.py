"""From log-probs of rows to the loss of their pairs, and back to one derivative per row.

One program per pair: sums over each of its two sequences and their log-ratios, in float64 as
everywhere in this package, the loss and its derivatives, and ``dlogp``, the derivative with respect
to the log-prob of each row. The loss is an argument, a jitted function; :mod:`.losses` has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .config import PAIR_ROWS, SMALL
from .tiles import grid, jit


@dataclass(frozen=True)
class Pairs:
    """Pairs whose rows lie side by side: pair i's chosen rows are ``offsets[2i]`` to
    ``offsets[2i + 1]``, its rejected ones follow.

    Attributes:
        offsets: ``(2P + 1,)`` int64.
        order: ``(P,)`` int64, where each pair stands in `ref_logps` and in the results.
        ref_logps: ``(2, P)`` float64 reference log-probs of chosen and rejected.
        rounded: the policy's sums are rounded to float32 before they are compared, as the
            reference's were.
        loss: a jitted function of :mod:`.losses`, and its three numbers.
        share: factor of a pair's loss in the total.
    """

    offsets: Tensor
    order: Tensor
    ref_logps: Tensor
    rounded: bool
    loss: Any
    numbers: tuple[float, float, float]
    share: float


@jit
def pair_loss_kernel(
    logps,  # (n,)
    offsets,  # (2P + 1,)
    order,  # (P,)
    ref_logps,  # (2, P)
    losses,  # (P,)
    sequence_logps,  # (2P,)
    dlogp,  # (n,)
    first_row,
    first_pair,
    pairs,
    rounded,
    share,
    number0,
    number1,
    number2,
    LOSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One pair, see the module: rows ``first_row`` on of a batch, pairs ``first_pair`` on."""
    pair = first_pair + tl.program_id(0)
    start = tl.load(offsets + 2 * pair) - first_row
    middle = tl.load(offsets + 2 * pair + 1) - first_row
    stop = tl.load(offsets + 2 * pair + 2) - first_row

    # Sums of the two sequences.
    chosen = tl.zeros((BLOCK_N,), tl.float64)
    rejected = tl.zeros((BLOCK_N,), tl.float64)
    for first in range(start, stop, BLOCK_N):
        r = first + tl.arange(0, BLOCK_N)
        logp = tl.load(logps + r, r < stop, other=0.0).to(tl.float64)
        chosen += tl.where(r < middle, logp, 0.0)
        rejected += tl.where(r < middle, 0.0, logp)
    logp_w = tl.sum(chosen, 0)
    logp_l = tl.sum(rejected, 0)
    tl.store(sequence_logps + 2 * pair, logp_w)
    tl.store(sequence_logps + 2 * pair + 1, logp_l)
    # Equal log-probs give a log-ratio of exactly 0 only if both or neither of them were rounded.
    logp_w = tl.where(rounded != 0, logp_w.to(tl.float32).to(tl.float64), logp_w)
    logp_l = tl.where(rounded != 0, logp_l.to(tl.float32).to(tl.float64), logp_l)

    # The loss and its derivatives, in float32: a log-ratio is small where log-probs are large.
    place = tl.load(order + pair)
    loss, d_w, d_l = LOSS(
        (logp_w - tl.load(ref_logps + place)).to(tl.float32),
        (logp_l - tl.load(ref_logps + pairs + place)).to(tl.float32),
        tl.maximum(middle - start, 1).to(tl.float32),
        tl.maximum(stop - middle, 1).to(tl.float32),
        number0,
        number1,
        number2,
    )
    tl.store(losses + place, loss)
    for first in range(start, stop, BLOCK_N):
        r = first + tl.arange(0, BLOCK_N)
        tl.store(dlogp + r, tl.where(r < middle, d_w * share, d_l * share), r < stop)


def pair_loss(
    logps: Tensor,
    of: Pairs,
    first_row: int,
    first_pair: int,
    last_pair: int,
    losses: Tensor,
    sequence_logps: Tensor,
) -> Tensor:
    """Launch the loss of pairs ``first_pair`` to ``last_pair - 1``, whose rows have the log-probs
    `logps` ``(n,)``; returns their `dlogp` ``(n,)``.

    Args:
        losses: ``(P,)`` float32 and sequence_logps: ``(2P,)`` float64, of which the pairs' own
            entries are filled in.
    """
    dlogp = torch.empty_like(logps)
    if last_pair > first_pair:
        pair_loss_kernel[grid(last_pair - first_pair)](
            logps,
            of.offsets,
            of.order,
            of.ref_logps,
            losses,
            sequence_logps,
            dlogp,
            first_row,
            first_pair,
            len(of.order),
            int(of.rounded),
            of.share,
            *of.numbers,
            LOSS=of.loss,
            BLOCK_N=PAIR_ROWS,
            **SMALL.options(),
        )
    return dlogp
