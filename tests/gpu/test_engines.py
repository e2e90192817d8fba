"""The engines on the chip against float64 on the chip."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdpop.engines import STATISTICS, Engine, NeedsGrad, Problem
from fastdpop.transform import LogitTransform
from tests.gpu.conftest import KERNELS
from tests.gpu.problems import (
    ALL,
    CHUNKS,
    INTERPRETED,
    PLAIN,
    SCALED,
    SOFTCAP,
    TRAINED,
    WORKSPACES,
    assert_exact,
    assert_log_probs,
    assert_same,
    coefficients,
    exact_by_chunks,
    exactly,
    one_pass,
    problem,
    row_error,
    two_passes,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# Scales are numbers, not constants: every dtype compiles two heads, bfloat16 the four.
HEADS = {
    "plain": (PLAIN, False),
    "softcap, bias": (SOFTCAP, True),
    "softcap": (dataclasses.replace(SOFTCAP, softcap=5.0), False),
    "scaled, bias": (SCALED, True),
}
ENGINES = {
    torch.bfloat16: ("triton", KERNELS, "eager"),
    torch.float16: ("triton", "eager"),
    torch.float32: ("triton", "eager"),
}
"""By the dtypes in which they differ: only bfloat16 has products by cuBLAS."""
PAIRS = [(name, dtype) for dtype in DTYPES for name in ENGINES[dtype]]
OURS = [(name, dtype) for name, dtype in PAIRS if name != "eager"]
CASES = [
    (name, dtype, head)
    for name, dtype in PAIRS
    for head in (HEADS if dtype == torch.bfloat16 else list(HEADS)[:2])
]


def over(pairs: list[tuple[str, torch.dtype]]) -> pytest.MarkDecorator:
    """Engines and dtypes."""
    return pytest.mark.parametrize(("any_engine", "dtype"), pairs, indirect=["any_engine"], ids=str)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize(("any_engine", "dtype", "head"), CASES, indirect=["any_engine"], ids=str)
def test_log_probs_and_gradients(
    device: torch.device, any_engine: Engine, dtype: torch.dtype, head: str, workspace: str
) -> None:
    transform, bias = HEADS[head]
    assert_exact(
        any_engine,
        problem(device, dtype, head=transform, bias=bias, workspace=WORKSPACES[workspace]),
    )


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [(1, 64, 300), (129, 72, 1_000), (257, 4_096, 8_192), (640, 2_304, 4_097), (90, 577, 2_003)],
)
def test_shapes(
    device: torch.device, any_engine: Engine, rows: int, width: int, vocabulary: int
) -> None:
    """Beside whole tiles: one row, one too many, and widths that no tensor descriptor takes."""
    p = problem(device, torch.bfloat16, rows=rows, width=width, vocabulary=vocabulary, pieces=1)
    assert_exact(any_engine, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_that_descriptors_do_not_take(
    device: torch.device, engine: Engine, dtype: torch.dtype
) -> None:
    """Slices of wider tensors: odd bases and strides, and NaN around them."""
    p = problem(device, dtype, head=SCALED, bias=True, workspace=CHUNKS)
    c = coefficients(p)
    want = one_pass(engine, p, c, ALL)
    assert p.bias is not None

    def view(of: torch.Tensor, offset: int, extra: int) -> torch.Tensor:
        size = of.shape[-1]
        wide = of.new_full((*of.shape[:-1], size + offset + extra), torch.nan)
        own = wide[..., offset : offset + size]
        own.copy_(of)
        return own

    targets = torch.cat([p.targets[:1], p.targets])[1:]
    for offset, extra in ((1, 3), (8, 8), (0, 1)):
        odd = dataclasses.replace(
            p,
            hidden=torch.cat([p.hidden.new_full((offset,), torch.nan), p.hidden.flatten()])[
                offset:
            ].view_as(p.hidden),
            weight=view(p.weight, offset, extra),
            bias=view(p.bias, offset, extra),
            targets=targets,
        )
        got = one_pass(engine, odd, c, ALL)
        if engine.name == "eager":  # its products may take another kernel of cuBLAS
            for one, two in zip(got, want, strict=True):
                torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
        else:
            assert_same(got, want)


@over(OURS)
def test_a_gradient_by_itself_is_the_same(
    device: torch.device, any_engine: Engine, dtype: torch.dtype
) -> None:
    p = problem(device, dtype, head=SOFTCAP, bias=True, workspace=CHUNKS)
    c = coefficients(p)
    for route in (one_pass, two_passes):
        logps, *every = route(any_engine, p, c, ALL)
        for i, gradient in enumerate(every):
            wanted = NeedsGrad(*(i == j for j in range(3)))
            assert_same(route(any_engine, p, c, wanted), [logps, gradient])


@over(OURS)
def test_rows_without_a_coefficient(
    device: torch.device, any_engine: Engine, dtype: torch.dtype
) -> None:
    """are left out: a few, nearly all, whole tiles, all but one, and all."""
    p = problem(device, dtype, workspace=CHUNKS)
    count = len(p.targets)
    for kept in (range(0, count, 9), range(count // 2), range(count - 1, count), range(0)):
        c = torch.zeros(count, device=device)
        c[list(kept)] = 1.0
        logps, hidden, weight = two_passes(any_engine, p, c, TRAINED)
        _, exact = exactly(p, c)
        assert_log_probs(logps, exactly(p, torch.ones_like(c))[0])
        assert not hidden[c == 0].any()
        bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        for ours, want in ((hidden, exact[0]), (weight, exact[1])):
            assert ours.isfinite().all()
            assert (ours.double() - want).norm() <= bound * want.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_every_place(
    device: torch.device, triton_engine: Engine, dtype: torch.dtype
) -> None:
    """Of a tile, a chunk and a batch, with gradients to come or without."""
    p = problem(device, dtype, head=SOFTCAP, bias=True)
    want = triton_engine.logps(p, ()).logps
    order = torch.randperm(len(want), device=device)
    for count in (len(want), len(want) // 2, 1)[INTERPRETED:]:
        own = order[:count]
        some = dataclasses.replace(
            p, hidden=p.hidden[own].contiguous(), targets=p.targets[own], groups=[0, count]
        )
        assert torch.equal(triton_engine.logps(some, ()).logps, want[own])
        assert torch.equal(triton_engine.logps_and_dlogp_dhidden(some, ()).logps, want[own])
        c = coefficients(some)
        small = dataclasses.replace(some, workspace_bytes=count * len(p.weight) // 2)
        assert torch.equal(one_pass(triton_engine, small, c, TRAINED)[0], want[own])


def exact_statistics(p: Problem) -> dict[str, torch.Tensor]:
    u = p.hidden.double() @ p.weight.double().T + (0.0 if p.bias is None else p.bias.double())
    z = p.transform.transform_(u)
    logp = z.log_softmax(1)
    return {
        "entropy": -(logp.exp() * logp).sum(1),
        "mean_logits": z.mean(1),
        "token_accuracy": (z.argmax(1) == p.targets).double(),
        "aligned_logps": logp.gather(1, p.targets[:, None])[:, 0] - (2 * logp).logsumexp(1),
        "max_logit": z.amax(1),
    }


def assert_statistics(found: torch.Tensor, p: Problem) -> None:
    for name, line in zip(STATISTICS, found, strict=True):
        want = exact_statistics(p)[name]
        torch.testing.assert_close(line.double(), want, rtol=5e-5, atol=5e-5, msg=name)


@pytest.mark.parametrize(
    ("dtype", "head"),
    [(torch.bfloat16, "softcap, bias"), (torch.bfloat16, "plain"), (torch.float32, "plain")],
)
def test_statistics(device: torch.device, engine: Engine, dtype: torch.dtype, head: str) -> None:
    transform, bias = HEADS[head]
    p = problem(device, dtype, head=transform, bias=bias)
    likeliest = exact_statistics(p)["mean_logits"].new_zeros(len(p.targets), dtype=torch.int64)
    u = p.hidden.double() @ p.weight.double().T + (0.0 if p.bias is None else p.bias.double())
    torch.argmax(u, 1, out=likeliest)
    half = torch.where(torch.arange(len(likeliest), device=device) % 2 == 0, likeliest, p.targets)
    p = dataclasses.replace(p, targets=half)
    alone = engine.logps(p, STATISTICS)
    assert_statistics(alone.statistics, p)
    assert 0.4 < float(alone.statistics[STATISTICS.index("token_accuracy")].mean()) < 0.7
    kept = engine.logps_and_dlogp_dhidden(p, STATISTICS)
    assert torch.equal(kept.logps, engine.logps(p, ()).logps)
    assert torch.equal(kept.statistics, alone.statistics)


def with_improbable_targets(p: Problem) -> Problem:
    """Every third row ends at another token: its target has a probability of about 1e-60, 1e-30 or
    1e-20. Their sums overflow float32, or pass what the kernels allow, or do not.
    """
    norm = p.weight.float().square().sum(1)
    for i, nats in enumerate((138.0, 69.0, 46.0)):
        rows = torch.arange(3 * i, len(p.targets), 9, device=p.targets.device)
        other = (p.targets[rows] + 1) % len(p.weight)
        slope = p.transform.logit_scale / p.transform.temperature
        p.hidden[rows] = (p.weight[other].float() * (nats / slope / norm[other])[:, None]).to(
            p.hidden.dtype
        )
    return p


@pytest.mark.parametrize("workspace", WORKSPACES)
@over(OURS)
@pytest.mark.parametrize("head", ["plain", "softcap, bias"])
def test_improbable_targets(
    device: torch.device, any_engine: Engine, dtype: torch.dtype, head: str, workspace: str
) -> None:
    transform, bias = HEADS[head]
    # A softcap that leaves room for such log-probs.
    transform = transform if transform.softcap is None else LogitTransform(softcap=300.0)
    p = with_improbable_targets(
        problem(device, dtype, head=transform, bias=bias, workspace=WORKSPACES[workspace])
    )
    exact = exactly(p, coefficients(p))[0]
    assert exact.min() < -100
    assert (exact > -30).sum() > len(exact) // 2
    assert_exact(any_engine, p)


def test_statistics_of_improbable_targets(device: torch.device, triton_engine: Engine) -> None:
    p = with_improbable_targets(problem(device, torch.bfloat16))
    assert_statistics(triton_engine.logps(p, STATISTICS).statistics, p)
    assert_statistics(triton_engine.logps_and_dlogp_dhidden(p, STATISTICS).statistics, p)


@over(OURS)
def test_near_certainty_keeps_its_gradient(
    device: torch.device, any_engine: Engine, dtype: torch.dtype
) -> None:
    """1 - p = 1e-7 is less than the last bit of p in any of these dtypes, and is known to 1%."""
    p = problem(device, dtype, width=2_048)
    width, vocabulary = p.weight.shape[1], len(p.weight)
    # With hidden = a * weight[y], the target's logit t is above the others' logarithm of a sum,
    # log V + t**2 / 2H, by 7 decades.
    above = math.log(vocabulary) + 7 * math.log(10)
    t = width - math.sqrt(width**2 - 2 * width * above)
    p.hidden.copy_(p.weight[p.targets].float() * (t / 16))
    c = torch.ones(len(p.targets), device=device)
    exact, direction, of_weight = exact_by_chunks(p, c)
    assert 1e-8 < -float(exact.median()) < 1e-6
    logps = any_engine.logps_and_dlogp_dhidden(p, ())
    found = logps.dlogp_dhidden
    assert float(((logps.logps.double() - exact) / exact).abs().max()) < 1e-2
    if dtype != torch.float16:  # a direction has the dtype of the hidden states: nothing below 6e-8
        assert float(row_error(found, direction).max()) < 1e-2
    small = dataclasses.replace(p, workspace_bytes=p.workspace_bytes // 20)
    for route, q in ((one_pass, p), (two_passes, p), (one_pass, small)):
        _, hidden, weight = route(any_engine, q, c, TRAINED)
        assert float(row_error(hidden, direction).max()) < 1e-2
        assert float((weight.double() - of_weight).norm() / of_weight.norm()) < 1e-2


@over(PAIRS)
def test_repeated_runs_are_bitwise_equal(
    device: torch.device, any_engine: Engine, dtype: torch.dtype
) -> None:
    """While other work keeps the chip busy in between, too."""
    p = problem(device, dtype, rows=1_000, head=SOFTCAP, bias=True, workspace=CHUNKS)
    c = coefficients(p)
    first = one_pass(any_engine, p, c, ALL)
    for _ in range(1 if INTERPRETED else 5):
        torch.randn(1_000_000 if device.type == "cuda" else 10, device=device).sort()
        assert_same(first, one_pass(any_engine, p, c, ALL))


@pytest.mark.takes(8.0)
def test_a_large_gradient_is_bitwise_equal_20_times(chip: torch.device, either: Engine) -> None:
    """dWeight of Llama 3's head over 8,192 rows: thousands of programs in changing order."""
    p = problem(
        chip, torch.bfloat16, rows=8_192, width=4_096, vocabulary=128_256, pieces=8, workspace=0.6
    )
    c = coefficients(p)
    first = one_pass(either, p, c, TRAINED)
    for _ in range(20):
        assert_same(first, one_pass(either, p, c, TRAINED))


@pytest.mark.takes(6.0)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_logits_than_32_bits_count(
    chip: torch.device, either: Engine, dtype: torch.dtype
) -> None:
    """N * V > 2**31, kept at once: an offset in 32 bits would wrap around."""
    p = problem(chip, dtype, rows=8_320, width=64, vocabulary=262_147, pieces=1)
    assert chip.type == "cpu" or len(p.targets) * len(p.weight) > 2**31
    c = coefficients(p)
    exact, hidden_gradient, weight_gradient = exact_by_chunks(p, c)
    logps, hidden, weight = one_pass(either, p, c, TRAINED)
    assert_log_probs(logps, exact)
    bound = 2.0**-7 if dtype == torch.bfloat16 else 1e-4
    for ours, want in ((hidden, hidden_gradient), (weight, weight_gradient)):
        assert ((ours.double() - want).norm() / want.norm()).item() < bound
        # Every row by itself: one block in the wrong place would drown in the norm of all.
        scale = want.norm(dim=1).clamp_min(1e-3 * float(want.norm(dim=1).max()))
        assert ((ours.double() - want).norm(dim=1) / scale).max().item() < 8 * bound


@pytest.mark.takes(4.0)
@pytest.mark.parametrize("head", [PLAIN, LogitTransform(softcap=30.0)], ids=["plain", "softcap"])
def test_full_size(chip: torch.device, triton_engine: Engine, head: LogitTransform) -> None:
    """Llama-3-8B's head, 2,048 rows: log-probs within 1e-5 of float64."""
    p = problem(
        chip,
        torch.bfloat16,
        rows=2_048,
        width=4_096,
        vocabulary=128_256,
        pieces=4,
        head=head,
    )
    ours = triton_engine.logps(p, ()).logps
    weight = p.weight.double()
    for rows in torch.arange(len(ours), device=chip).split(512):
        z = head.transform_(p.hidden[rows].double() @ weight.T)
        exact = z.log_softmax(1).gather(1, p.targets[rows, None])[:, 0]
        assert_log_probs(ours[rows], exact)


@pytest.mark.takes(25.0)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_forward_product_in_gluon(chip: torch.device, dtype: str) -> None:
    """gives the plain kernel's bits, 20 times, and comes to an end: in a process that can be
    killed, because programs that wait for each other wait forever.
    """
    script = Path(__file__).with_name("gluon_twin.py")
    if chip.type == "cpu":
        from tests.gpu import gluon_twin

        gluon_twin.main(dtype, chip)
        return
    process = subprocess.Popen(
        [sys.executable, str(script), dtype],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        said, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[0]
        pytest.fail(f"it hangs:\n{said[-2_000:]}")
    if process.returncode == 5:
        pytest.skip(said.strip().splitlines()[-1])
    assert process.returncode == 0, said[-4_000:]
