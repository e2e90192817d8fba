"""How sequences come in: packed or padded, shifted or not, in pairs or alone, in any memory layout."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastdpop import fused_logps, fused_preference_loss, losses
from tests.batches import Batch, assert_by_definition, batch, fused, token_logps

TILED = 20_000
"""A workspace of a few rows and a few tokens of the vocabulary."""

UNPAIRED = ("kto", "apo_zero", "bco_pair", "sft")


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def packed(example: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, labels and bounds of the sequences without the padding that ends them."""
    scored = example.labels != -100
    position = torch.arange(1, scored.shape[1] + 1)
    # Sequence 1 scores nothing: it keeps one position; sequence 0 keeps its padding.
    ends = (scored * position).amax(1).clamp(min=1)
    ends[0] = scored.shape[1]
    kept = position[None] <= ends[:, None]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), ends.cumsum(0)])
    return example.hidden[kept], example.labels[kept], bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
def test_packed_is_padded(integers: torch.dtype, trained: bool, dtype: torch.dtype) -> None:
    example = batch(3, dtype=dtype, bias=True, trained=trained)
    hidden, labels, bounds = packed(example)
    assert len(hidden) < example.labels.numel()
    padded = fused(example, "dpop")
    out = fused_preference_loss(
        hidden,
        example.weight,
        labels.to(integers),
        bias=example.bias,
        cu_seqlens=bounds.to(integers),
        ref_logps=example.ref_logps,
    )
    assert torch.equal(out.loss, padded.loss)
    assert torch.equal(out.lengths, padded.lengths)
    for a, b in zip(
        gradients(out.loss, example.trained), gradients(padded.loss, example.trained), strict=True
    ):
        assert torch.equal(a, b)


def test_labels_never_cross_a_packed_boundary() -> None:
    """The first token of a sequence has no hidden state before it, whatever lies there."""
    hidden, weight = torch.randn(8, 4), torch.randn(11, 4)
    labels = torch.randint(0, 11, (8,))
    whole = fused_logps(hidden, weight, labels, cu_seqlens=torch.tensor([0, 3, 3, 8]))
    first = fused_logps(hidden[None, :3], weight, labels[None, :3])
    last = fused_logps(hidden[None, 3:], weight, labels[None, 3:])
    torch.testing.assert_close(whole, torch.cat([first, torch.zeros(1), last]))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["dpop", "aot", "sft"])
def test_shifted_labels(name: str, trained: bool) -> None:
    example = batch(3, dtype=torch.float64, trained=trained)
    want = fused(example, name)
    shifted = torch.full_like(example.labels, -100)
    shifted[:, :-1] = example.labels[:, 1:]
    example.labels = shifted
    out = assert_by_definition(example, name, shift=False)
    assert torch.equal(out.loss, want.loss)
    for a, b in zip(
        gradients(out.loss, example.trained), gradients(want.loss, example.trained), strict=True
    ):
        assert torch.equal(a, b)


def test_unshifted_labels_score_the_first_and_the_last_position() -> None:
    example = batch(2, 3, dtype=torch.float64)
    example.labels = torch.randint(0, 37, (4, 3))
    out = assert_by_definition(example, "dpop", shift=False)
    assert out.lengths.tolist() == [3, 3, 3, 3]
    token = fused_logps(*example.inputs, example.labels, shift_labels=False, reduction="token")
    torch.testing.assert_close(token, token_logps(example, shift=False), rtol=1e-12, atol=0)


SHARED = {
    "one chosen, three rejected": [[0, 3], [0, 4], [0, 5]],
    "chosen here, rejected there": [[0, 1], [1, 2], [4, 0]],
    "two groups, interleaved": [[0, 3], [1, 4], [0, 5], [1, 4]],
    "unused sequences": [[5, 2]],
    "itself": [[0, 0], [3, 4]],
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("workspace", [TILED, None])
@pytest.mark.parametrize("name", ["dpop", "ipo", "aot", "wpo", "sft"])
@pytest.mark.parametrize("shape", SHARED)
def test_sequences_that_serve_several_pairs(
    shape: str, name: str, workspace: int | None, trained: bool
) -> None:
    loss = losses.wpo_weighted(losses.get("dpo")) if name == "wpo" else losses.get(name)
    example = batch(3, dtype=torch.float64, bias=True, trained=trained)
    example.labels[1, 4:6] = 7  # otherwise empty
    out = assert_by_definition(example, loss, pairs=SHARED[shape], workspace_bytes=workspace)
    used = {s for pair in SHARED[shape] for s in pair}
    scored = (example.labels[:, 1:] != -100).sum(1)
    assert out.lengths.tolist() == [int(scored[s]) if s in used else 0 for s in range(6)]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHARED)
def test_a_shared_sequence_is_desensitised_pair_by_pair(
    shape: str, alpha: float, trained: bool
) -> None:
    loss = losses.length_desensitised(losses.get("dpop"), alpha)
    example = batch(3, dtype=torch.float64, bias=True, trained=trained)
    by_pair = tuple(example.ref_logps[list(side)] for side in zip(*SHARED[shape], strict=True))
    assert_by_definition(example, loss, pairs=SHARED[shape], ref_logps=by_pair)


def test_pairs_of_a_tensor_or_of_lists() -> None:
    example = batch(3)
    table = [[0, 3], [0, 4]]
    want = fused(example, "dpop", pairs=table).loss
    for pairs in (torch.tensor(table), torch.tensor(table, dtype=torch.int32), ((0, 3), (0, 4))):
        assert torch.equal(fused(example, "dpop", pairs=pairs).loss, want)
    default = fused(example, "dpop").loss
    assert torch.equal(fused(example, "dpop", pairs=[[0, 3], [1, 4], [2, 5]]).loss, default)


def test_an_odd_batch_with_pairs() -> None:
    example = batch(2, dtype=torch.float64)
    example = Batch(
        example.hidden[:3].detach().requires_grad_(),
        example.weight,
        None,
        example.labels[:3],
        example.ref_logps[:3],
    )
    assert_by_definition(example, "dpop", pairs=[[0, 2]])


ALONE = [[0, -1], [-1, 3], [2, 5], [-1, 4], [0, 4]]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("pairs", [ALONE, [[0, -1], [2, -1]], [[-1, 3]]], ids=len)
@pytest.mark.parametrize("name", [*UNPAIRED, "kto with kl", "bco shifted", "kto and sft", "ld kto"])
def test_unpaired_data(name: str, pairs: list[list[int]], trained: bool) -> None:
    loss = {
        "kto with kl": losses.get("kto"),
        "bco shifted": losses.get("bco_pair", batch_shift=True),
        "kto and sft": losses.get("kto") + 0.5 * losses.get("sft"),
        "ld kto": losses.length_desensitised(losses.get("kto"), 0.5),
    }.get(name) or losses.get(name)
    example = batch(3, dtype=torch.float64, bias=True, trained=trained)
    options: dict[str, object] = {}
    if loss.traits.ld_alpha is not None:
        options["ref_logps"] = tuple(example.ref_logps[list(s)] for s in zip(*pairs, strict=True))
    kl = torch.tensor(0.7) if name == "kto with kl" else None
    out = assert_by_definition(example, loss, pairs=pairs, kl=kl, **options)
    for side, logps, rewards in (
        (0, out.chosen_logps, out.chosen_rewards),
        (1, out.rejected_logps, out.rejected_rewards),
    ):
        absent = torch.tensor([pair[side] < 0 for pair in pairs])
        assert torch.equal(logps[absent], torch.zeros(int(absent.sum()), dtype=torch.float64))
        assert torch.equal(rewards[absent], torch.zeros(int(absent.sum()), dtype=torch.float64))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", [n for n in UNPAIRED if losses.get(n).traits.needs_reference])
def test_what_stands_in_for_an_absent_side_does_not_matter(name: str, trained: bool) -> None:
    """NaN is what a table without a value has; sequence 0 is what index -1 is clamped to."""
    example = batch(3, trained=trained)
    pairs = [[1, -1], [-1, 3], [2, 5]]
    ref = example.ref_logps
    nan = ref.new_tensor(torch.nan)
    want = fused(example, name, pairs=pairs, ref_logps=ref)
    spoiled = ref.clone()
    spoiled[0] = torch.inf
    by_pair = (torch.stack([ref[1], nan, ref[2]]), torch.stack([nan, ref[3], ref[5]]))
    for given in (spoiled, by_pair):
        out = fused(example, name, pairs=pairs, ref_logps=given)
        assert torch.equal(out.loss, want.loss)
        for field in ("chosen_rewards", "rejected_rewards", "margins", "accuracy", "penalty"):
            assert torch.equal(getattr(out, field), getattr(want, field)), field
        for a, b in zip(
            gradients(out.loss, example.trained),
            gradients(want.loss, example.trained),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_memory_layout_does_not_matter(trained: bool) -> None:
    example = batch(3, bias=True, trained=trained)
    want = fused(example, "dpop")
    want_gradients = gradients(want.loss, example.trained)

    def strided(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), -1, dtype=t.dtype)
        wide[..., 0] = t.detach()
        return wide[..., 0].requires_grad_(t.requires_grad)

    def transposed(t: Tensor) -> Tensor:
        return t.detach().mT.contiguous().mT.requires_grad_(t.requires_grad)

    for change in (strided, transposed):
        assert example.bias is not None
        own = Batch(
            change(example.hidden),
            change(example.weight),
            strided(example.bias),
            change(example.labels),
            strided(example.ref_logps),
        )
        assert not own.hidden.is_contiguous()
        out = fused(own, "dpop")
        torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=0)
        for a, b in zip(gradients(out.loss, own.trained), want_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["dpop", "aot"])
def test_expanded_tensors(name: str, dtype: torch.dtype) -> None:
    """One hidden state for every position, one row for the whole vocabulary, one line of labels."""
    hidden = torch.randn(1, 1, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(1, 5, dtype=dtype, requires_grad=True)
    bias = torch.randn(7, dtype=dtype, requires_grad=True)
    labels = torch.tensor([-100, 3, 1, 6]).expand(4, 4)
    ref = torch.tensor(-5.0, dtype=dtype).expand(4)
    given = Batch(hidden.expand(4, 4, 5), weight.expand(7, 5), bias, labels, ref)
    copied = Batch(hidden.repeat(4, 4, 1), weight.repeat(7, 1), bias, labels.contiguous(), ref)
    leaves = (hidden, weight, bias)
    out, want = fused(given, name), fused(copied, name)
    torch.testing.assert_close(out.loss, want.loss)
    for a, b in zip(gradients(out.loss, leaves), gradients(want.loss, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_prompts_and_padding_are_never_read(trained: bool) -> None:
    example = batch(3, bias=True, trained=trained)
    want = fused(example, "dpop", statistics=("entropy",))
    want_gradients = gradients(want.loss, example.trained)
    scored = example.labels != -100
    read = torch.zeros_like(scored)
    read[:, :-1] = scored[:, 1:]
    with torch.no_grad():
        example.hidden[~read] = torch.nan
    out = fused(example, "dpop", statistics=("entropy",))
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(out.entropy, want.entropy)
    for a, b in zip(gradients(out.loss, example.trained), want_gradients, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(want_gradients[0][~read], torch.zeros_like(want_gradients[0][~read]))
