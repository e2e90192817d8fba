"""Calls drawn at random: shapes, masks, dtypes, heads, pairs, workspaces, losses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdpop import fused_logps, losses
from fastdpop.transform import LogitTransform
from tests.batches import (
    LOSSES,
    Batch,
    aligned_logps,
    assert_by_definition,
    fused,
    logits,
    token_logps,
)

pytestmark = pytest.mark.filterwarnings("ignore:no token of the batch is scored")

UNPAIRED = [name for name, loss in LOSSES.items() if loss.traits.accepts_unpaired]
# Where the gradient jumps (a hinge, a sorted order) or is amplified beyond any bound, float32
# inputs may honestly land elsewhere than their float64 copies.
SMOOTH = ["cdpo", "ipo", "sft", "cpo", "simpo", "nca_pair", "kto", "wpo", "ld", "apo_zero"]


@dataclass
class Call:
    """One drawn call."""

    example: Batch
    head: LogitTransform
    pairs: list[list[int]] | None
    workspace: int | None
    reduction: str
    shift: bool


@st.composite
def calls(draw: st.DrawFn, *, unpaired: bool = False) -> Call:
    sequences = draw(st.integers(1, 6))
    length, width = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    vocabulary = draw(st.integers(1, 40))
    pairs = None
    if unpaired or sequences % 2 or draw(st.booleans()):
        index = st.integers(-1 if unpaired else 0, sequences - 1)
        row = st.tuples(index, index).filter(lambda pair: max(pair) >= 0).map(list)
        pairs = draw(st.lists(row, min_size=1, max_size=5))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    trained = draw(st.booleans())
    labels = torch.randint(0, vocabulary, (sequences, length))
    labels[torch.rand(sequences, length) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))] = -100
    bias = torch.randn(vocabulary).to(dtype) if draw(st.booleans()) else None
    example = Batch(
        torch.randn(sequences, length, width).to(dtype).requires_grad_(),
        torch.randn(vocabulary, width).to(dtype).requires_grad_(trained),
        None if bias is None else bias.requires_grad_(trained),
        labels,
        torch.zeros(sequences),
    )
    head = LogitTransform(
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.3])),
        temperature=draw(st.sampled_from([1.0, 0.8])),
    )
    shift = draw(st.booleans())
    logps = token_logps(example, head, shift=shift).sum(1).detach()
    example.ref_logps = (
        (logps + 0.5 * torch.randn(sequences))
        .clamp(max=0.0)
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
    )
    return Call(
        example,
        head,
        pairs,
        draw(st.sampled_from([None, 1, 5_000, 50_000])),
        draw(st.sampled_from(["mean", "sum", "none"])),
        shift,
    )


def check(call: Call, loss: losses.PreferenceLoss) -> None:
    # A faster engine may round each term of a 16-bit gradient to 16 bits, which no bound on the sum
    # covers where the terms cancel; the exact engine does not.
    half = call.example.hidden.dtype in (torch.bfloat16, torch.float16)
    options: dict[str, object] = {"engine": "eager" if half else "auto"}
    if loss.traits.ld_alpha is not None and loss.traits.needs_reference and call.pairs is not None:
        ref = call.example.ref_logps
        options["ref_logps"] = tuple(ref[list(side)] for side in zip(*call.pairs, strict=True))
    out = assert_by_definition(
        call.example,
        loss,
        call.head,
        pairs=call.pairs,
        shift=call.shift,
        reduction=call.reduction,
        workspace_bytes=call.workspace,
        statistics=("entropy",),
        slack=1e-5,  # among thousands of small batches PyTorch is sometimes exact by luck
        **options,
    )
    used = range(len(call.example.labels))
    if call.pairs is not None:
        used = [s for s in used if any(s in pair for pair in call.pairs)]  # type: ignore[assignment]
    scored = call.example.labels != -100
    scored[:, 0] &= not call.shift
    assert out.lengths.tolist() == [
        int(own.sum()) if s in used else 0 for s, own in enumerate(scored)
    ]


@settings(max_examples=150)
@given(calls(), st.sampled_from(SMOOTH))
def test_any_call(call: Call, name: str) -> None:
    # A sequence paired with itself: its gradients cancel to rounding noise.
    assume(not any(chosen == rejected for chosen, rejected in call.pairs or ()))
    check(call, LOSSES[name])


@settings(max_examples=150)
@given(calls(), st.sampled_from(list(LOSSES)))
def test_any_loss_in_float64(call: Call, name: str) -> None:
    # In a ranking, a completion cannot be its own rival.
    own_rival = any(chosen == rejected for chosen, rejected in call.pairs or ())
    assume(not ("list" in LOSSES[name].traits.needs and own_rival))
    call.example = call.example.to(torch.float64)
    call.example.ref_logps = call.example.ref_logps.double()
    check(call, LOSSES[name])


@settings(max_examples=100)
@given(calls(unpaired=True), st.sampled_from(UNPAIRED))
def test_any_unpaired_call(call: Call, name: str) -> None:
    call.example = call.example.to(torch.float64)
    check(call, LOSSES[name])


@settings(max_examples=60)
@given(calls())
def test_statistics_of_any_call(call: Call) -> None:
    call.example = call.example.to(torch.float64)
    names = ("entropy", "mean_logits")
    out = fused(
        call.example,
        "sft",
        call.head,
        pairs=call.pairs,
        shift_labels=call.shift,
        statistics=names,
        workspace_bytes=call.workspace,
    )
    z = logits(call.example, call.head).detach()
    logp = z.log_softmax(-1)
    rows = {"entropy": -(logp.exp() * logp).sum(-1), "mean_logits": z.mean(-1)}
    scored = call.example.labels != -100
    scored[:, 0] &= not call.shift
    for name in names:
        values: Tensor = rows[name].roll(1, 1) if call.shift else rows[name]
        want = (values * scored).sum(1) / scored.sum(1).clamp(min=1)
        want[out.lengths == 0] = 0.0
        torch.testing.assert_close(getattr(out, name), want, rtol=1e-11, atol=1e-12)


@settings(max_examples=60)
@given(calls(), st.sampled_from(["dpop", "simpo"]))
def test_a_policy_equal_to_its_reference(call: Call, name: str) -> None:
    """Of any shape and dtype, trained or frozen: log-ratios of exactly 0, and packing or a second
    run changes no bit.
    """
    example = call.example
    head = {
        "softcap": call.head.softcap,
        "logit_scale": call.head.logit_scale,
        "temperature": call.head.temperature,
        "bias": example.bias,
        "workspace_bytes": call.workspace,
    }
    if call.pairs is None:
        with torch.no_grad():
            ref = fused_logps(example.hidden, example.weight, example.labels, **head)
        out = fused(example, "dpop", call.head, ref_logps=ref, workspace_bytes=call.workspace)
    else:
        out = fused(
            example,
            "dpop",
            call.head,
            pairs=call.pairs,
            ref_hidden=example.hidden.detach(),
            workspace_bytes=call.workspace,
        )
    assert torch.equal(out.margins, torch.zeros_like(out.margins))
    assert torch.equal(out.penalty, torch.zeros_like(out.penalty))


@settings(max_examples=60)
@given(calls())
def test_wpos_alignment(call: Call) -> None:
    """The weights alone, which losses detach."""
    call.example = call.example.to(torch.float64)
    found: list[Tensor] = []

    def spy(pairs: losses.PairLogps) -> Tensor:
        assert pairs.chosen_aligned_logps is not None
        found.append(pairs.chosen_aligned_logps)
        return pairs.chosen

    loss = losses.wpo_weighted(losses.FunctionLoss(spy, losses.Traits(needs_reference=False)))
    pairs = call.pairs or [[0, 0]]
    with torch.no_grad():
        fused(call.example, loss, call.head, pairs=pairs, shift_labels=call.shift)
    want = aligned_logps(call.example, call.head, shift=call.shift).sum(1)
    torch.testing.assert_close(found[-1], want[[p[0] for p in pairs]], rtol=1e-11, atol=1e-11)
