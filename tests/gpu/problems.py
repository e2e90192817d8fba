"""Problems on a device, what float64 makes of them there, and how exact a result must be."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpop import naive
from fastdpop.engines import Engine, GroupLoss, NeedsGrad, Problem
from fastdpop.transform import LogitTransform

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

ALL = NeedsGrad(True, True, True)
TRAINED = NeedsGrad(True, True, False)

PLAIN = LogitTransform()
SOFTCAP = LogitTransform(softcap=2.0, logit_scale=1.5, temperature=0.7)
SCALED = LogitTransform(logit_scale=0.25, temperature=0.6)

KEEP, CHUNKS, RECOMPUTE = 4.0, 0.45, 0.15
"""Workspaces, as parts of what all rows take: enough for everything; so little that of three groups
the first two go through one after the other, and the third is computed twice; and less.
"""
WORKSPACES = {"chunks": CHUNKS}
if not INTERPRETED:
    WORKSPACES |= {"kept": KEEP, "recomputed": RECOMPUTE}

Multiply = Callable[[Tensor, Tensor], Tensor]


def problem(
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int = 300,
    width: int = 512,
    vocabulary: int = 3_001,
    pieces: int = 3,
    head: LogitTransform = PLAIN,
    bias: bool = False,
    workspace: float = KEEP,
) -> Problem:
    """Rows in groups of unequal length, logits of a spread of about 4, and a workspace that is a
    part of what they take. On CPUs some twentieth of the size.
    """
    if device.type == "cpu":
        rows, width, vocabulary = max(rows // 16, min(rows, 3)), width // 16, vocabulary // 40
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # Of a row: logits, partial sums, hidden states and products.
    row = vocabulary * dtype.itemsize + vocabulary // 2 + 12 * width + 64
    return Problem(
        hidden=randn(rows, width).to(dtype),
        weight=randn(vocabulary, width).mul_(4.0 * width**-0.5).to(dtype),
        bias=randn(vocabulary).to(dtype) if bias else None,
        targets=torch.randint(vocabulary, (rows,), generator=generator, device=device),
        groups=[0, *(rows * (i + 1) ** 2 // pieces**2 for i in range(pieces))],
        transform=head,
        compute_dtype=dtype,
        workspace_bytes=int(workspace * rows * row),
    )


def coefficients(p: Problem) -> Tensor:
    """``(N,)`` one per row, of both signs, a few of them 0."""
    c = torch.linspace(-1.0, 1.0, len(p.targets), device=p.hidden.device, dtype=p.result_dtype)
    c[::7] = 0.0
    return c


def one_pass(engine: Engine, p: Problem, c: Tensor, wanted: NeedsGrad) -> list[Tensor]:
    """Log-probs and the wanted gradients."""
    result = engine.logps_and_gradients(
        p, (), GroupLoss(lambda first, last, *_: c[p.groups[first] : p.groups[last]]), wanted
    )
    found = result.gradients
    return [result.logps, *(g for g in found if g is not None)]


def two_passes(engine: Engine, p: Problem, c: Tensor, wanted: NeedsGrad) -> list[Tensor]:
    """The same with coefficients that are known before the gradients."""
    result = engine.logps(p, ())
    found = engine.gradients(p, result.lse, c, wanted)
    return [result.logps, *(g for g in found if g is not None)]


def _in_order(a: Tensor, b: Tensor) -> Tensor:
    """float32 products added up one after the other, as a kernel without tensor cores may."""
    total = a.new_zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        total.addr_(a[:, k], b[k])
    return total


def _on_tensor_cores(dtype: torch.dtype) -> Multiply:
    """cuBLAS's product of 16-bit operands with a float32 result. Tensor cores cut what does not fit
    their accumulator instead of rounding it; nobody who uses them can be more exact.
    """
    return lambda a, b: torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)


def multiplications(p: Problem) -> Iterator[Multiply]:
    """The ways to multiply that a result is compared with."""
    yield lambda a, b: a.float() @ b.float()
    if p.compute_dtype == torch.float32:
        yield lambda a, b: _in_order(a.float(), b.float())
    elif p.hidden.device.type == "cuda":
        yield _on_tensor_cores(p.compute_dtype)


def by_torch(p: Problem, c: Tensor, multiply: Multiply) -> tuple[Tensor, list[list[Tensor]]]:
    """Log-probs, and gradients of ``sum(c * logps)``, by plain products of operands that are
    rounded once: dWeight with the coefficients on the logits' side or on that of the hidden states.
    """
    u = multiply(p.hidden, p.weight.T) + (0.0 if p.bias is None else p.bias.float())
    z = p.transform.transform_(u)
    logps = -F.cross_entropy(z, p.targets, reduction="none")
    g = torch.zeros_like(z).scatter_(1, p.targets[:, None], 1.0) - z.softmax(1)
    dtype, c = p.compute_dtype, c[:, None].float()
    direction = p.transform.scale_by_slope_(g.clone(), z).to(dtype)
    scaled = p.transform.scale_by_slope_(g * c, z).to(dtype)
    of_bias = [] if p.bias is None else [(direction.float() * c).sum(0)]
    hidden = multiply(direction, p.weight) * c
    one = multiply(direction.T, (p.hidden.float() * c).to(dtype))
    other = multiply(scaled.T, p.hidden)
    return logps, [[hidden, one, *of_bias], [hidden, other, *of_bias]]


def exactly(p: Problem, c: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The same in float64, by the definition and autograd."""
    leaves = [t.double().requires_grad_() for t in (p.hidden, p.weight, p.bias) if t is not None]
    hidden, weight, *bias = leaves
    logps = naive.token_logps(hidden, weight, p.targets, bias[0] if bias else None, p.transform)
    return logps.detach(), list(torch.autograd.grad((c.double() * logps).sum(), leaves))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max())


def assert_bounded(
    got: Tensor,
    exact: Tensor,
    theirs: list[Tensor],
    *,
    factor: float,
    roundings: float = 0.0,
    of: torch.dtype = torch.float32,
) -> None:
    """Our largest error is at most `factor` times the largest of theirs, give or take some last
    bits of the largest value, and some roundings of it to a dtype.
    """
    assert got.isfinite().all()
    kind = torch.finfo(got.dtype)
    last_bits = max(4.0 * torch.finfo(torch.float32).eps, roundings * torch.finfo(of).eps / 2)
    few = last_bits * float(exact.abs().max()) + kind.eps * kind.smallest_normal
    allowed = factor * max(error(one, exact) for one in theirs) + few
    assert error(got, exact) <= allowed, (error(got, exact), allowed)


def assert_log_probs(got: Tensor, exact: Tensor) -> None:
    """1e-5 of a log-prob of 4 nats and more; as much as of 4 nats, where it is less."""
    assert got.isfinite().all()
    relative = (got.double() - exact).abs() / exact.abs().clamp_min(4.0)
    assert float(relative.max()) <= 1e-5, float(relative.max())


def assert_exact(engine: Engine, p: Problem) -> None:
    """Every method agrees with float64 as well as PyTorch does with products in float32 or on
    tensor cores, whichever is further off.
    """
    c = coefficients(p)
    exact, gradients = exactly(p, c)
    theirs = [by_torch(p, c, multiply) for multiply in multiplications(p)]
    log_probs = [one for one, _ in theirs]
    of_torch = [list(each) for each in zip(*(g for _, both in theirs for g in both), strict=True)]
    wanted = NeedsGrad(True, True, p.bias is not None)

    alone = engine.logps(p, ())
    # Where tensor cores cut, it counts in how many steps a product is added up: cuBLAS's kernel for such a width
    # has other steps than ours.
    cut = p.hidden.device.type == "cuda" and p.compute_dtype == torch.float16
    assert_bounded(alone.logps, exact, log_probs, factor=3.0 if cut else 2.0)
    assert_log_probs(alone.logps, exact)
    logps = engine.logps_and_dlogp_dhidden(p, ())
    direction = logps.dlogp_dhidden
    assert torch.equal(logps.logps, alone.logps), "every route gives the same bits"
    # One more rounding than theirs: of the direction to the dtype of the hidden states; and of a
    # row's largest entry, that of its target, to the dtype of the products, which theirs are spared
    # where it is 1.
    scaled = direction.to(p.result_dtype) * c[:, None]
    assert_bounded(scaled, gradients[0], of_torch[0], factor=2.0, roundings=2.0, of=p.compute_dtype)
    for route in (one_pass, two_passes):
        together, *found = route(engine, p, c, wanted)
        assert torch.equal(together, alone.logps)
        for ours, want, each in zip(found, gradients, of_torch, strict=True):
            assert_bounded(ours, want, each, factor=2.0, roundings=1.0, of=p.compute_dtype)


def exact_by_chunks(p: Problem, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, dHidden and dWeight in float64, 512 rows at a time, where all logits at once would
    not fit; of a plain head.
    """
    assert p.transform == LogitTransform()
    assert p.bias is None
    logps, hidden_gradient = [], []
    weight = p.weight.double()
    weight_gradient = torch.zeros_like(weight)
    for rows in torch.arange(len(p.targets), device=p.targets.device).split(512):
        h, y = p.hidden[rows].double(), p.targets[rows]
        logps.append(naive.token_logps(h, weight, y))
        g = torch.softmax(h @ weight.T, 1).neg_()
        g[torch.arange(len(rows), device=rows.device), y] = 0.0
        # 1 - p from the others: of a p near 1 it keeps all its bits.
        g[torch.arange(len(rows), device=rows.device), y] = -g.sum(1)
        g *= c[rows, None].double()
        hidden_gradient.append(g @ weight)
        weight_gradient += g.T @ h
    return torch.cat(logps), torch.cat(hidden_gradient), weight_gradient


def row_error(got: Tensor, exact: Tensor) -> Tensor:
    """Of each row, relative to its norm."""
    return (got.double() - exact).norm(dim=1) / exact.norm(dim=1)


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    """Bit for bit."""
    for one, two in zip(a, b, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, two)


def with_inputs_of(p: Problem, hidden: Tensor, targets: Tensor) -> Problem:
    """The same problem with other rows."""
    return dataclasses.replace(p, hidden=hidden, targets=targets)
