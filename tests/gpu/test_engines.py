"""The engines on the chip against float64 on the chip."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastdpop.engines import STATISTICS, Engine
from fastdpop.head import Head
from tests.batches import HEADS
from tests.gpu.problems import (
    ALL,
    TRAINED,
    assert_exact,
    assert_same,
    coefficients,
    exact_by_chunks,
    one_pass,
    problem,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_and_gradients(
    device: torch.device, engine: Engine, dtype: torch.dtype, head: str
) -> None:
    assert_exact(engine, problem(device, dtype, head=HEADS[head]))


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [(1, 64, 300), (129, 72, 1_000), (257, 4_096, 8_192), (640, 2_304, 4_097), (90, 577, 2_003)],
)
def test_shapes(
    device: torch.device, engine: Engine, rows: int, width: int, vocabulary: int
) -> None:
    """Beside whole tiles: one row, one too many, and widths that no tensor descriptor takes."""
    p = problem(
        device, torch.bfloat16, rows=rows, width=width, vocabulary=vocabulary, pieces=1, bias=False
    )
    assert_exact(engine, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_beyond_the_workspace(
    device: torch.device, engine: Engine, dtype: torch.dtype
) -> None:
    p = problem(device, dtype, pieces=1)
    logits = len(p.targets) * len(p.weight) * dtype.itemsize
    assert_exact(engine, dataclasses.replace(p, workspace_bytes=logits // 3))


def test_statistics(device: torch.device, engine: Engine) -> None:
    p = problem(device, torch.bfloat16, head=HEADS["all"])
    exact = dataclasses.replace(
        p,
        hidden=p.hidden.double(),
        weight=p.weight.double(),
        bias=None if p.bias is None else p.bias.double(),
    )
    assert exact.bias is not None
    z = p.head.transform_(exact.hidden @ exact.weight.T + exact.bias)
    logp = z.log_softmax(1)
    want = {
        "entropy": -(logp.exp() * logp).sum(1),
        "mean_logits": z.mean(1),
        "aligned_logps": logp.gather(1, p.targets[:, None])[:, 0] - (2 * logp).logsumexp(1),
    }
    found = dict(zip(STATISTICS, engine.logps(p, STATISTICS).statistics, strict=True))
    for name, line in want.items():
        torch.testing.assert_close(found[name].double(), line, rtol=2e-5, atol=1e-5, msg=name)
    likeliest = dataclasses.replace(p, targets=z.argmax(1))
    assert engine.logps(likeliest, ("token_accuracy",)).statistics.mean() > 0.98
    least = dataclasses.replace(p, targets=z.argmin(1))
    assert engine.logps(least, ("token_accuracy",)).statistics.sum() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_runs_are_bitwise_equal(
    device: torch.device, engine: Engine, dtype: torch.dtype
) -> None:
    """While other work keeps the chip busy in between, too."""
    p = problem(device, dtype, rows=1_000, workspace=1 << 22)
    c = coefficients(p)
    first = one_pass(engine, p, c, ALL)
    for _ in range(3):
        torch.randn(1_000_000, device=device).sort()
        assert_same(first, one_pass(engine, p, c, ALL))


def test_near_certainty_keeps_its_gradient(device: torch.device, triton_engine: Engine) -> None:
    """1 - p of a token with p = 0.9999 must not drown in the rounding of p to bfloat16."""
    p = problem(device, torch.bfloat16, rows=200, bias=False, pieces=1)
    # A weight row has a norm near 4; this puts all other tokens together at about 1e-4.
    p.hidden.copy_(p.weight[p.targets] * (math.log(len(p.weight) * 1e4) / 16))
    exact, direction, _ = exact_by_chunks(p, torch.ones(len(p.targets), device=device))
    assert exact.median() > -0.01
    own = triton_engine.logps_and_direction(p, ())[1].double()
    error = (own - direction).norm(dim=1) / direction.norm(dim=1)
    assert error.median() < 0.02
    assert error.max() < 0.1  # float32 logits of size 20 leave 1 - p = 1e-5 that much


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_logits_than_32_bits_count(
    chip: torch.device, triton_engine: Engine, dtype: torch.dtype
) -> None:
    """N * V > 2**31, kept at once: an offset in 32 bits would wrap around."""
    rows, vocabulary = 8_320, 262_147
    assert rows * vocabulary > 2**31
    p = problem(
        chip,
        dtype,
        rows=rows,
        width=64,
        vocabulary=vocabulary,
        pieces=1,
        bias=False,
        workspace=12 << 30,
    )
    c = coefficients(p)
    exact, hidden_gradient, weight_gradient = exact_by_chunks(p, c)
    logps, hidden, weight = one_pass(triton_engine, p, c, TRAINED)
    torch.testing.assert_close(logps.double(), exact, rtol=2e-6, atol=1e-5)
    bound = 2.0**-7 if dtype == torch.bfloat16 else 1e-4
    for ours, want in ((hidden, hidden_gradient), (weight, weight_gradient)):
        assert ((ours.double() - want).norm() / want.norm()).item() < bound
        # Every row by itself: one block in the wrong place would drown in the norm of all.
        scale = want.norm(dim=1).clamp_min(1e-3 * float(want.norm(dim=1).max()))
        assert ((ours.double() - want).norm(dim=1) / scale).max().item() < 8 * bound


@pytest.mark.parametrize("head", [Head(), Head(softcap=30.0)], ids=["plain", "softcap"])
def test_full_size(chip: torch.device, triton_engine: Engine, head: Head) -> None:
    """Llama-3-8B's head, 2,048 rows: log-probs within 1e-5 of float64."""
    p = problem(
        chip,
        torch.bfloat16,
        rows=2_048,
        width=4_096,
        vocabulary=128_256,
        pieces=4,
        bias=False,
        head=head,
        workspace=1 << 30,
    )
    ours = triton_engine.logps(p, ()).logps
    weight = p.weight.double()
    for rows in torch.arange(2_048, device=chip).split(512):
        z = head.transform_(p.hidden[rows].double() @ weight.T)
        exact = z.log_softmax(1).gather(1, p.targets[rows, None])[:, 0]
        torch.testing.assert_close(ours[rows].double(), exact, rtol=1e-5, atol=2e-5)


def test_views_that_descriptors_do_not_take(device: torch.device, engine: Engine) -> None:
    """Slices of wider tensors: unaligned bases and odd strides."""
    p = problem(device, torch.bfloat16, bias=False)
    want = engine.logps_and_direction(p, ())
    count, width = p.weight.shape
    for offset, extra in ((1, 3), (8, 8), (0, 1)):
        wide = p.weight.new_full((count, width + offset + extra), torch.nan)
        view = wide[:, offset : offset + width]
        view.copy_(p.weight)
        got = engine.logps_and_direction(dataclasses.replace(p, weight=view), ())
        torch.testing.assert_close(got[0].logps, want[0].logps, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(got[1], want[1], rtol=2e-2, atol=2e-2)
