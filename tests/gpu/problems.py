"""Problems on a device, and what float64 makes of them there."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastdpop import reference
from fastdpop.engines import Engine, Problem, Wanted
from fastdpop.head import Head
from tests.batches import assert_as_exact_as_torch
from tests.engines.test_conformance import autograd, rounded_gradients

ALL = Wanted(True, True, True)
TRAINED = Wanted(True, True, False)


def problem(
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int = 300,
    width: int = 512,
    vocabulary: int = 3_001,
    pieces: int = 3,
    head: Head | None = None,
    bias: bool = True,
    workspace: int = 1 << 28,
) -> Problem:
    """Rows in a few groups of unequal length, logits of a spread of about 4. On CPUs, the
    interpreter's, a twentieth of the size.
    """
    if device.type == "cpu":
        rows, width, vocabulary = max(rows // 20, 5), max(width // 20, 16), vocabulary // 20
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    bounds = [0, *(rows * (i + 1) ** 2 // pieces**2 for i in range(pieces))]
    return Problem(
        hidden=randn(rows, width).to(dtype),
        weight=(randn(vocabulary, width) * 4.0 * width**-0.5).to(dtype),
        bias=randn(vocabulary).to(dtype) if bias else None,
        targets=torch.randint(vocabulary, (rows,), generator=generator, device=device),
        groups=bounds,
        head=head or Head(),
        compute_dtype=dtype,
        workspace_bytes=workspace,
    )


def coefficients(p: Problem) -> Tensor:
    """``(N,)`` one a row, of both signs, a few of them 0."""
    c = torch.linspace(-1.0, 1.0, len(p.targets), device=p.hidden.device, dtype=p.result_dtype)
    c[::7] = 0.0
    return c


def one_pass(engine: Engine, p: Problem, c: Tensor, wanted: Wanted) -> list[Tensor]:
    """Log-probs and the wanted gradients, all NaN where nothing is written."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    result, found = engine.logps_and_gradients(
        p, (), lambda first, last, *_: c[p.groups[first] : p.groups[last]], wanted
    )
    return [result.logps, *(g for g in found if g is not None)]


def assert_exact(engine: Engine, p: Problem) -> None:
    """Every method agrees with float64 as well as PyTorch does: log-probs as its fp32 log-softmax,
    gradients of 16-bit inputs as 16-bit products of a softmax that was rounded once.
    """
    c = coefficients(p)
    exact, gradients = autograd(p, c.double(), torch.float64, define=True)
    torchs, torchs_gradients = autograd(p, c.double(), torch.float32)
    if p.compute_dtype in (torch.bfloat16, torch.float16):
        torchs_gradients = rounded_gradients(p, c)
    wanted = Wanted(True, True, p.bias is not None)
    alone = engine.logps(p, ())
    assert_as_exact_as_torch(alone.logps, exact, torchs)
    logps, direction = engine.logps_and_direction(p, ())
    assert torch.equal(logps.logps, alone.logps), "every route gives the same bits"
    scaled = direction.to(p.result_dtype) * c[:, None]
    # One more rounding than the bound's, of the direction to the dtype of the hidden states.
    slack = float(torch.finfo(direction.dtype).eps)
    assert_as_exact_as_torch(scaled, gradients[0], torchs_gradients[0], slack=slack)
    together, *found = one_pass(engine, p, c, wanted)
    assert torch.equal(together, alone.logps)
    again = [g for g in engine.gradients(p, alone.lse, c, wanted) if g is not None]
    for own in (found, again):
        for ours, want, theirs in zip(own, gradients, torchs_gradients, strict=True):
            assert_as_exact_as_torch(ours, want, theirs, factor=3.0)


def exact_by_chunks(p: Problem, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, dHidden and dWeight in float64, 512 rows at a time, where all logits at once would
    not fit; of a plain head.
    """
    assert p.head == Head()
    assert p.bias is None
    logps, hidden_gradient = [], []
    weight = p.weight.double()
    weight_gradient = torch.zeros_like(weight)
    for rows in torch.arange(len(p.targets), device=p.targets.device).split(512):
        h, y = p.hidden[rows].double(), p.targets[rows]
        logps.append(reference.token_logps(h, weight, y))
        g = torch.softmax(h @ weight.T, 1).neg_()
        g[torch.arange(len(rows)), y] += 1.0
        g *= c[rows, None].double()
        hidden_gradient.append(g @ weight)
        weight_gradient += g.T @ h
    return torch.cat(logps), torch.cat(hidden_gradient), weight_gradient


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    """Bit for bit."""
    for one, two in zip(a, b, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, two)


def with_inputs_of(p: Problem, hidden: Tensor, targets: Tensor) -> Problem:
    """The same problem with other rows."""
    return dataclasses.replace(p, hidden=hidden, targets=targets)
