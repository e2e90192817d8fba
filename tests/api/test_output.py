"""What else comes back: logged values, statistics, and log-probs by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdpop import PreferenceOutput, fused_logps, losses
from tests.batches import HEADS, Batch, batch, fused, logits, token_logps

LOGGED = ("entropy", "mean_logits", "token_accuracy")


def statistics_by_definition(example: Batch, head: str) -> dict[str, Tensor]:
    """``(S,)`` token means in float64."""
    z = logits(example.to(torch.float64), HEADS[head]).detach()[:, :-1]
    logp = z.log_softmax(-1)
    labels = example.labels[:, 1:]
    scored = labels != -100
    rows = {
        "entropy": -(logp.exp() * logp).sum(-1),
        "mean_logits": z.mean(-1),
        "token_accuracy": (z.argmax(-1) == labels).double(),
    }
    count = scored.sum(1).clamp(min=1)
    return {name: (values * scored).sum(1) / count for name, values in rows.items()}


@pytest.mark.parametrize("route", ["no_grad", "frozen", "trained", "reduction none"])
@pytest.mark.parametrize("workspace", [20_000, None])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_statistics(dtype: torch.dtype, head: str, workspace: int | None, route: str) -> None:
    example = batch(3, dtype=dtype, bias=True, trained=route != "frozen")
    best = logits(example.to(torch.float64), HEADS[head]).argmax(-1)[:, :-1]
    example.labels[:, 1:][example.labels[:, 1:] == 3] = 4
    half = (example.labels[:, 1:] != -100) & (torch.rand(best.shape) < 0.5)
    example.labels[:, 1:] = torch.where(half, best, example.labels[:, 1:])
    want = statistics_by_definition(example, head)
    assert 0 < want["token_accuracy"].mean() < 1
    with torch.set_grad_enabled(route != "no_grad"):
        out = fused(
            example,
            losses.wpo_weighted(losses.get("dpop")),
            HEADS[head],
            statistics=LOGGED,
            reduction="none" if route == "reduction none" else "mean",
            workspace_bytes=workspace,
        )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name in LOGGED:
        got = getattr(out, name)
        assert not got.requires_grad
        assert got.dtype == out.loss.dtype
        torch.testing.assert_close(got.double(), want[name], rtol=tolerance, atol=tolerance)


def test_statistics_are_computed_only_when_asked_for() -> None:
    example = batch(3)
    out = fused(example, "dpop")
    assert (out.entropy, out.mean_logits, out.token_accuracy) == (None, None, None)
    out = fused(example, "dpop", statistics=["mean_logits", "mean_logits"])
    assert out.mean_logits is not None
    assert (out.entropy, out.token_accuracy) == (None, None)


def test_statistics_belong_to_the_callers_sequences() -> None:
    example = batch(3, dtype=torch.float64)
    want = statistics_by_definition(example, "plain")
    out = fused(example, "dpop", pairs=[[4, 0], [2, 0]], statistics=LOGGED)
    for name in LOGGED:
        own = want[name].clone()
        own[[1, 3, 5]] = 0.0
        torch.testing.assert_close(getattr(out, name), own, rtol=1e-12, atol=0)


def logged(out: PreferenceOutput) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in vars(out).items()
        if isinstance(value, Tensor) and name != "loss"
    }


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logged_values(dtype: torch.dtype, trained: bool) -> None:
    example = batch(4, dtype=dtype, trained=trained)
    pairs = [[0, 4], [0, 5], [2, 6], [3, 7], [1, 4]]
    out = fused(example, losses.get("dpop", beta=0.7), pairs=pairs)
    logps = token_logps(example.to(torch.float64)).sum(1).detach()
    ratios = logps - example.ref_logps.double()
    w, r = [p[0] for p in pairs], [p[1] for p in pairs]
    want = {
        "chosen_logps": logps[w],
        "rejected_logps": logps[r],
        "chosen_logratios": ratios[w],
        "rejected_logratios": ratios[r],
        "chosen_rewards": 0.7 * ratios[w],
        "rejected_rewards": 0.7 * ratios[r],
        "margins": 0.7 * (ratios[w] - ratios[r]),
        "accuracy": (ratios[w] > ratios[r]).double().mean(),
        "penalty": (-ratios[w]).clamp(min=0),
    }
    assert 0 < want["accuracy"] < 1
    assert 0 < (want["penalty"] > 0).double().mean() < 1
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    for name, value in want.items():
        got = getattr(out, name)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), value, rtol=rtol, atol=20 * rtol, msg=name)
    used = (example.labels[:, 1:] != -100).sum(1)
    used[[i for i in range(8) if i not in w + r]] = 0
    assert torch.equal(out.lengths, used)
    assert not any(value.requires_grad for value in logged(out).values())
    assert out.loss.requires_grad


def test_accuracy_counts_pairs_with_both_sides_only() -> None:
    example = batch(3, dtype=torch.float64)
    logps = token_logps(example).sum(1).detach()
    example.ref_logps = logps + torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    pairs = [[0, 3], [2, 5], [0, -1], [-1, 4]]
    assert fused(example, "kto", pairs=pairs).accuracy == 0.5
    assert fused(example, "kto", pairs=pairs[2:]).accuracy == 0.0


@pytest.mark.parametrize("name", ["simpo", "sft", "cpo", "wpo", "sum", "user"])
def test_rewards_are_the_losss_own(name: str) -> None:
    loss = {
        "wpo": losses.wpo_weighted(losses.get("dpo", beta=0.4)),
        "sum": losses.get("dpo", beta=0.4) + losses.get("sft"),
        "user": losses.pairwise(lambda pairs: -pairs.chosen, beta=0.4),
    }.get(name) or losses.get(name)
    example = batch(3, dtype=torch.float64)
    out = fused(example, loss)
    logps = token_logps(example).sum(1).detach()
    lengths = (example.labels[:, 1:] != -100).sum(1).clamp(min=1)
    want = {
        "simpo": 2.0 * logps / lengths,
        "sft": logps,
        "cpo": 0.1 * logps,
        "wpo": 0.4 * (logps - example.ref_logps),
        "sum": 0.4 * (logps - example.ref_logps),
        "user": 0.4 * logps,
    }[name].chunk(2)
    torch.testing.assert_close(out.chosen_rewards, want[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.rejected_rewards, want[1], rtol=1e-12, atol=1e-13)


def test_sixteen_bit_inputs_give_float32_results() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        out = fused(batch(3, dtype=dtype), "dpop", statistics=LOGGED)
        found = logged(out)
        assert {found.pop(name).dtype for name in ("lengths", "pairs")} == {torch.int64}
        assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_fused_logps(head: str, reduction: str, trained: bool) -> None:
    example = batch(3, dtype=torch.float64, bias=True, trained=trained)
    options = {k: v for k, v in vars(HEADS[head]).items() if v is not None}
    got = fused_logps(
        example.hidden,
        example.weight,
        example.labels,
        bias=example.bias,
        reduction=reduction,
        **options,
    )
    want = token_logps(example, HEADS[head])
    want = want if reduction == "token" else want.sum(1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    c = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((c * got).sum(), example.trained),
        torch.autograd.grad((c * want).sum(), example.trained),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shift", [True, False])
def test_token_logps_of_a_packed_batch(shift: bool) -> None:
    example = batch(3, dtype=torch.float64)
    want = fused_logps(*example.inputs, example.labels, shift_labels=shift, reduction="token")
    got = fused_logps(
        example.hidden.flatten(0, 1),
        example.weight,
        example.labels.flatten(),
        cu_seqlens=torch.arange(7) * 9,
        shift_labels=shift,
        reduction="token",
    )
    assert torch.equal(got, want.flatten())
    torch.testing.assert_close(got, token_logps(example, shift=shift).flatten())


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("alpha", [None, 0.4])
@pytest.mark.parametrize("weighted", [True, False])
def test_token_weights_and_ld_alpha(alpha: float | None, weighted: bool, trained: bool) -> None:
    example = batch(3, dtype=torch.float64, trained=trained)
    weights = torch.rand(6, 9) if weighted else None
    got = fused_logps(*example.inputs, example.labels, token_weights=weights, ld_alpha=alpha)
    tokens = token_logps(example)
    want = []
    scored = example.labels != -100
    scored[:, 0] = False
    for s in range(6):
        near = min(int(scored[s].sum()), int(scored[(s + 3) % 6].sum()))
        own = (tokens[s] * (1.0 if weights is None else weights[s].double()))[scored[s]]
        want.append(own[:near].sum() + (1.0 if alpha is None else alpha) * own[near:].sum())
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=0)
    c = torch.randn(6, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((c * got).sum(), example.trained),
        torch.autograd.grad((c * torch.stack(want)).sum(), example.trained),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_fused_logps_of_an_odd_number_of_sequences() -> None:
    example = batch(3, dtype=torch.float64)
    got = fused_logps(example.hidden[:5], example.weight, example.labels[:5])
    torch.testing.assert_close(got, token_logps(example).sum(1)[:5], rtol=1e-12, atol=0)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_loss_written_with_fused_logps_is_the_fused_loss(trained: bool) -> None:
    example = batch(3, dtype=torch.float64, trained=trained)
    ratios = fused_logps(*example.inputs, example.labels) - example.ref_logps
    chosen, rejected = ratios.chunk(2)
    z = 0.3 * (chosen - rejected - 50.0 * torch.relu(-chosen))
    loss = -torch.nn.functional.logsigmoid(z).mean()
    out = fused(example, "dpop")
    torch.testing.assert_close(loss, out.loss, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(loss, example.trained),
        torch.autograd.grad(out.loss, example.trained),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
