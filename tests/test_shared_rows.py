"""Rows that several sequences share, through every engine: the same loss and the same gradients as
with a row for each sequence.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastdpop import engines, losses, ops
from fastdpop.engines import NeedsGrad
from fastdpop.losses import PreferenceLoss
from fastdpop.pair_loss import PairLoss, Totals
from fastdpop.rows import Rows, rows_from_members
from fastdpop.spec import Spec
from fastdpop.transform import LogitTransform

POSITIONS, WIDTH, VOCABULARY = 12, 16, 37

# (position, target): three completions of one prompt that part at position 3, and at 5; and a pair
# of its own.
SEQUENCES = [
    [(0, 4), (1, 9), (2, 3), (3, 8), (4, 1)],
    [(0, 4), (1, 9), (2, 3), (3, 7), (5, 2), (6, 2)],
    [(0, 4), (1, 9), (2, 3), (3, 7), (5, 6)],
    [(8, 1), (9, 30)],
    [(10, 1)],
]
PAIRS = torch.tensor([[0, 1], [3, 4], [0, 2]])


def layouts() -> tuple[Rows, Rows, Tensor]:
    """With what is shared once, with a copy for each sequence, and the copies' own positions."""
    flat = torch.tensor([pair for one in SEQUENCES for pair in one])
    index, targets = flat.T
    offsets = torch.tensor([0, *map(len, SEQUENCES)]).cumsum(0)
    shared = rows_from_members(index, targets, offsets, PAIRS, VOCABULARY)
    apart = rows_from_members(torch.arange(len(index)), targets, offsets, PAIRS, VOCABULARY)
    return shared, apart, index


def run(
    rows: Rows, hidden: Tensor, weight: Tensor, loss: PreferenceLoss, spec: Spec
) -> tuple[Tensor, Tensor]:
    """Loss, and log-probs of sequences in the caller's order."""
    ref_logps = torch.tensor([[-15.0, -8.0, -16.0], [-18.0, -4.0, -17.0]])
    names = loss.traits.statistics
    made = replace(spec, statistics=names, loss=losses.key_of(loss))
    if spec.needs_grad.lm_head:
        total, sums, *_ = ops.pair_loss(
            hidden[rows.index],
            weight,
            None,
            rows.tensors(),
            ref_logps,
            None,
            None,
            None,
            made.text(),
        )
    else:
        of_pairs = PairLoss(rows, loss, Totals.of(rows), ref_logps, None, names)
        logps, _, found, _ = ops.row_logps(
            hidden[rows.index], weight, None, rows.targets, rows.groups[0], made.text()
        )
        sums = rows.sum_per_sequence(logps)
        total = of_pairs.total(sums, found.detach())
    return total, torch.zeros(5, dtype=sums.dtype).index_put((rows.inputs,), sums.detach())


@pytest.mark.parametrize("workspace", [4_000, 1 << 20], ids=["pieces", "whole"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["dpop", "dpo", "ipo", "wpo"])
@pytest.mark.parametrize("engine", engines.available("cpu"))
def test_shared_rows(engine: str, name: str, trained: bool, workspace: int) -> None:
    loss = losses.wpo_weighted(losses.get("dpo")) if name == "wpo" else losses.get(name)
    shared, apart, index = layouts()
    assert len(shared.index) == len({pair for one in SEQUENCES for pair in one}) == 12
    assert len(apart.index) == len(index) == 19
    spec = Spec(
        LogitTransform(), torch.float32, workspace, engine, needs_grad=NeedsGrad(True, trained)
    )
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.3).requires_grad_(trained)
    leaves = [hidden, *([weight] if trained else [])]
    total, logps = run(shared, hidden, weight, loss, spec)
    want, want_logps = run(apart, hidden[index], weight, loss, spec)
    torch.testing.assert_close(total, want, rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(logps, want_logps, rtol=0, atol=2e-6)
    ours, theirs = (torch.autograd.grad(t, leaves) for t in (total, want))
    for a, b in zip(ours, theirs, strict=True):
        bound = 2e-6 * float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=bound)
    used = sorted({position for one in SEQUENCES for position, _ in one})
    unused = [p for p in range(POSITIONS) if p not in used]
    assert torch.equal(ours[0][unused], torch.zeros(len(unused), WIDTH))
