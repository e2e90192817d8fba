"""What a training loop on a GPU expects beside numbers: graphs, compilation, no waiting for the
host, and memory within the workspace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fastdpop import fused_dpop_loss, fused_logps
from fastdpop.engines import Engine, Problem
from tests.batches import (
    LOSSES,
    Batch,
    assert_as_exact_as_torch,
    batch,
    fused,
    losses_by_definition,
)
from tests.gpu.problems import (
    CHUNKS,
    INTERPRETED,
    SOFTCAP,
    TRAINED,
    assert_same,
    coefficients,
    one_pass,
    problem,
    with_inputs_of,
)


def on(device: torch.device, example: Batch) -> Batch:
    """The same numbers there, as new leaves."""

    def leaf(t: torch.Tensor) -> torch.Tensor:
        return t.detach().to(device).requires_grad_(t.requires_grad)

    return Batch(
        leaf(example.hidden),
        leaf(example.weight),
        None if example.bias is None else leaf(example.bias),
        example.labels.to(device),
        example.ref_logps.to(device),
    )


def assert_loss_by_definition(
    example: Batch, name: str, device: torch.device, **options: object
) -> None:
    """Loss and gradients there against float64 on the CPU, within four times the error of PyTorch's
    float32, give or take what DPOP makes of the last bit of a log-prob of 50 nats: 15 times that.
    """
    slack = 15 * 50 * torch.finfo(torch.float32).eps / 4
    there = on(device, example)
    ours = fused(there, LOSSES[name], **options).loss
    found = torch.autograd.grad(ours, there.trained)
    wide, single = example.to(torch.float64), example.to(torch.float32)
    exact = losses_by_definition(wide, LOSSES[name]).mean()
    theirs = losses_by_definition(single, LOSSES[name], plain=True).mean()
    assert_as_exact_as_torch(
        ours.detach().cpu(), exact.detach(), theirs.detach(), factor=4.0, slack=slack
    )
    for own, want, torchs in zip(
        found,
        torch.autograd.grad(exact, wide.trained),
        torch.autograd.grad(theirs, single.trained),
        strict=True,
    ):
        assert_as_exact_as_torch(own.cpu(), want, torchs, factor=4.0, slack=slack)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(device: torch.device, engine: Engine, name: str, trained: bool) -> None:
    if INTERPRETED and name not in ("dpop", "wpo", "kto"):
        pytest.skip("all losses take the interpreter minutes")
    example = batch(4, length=12, width=48, vocabulary=75, bias=True, trained=trained)
    assert_loss_by_definition(example, name, device, engine=engine.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(device: torch.device, engine: Engine, dtype: torch.dtype) -> None:
    example = batch(3, length=10, width=64, vocabulary=80, dtype=dtype)
    assert_loss_by_definition(example, "dpop", device, engine=engine.name)


def test_autocast(chip: torch.device, engine: Engine) -> None:
    """float32 leaves, 16-bit products: as exact as the rounded numbers allow."""
    example = on(chip, batch(3, length=10, width=64, vocabulary=80))
    rounded = example.to(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        got = fused(example, "dpop", engine=engine.name)
    want = fused(rounded, "dpop", engine=engine.name)
    assert torch.equal(got.chosen_logps, want.chosen_logps)
    got.loss.backward()
    assert example.hidden.grad is not None
    assert example.hidden.grad.dtype == torch.float32


def test_auto_is_triton(chip: torch.device, triton_engine: Engine) -> None:
    example = on(chip, batch(3, length=10, width=64, vocabulary=80, dtype=torch.bfloat16))
    auto = fused(example, "dpop").loss
    assert torch.equal(auto, fused(example, "dpop", engine=triton_engine.name).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_policy_equal_to_its_reference(
    device: torch.device, either: Engine, dtype: torch.dtype, softcap: float | None
) -> None:
    """has log-ratios of exactly 0, by every route: without gradients and with them, in one chunk,
    in several, and beyond the workspace, for a frozen head and a trained one.
    """
    length, vocabulary = (10, 70) if device.type == "cpu" else (40, 700)
    example = batch(4, length=length, width=64, vocabulary=vocabulary, dtype=dtype)
    here = on(device, example)
    args = here.hidden, here.weight, here.labels
    options = {"softcap": softcap, "engine": either.name}
    with torch.no_grad():
        ref = fused_logps(*args, **options)
    assert ref.isfinite().all()
    for trained in (True, False):
        here.weight.requires_grad_(trained)
        for workspace in (1 << 26, 3 * length * (2 * vocabulary + 800)):
            sized = options | {"workspace_bytes": workspace}
            out = fused_dpop_loss(*args, ref_logps=ref, beta=0.3, lam=50.0, **sized)
            assert torch.equal(out.chosen_logps, ref[:4])
            assert torch.equal(out.rejected_logps, ref[4:])
            assert torch.equal(fused_logps(*args, **sized), ref)


def sized(chip: torch.device, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Two chunks, and a group beyond the workspace."""
    return problem(chip, dtype, rows=700, vocabulary=5_000, head=SOFTCAP, workspace=CHUNKS)


def every_call(engine: Engine, p: Problem) -> list[Callable[[], object]]:
    c = coefficients(p)
    lse = engine.logps(p, ()).lse
    small = dataclasses.replace(p, workspace_bytes=p.workspace_bytes // 20)
    return [
        lambda: engine.logps(p, ()),
        lambda: engine.logps_and_dlogp_dhidden(p, ()),
        lambda: engine.gradients(p, lse, c, TRAINED),
        lambda: one_pass(engine, p, c, TRAINED),
        lambda: one_pass(engine, small, c, TRAINED),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_host_never_waits(chip: torch.device, either: Engine, dtype: torch.dtype) -> None:
    calls = every_call(either, sized(chip, dtype))
    for call in calls:
        call()  # compiles, loads modules
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cuda_graph(chip: torch.device, either: Engine, dtype: torch.dtype) -> None:
    """Once rows are laid out, a step is a fixed sequence of launches: replayed on other numbers it
    gives what a plain call gives.
    """
    p = sized(chip, dtype)
    c = coefficients(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            one_pass(either, p, c, TRAINED)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one_pass(either, p, c, TRAINED)
    hidden, targets = p.hidden.flip(0).contiguous(), p.targets.flip(0).contiguous()
    want = one_pass(either, with_inputs_of(p, hidden, targets), c, TRAINED)
    p.hidden.copy_(hidden)
    p.targets.copy_(targets)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_stream_of_its_own(chip: torch.device, either: Engine, dtype: torch.dtype) -> None:
    """Launches go to the current stream, where the numbers that they read are made."""
    p = sized(chip, dtype)
    c = coefficients(p)
    want = one_pass(either, p, c, TRAINED)
    other = with_inputs_of(p, torch.zeros_like(p.hidden), p.targets)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # It is busy for a while before the hidden states are there.
        slow = torch.ones(1 << 26 if chip.type == "cuda" else 8, device=chip)
        for _ in range(50):
            slow.mul_(1.0)
        other.hidden.copy_(p.hidden)
        got = one_pass(either, other, c, TRAINED)
    torch.cuda.synchronize()
    assert_same(got, want)


@pytest.mark.takes(10.0)
@pytest.mark.unpoisoned  # the compiler would trace it
@pytest.mark.parametrize("name", ["dpop", "kto"])
def test_compile(chip: torch.device, triton_engine: Engine, name: str) -> None:
    torch._dynamo.reset()
    example = on(chip, batch(4, length=12, width=64, vocabulary=90, dtype=torch.bfloat16))

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        now = Batch(hidden, weight, None, example.labels, example.ref_logps)
        return fused(now, LOSSES[name], engine=triton_engine.name).loss

    plain = step(example.hidden, example.weight)
    if chip.type == "cpu":
        return
    compiled = torch.compile(step, fullgraph=True)(example.hidden, example.weight)
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(compiled, example.trained),
        torch.autograd.grad(plain, example.trained),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


def test_a_second_gpu(chip: torch.device, either: Engine) -> None:
    """The kernels run where the tensors are, whatever device is current."""
    if chip.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = chip if chip.type == "cpu" else torch.device("cuda", 1)
    example = batch(4, length=12, width=64, vocabulary=90, dtype=torch.bfloat16)

    def gradients(device: torch.device) -> list[torch.Tensor]:
        here = on(device, example)
        out = fused(here, "dpop", engine=either.name)
        found = torch.autograd.grad(out.loss, here.trained)
        return [one.cpu() for one in (out.loss.detach(), *found)]

    assert_same(gradients(there), gradients(chip))


@pytest.mark.takes(3.0)
@pytest.mark.parametrize("mebi", [512, 96])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_memory(chip: torch.device, any_engine: Engine, trained: bool, mebi: int) -> None:
    """The peak beyond the inputs: the workspace, the rows' copies and gradients; not the 2 GiB that
    logits would take in 16 bits. In 512 MiB a pair fits, in 96 it does not.
    """
    pairs, length, width, vocabulary = 4, 1_024, 1_024, 128_256
    if chip.type == "cpu":
        length, width, vocabulary, mebi = 8, 64, 1_000, 1
    hidden = torch.randn(2 * pairs, length, width, device=chip, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, width, device=chip, dtype=torch.bfloat16) * 0.03
    labels = torch.randint(vocabulary, (2 * pairs, length), device=chip)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    ref = torch.zeros(2 * pairs, device=chip)

    def step() -> None:
        hidden.grad = weight.grad = None
        out = fused_dpop_loss(
            hidden,
            weight,
            labels,
            ref_logps=ref,
            beta=0.3,
            lam=50.0,
            engine=any_engine.name,
            workspace_bytes=mebi << 20,
        )
        out.loss.backward()

    step()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    rows = 2 * pairs * length
    of_rows = rows * width * (2 + 4 + 2 + 2 + 2)  # copies, dHidden twice, scaled rows, .grad
    of_weight = vocabulary * width * (4 + 2 + 2) if trained else 0
    assert peak <= (mebi << 20) + of_rows + of_weight + (32 << 20)
    assert peak - of_rows - of_weight < rows * vocabulary  # half of the logits
