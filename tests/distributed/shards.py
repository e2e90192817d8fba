"""A problem of a whole vocabulary, a process's shard of it, and what the shards owe together."""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpop.distributed import Group, collectives
from fastdpop.distributed.vocabulary import VocabularyParallel
from fastdpop.engines import STATISTICS, Engine, GroupLoss, NeedsGrad, Problem, RowValues
from fastdpop.engines.cpu import CPUEngine
from fastdpop.engines.eager import EagerEngine
from fastdpop.engines.triton import TritonEngine
from fastdpop.transform import LogitTransform

ENGINES: dict[str, Engine] = {"eager": EagerEngine(), "cpu": CPUEngine(), "triton": TritonEngine()}
TRAINED = NeedsGrad(True, True, True)
WIDTH = 24


def problem(
    vocabulary: int = 517,
    dtype: torch.dtype = torch.float32,
    *,
    groups: tuple[int, ...] = (0, 9, 9, 21, 30, 43),
    head: LogitTransform | None = None,
    bias: bool = False,
    workspace: int = 1 << 22,
    scale: float = 1.0,
) -> Problem:
    """The same in every process, which all have the same seed."""
    rows = groups[-1]
    return Problem(
        hidden=(torch.randn(rows, WIDTH) * scale).to(dtype),
        weight=(torch.randn(vocabulary, WIDTH) * 0.3).to(dtype),
        bias=torch.randn(vocabulary).to(dtype) if bias else None,
        targets=torch.randint(0, vocabulary, (rows,)),
        groups=list(groups),
        transform=head or LogitTransform(),
        compute_dtype=dtype,
        workspace_bytes=workspace,
    )


def world() -> Group:
    group = Group.of("group", dist.group.WORLD)
    assert group is not None
    return group


def shard(p: Problem, sizes: tuple[int, ...], name: str) -> tuple[VocabularyParallel, Problem]:
    """The engine and the problem of this process, and which tokens are its own."""
    group = world()
    own = tokens(sizes)
    part = dataclasses.replace(
        p, weight=p.weight[own], bias=None if p.bias is None else p.bias[own]
    )
    return VocabularyParallel(ENGINES[name], group, own.start, sum(sizes)), part


def tokens(sizes: tuple[int, ...]) -> slice:
    """Of this process."""
    bounds = [0, *itertools.accumulate(sizes)]
    return slice(*bounds[dist.get_rank() :][:2])


def coefficients(p: Problem) -> Tensor:
    """Some of them 0."""
    c = torch.randn(len(p.targets), dtype=torch.float64)
    c[::5] = 0.0
    return c


def loss(p: Problem, c: Tensor) -> GroupLoss:
    """A loss whose derivatives depend on the log-probs."""

    def dlogp(first: int, last: int, values: RowValues) -> Tensor:
        rows = slice(p.groups[first], p.groups[last])
        return c[rows] * (1.0 + values.logps.double().sigmoid())

    return GroupLoss(dlogp)


def same_everywhere(tensor: Tensor) -> None:
    """Of the same bits in every process."""
    group = world()
    every = collectives.concatenated(tensor[None], [1] * group.size, group)
    assert all(torch.equal(one, tensor) for one in every)


@dataclasses.dataclass
class Whole:
    """What one process has to say of the whole vocabulary, exactly (float64) or in an engine."""

    logps: Tensor
    statistics: Tensor
    direction: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(p: Problem, c: Tensor, engine: Engine) -> Whole:
        """By an engine."""
        found = engine.logps_and_gradients(p, STATISTICS, loss(p, c), wanted(p))
        g = found.gradients
        direction = engine.logps_and_dlogp_dhidden(p, ()).dlogp_dhidden
        assert direction is not None
        assert g.hidden is not None
        assert g.weight is not None
        return Whole(found.logps, found.statistics, direction, g.hidden, g.weight, g.bias)

    @staticmethod
    def exact(p: Problem, c: Tensor) -> Whole:
        """By plain torch in float64."""
        wide = dataclasses.replace(
            p,
            hidden=p.hidden.double(),
            weight=p.weight.double(),
            bias=None if p.bias is None else p.bias.double(),
            compute_dtype=torch.float64,
            workspace_bytes=1 << 30,
        )
        return Whole.of(wide, c, ENGINES["eager"])


def wanted(p: Problem) -> NeedsGrad:
    return NeedsGrad(True, True, p.bias is not None)


def shards(p: Problem, c: Tensor, sizes: tuple[int, ...], name: str) -> list[Whole]:
    """The same by all processes together, gradients once in one pass and once by themselves; of
    weight and bias, this process's rows.
    """
    engine, part = shard(p, sizes, name)
    group = engine.group
    alone = engine.logps(part, STATISTICS)
    frozen = engine.logps_and_dlogp_dhidden(part, STATISTICS)
    trained = engine.logps_and_gradients(part, STATISTICS, loss(p, c), wanted(p))
    for found in (alone, frozen, trained):
        same_everywhere(found.logps)
        assert torch.equal(found.logps, alone.logps), "the same bits on every route"
        assert torch.equal(found.lse, alone.lse)
        assert torch.equal(found.statistics, alone.statistics)
    same_everywhere(alone.statistics)
    assert torch.equal(engine.logps(part, ()).logps, alone.logps)
    dlogp = loss(p, c).dlogp(0, len(p.groups) - 1, RowValues(*[alone.logps] * 3))
    later = engine.gradients(part, alone.lse, dlogp.to(p.result_dtype), wanted(p))
    direction = frozen.dlogp_dhidden
    assert direction is not None
    assert direction.dtype == p.hidden.dtype
    results = []
    for g in (trained.gradients, later):
        assert g.hidden is not None
        assert g.weight is not None
        assert g.weight.shape == part.weight.shape
        assert {t.dtype for t in g if t is not None} == {p.result_dtype}
        hidden = collectives.sum_(g.hidden.clone(), group)
        whole = collectives.sum_(direction.clone(), group)
        results.append(Whole(alone.logps, alone.statistics, whole, hidden, g.weight, g.bias))
    return results


def errors(found: Whole, exact: Whole, own: slice) -> dict[str, float]:
    """The largest error of each, relative to its largest value."""
    pairs = {
        "logps": (found.logps, exact.logps),
        "direction": (found.direction, exact.direction),
        "hidden": (found.hidden, exact.hidden),
        "weight": (found.weight, exact.weight),
    }
    if found.bias is not None and exact.bias is not None:
        pairs["bias"] = found.bias, exact.bias
    for line, want, name in zip(found.statistics, exact.statistics, STATISTICS, strict=True):
        pairs[name] = line, want
    worst = {}
    for name, (got, want) in pairs.items():
        part = want[own] if len(got) != len(want) and name in ("weight", "bias") else want
        assert got.isfinite().all(), f"{name} is not finite"
        largest = float(want.abs().max()) or 1.0
        off = (got.double() - part.double()).abs()
        worst[name] = float(off.max()) / largest if off.numel() else 0.0
    return worst


def compare(p: Problem, sizes: tuple[int, ...], name: str, bound: float) -> None:
    """Every number and every gradient of this process, against one process with all of it.

    In 16 bits the bound is what one process's engine is off by, twice; d logp / d hidden is rounded
    in each process, and in the sum of them.
    """
    torch.manual_seed(1)
    c = coefficients(p)
    exact, own = Whole.exact(p, c), tokens(sizes)
    limits = dict.fromkeys(("logps", "direction", "hidden", "weight", "bias", *STATISTICS), bound)
    if p.compute_dtype in (torch.bfloat16, torch.float16):
        whole = slice(None)
        single = errors(Whole.of(p, c, ENGINES[name]), exact, whole)
        limits = {key: 2 * off + bound for key, off in single.items()}
        limits["direction"] *= 2
    for found in shards(p, c, sizes, name):
        worst = errors(found, exact, own)
        wrong = {k: (off, limits[k]) for k, off in worst.items() if not off <= limits[k]}
        assert not wrong, f"{name}, {sizes}, {p.compute_dtype}, {p.transform}: {wrong}"
