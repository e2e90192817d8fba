"""Losses that read numbers of each pair, and presets, in one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpop import fused_preference_loss, losses
from tests.batches import batch, needed_values


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dpop", ("margin", "weight")),
        ("ipo", ("offset",)),
        ("rpo_bwd_kl", ("chosen_score", "rejected_score")),
        ("mpo", ("margin", "offset")),
        ("alpha_po", ("margin",)),
    ],
)
def test_one_graph(name: str, given: tuple[str, ...], trained: bool) -> None:
    made_up = needed_values(3) | {n: torch.rand(3) for n in ("margin", "offset", "weight")}
    values = [made_up[n] for n in given]
    example = batch(3, trained=trained)
    ref_logps = example.ref_logps if losses.get(name).traits.needs_reference else None

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, *values: Tensor) -> Tensor:
        of_pairs = dict(zip(given, values, strict=True))
        return fused_preference_loss(
            hidden, weight, labels, loss=losses.get(name), ref_logps=ref_logps, pair_values=of_pairs
        ).loss

    torch._dynamo.reset()
    inputs = (example.hidden, example.weight, example.labels, *values)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    want = run(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, example.trained), torch.autograd.grad(want, example.trained)
    )
    torch._dynamo.reset()
