"""Attention over a tree on a GPU, by FlashAttention and FlexAttention, against plain arithmetic in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdpop.prefix import flex, varlen
from fastdpop.prefix.chunks import Problem
from tests.prefix.attending import attending, gradients, sequences

SHAPES: dict[str, dict[str, Any]] = {
    "as many heads": {"heads": (4, 4), "sizes": (64, 64)},
    "groups of heads": {"heads": (8, 2), "sizes": (128, 128)},
    "window": {"heads": (8, 2), "sizes": (64, 64), "window": 60},
    "softcap": {"heads": (4, 2), "sizes": (128, 128), "softcap": 20.0},
    "sinks": {"heads": (8, 2), "sizes": (64, 64), "window": 128, "sinks": True},
    "other sizes": {"heads": (4, 2), "sizes": (80, 48)},
}
TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@pytest.mark.takes(12.0)
@pytest.mark.unpoisoned
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_as_plain(name: str, dtype: torch.dtype, chip: torch.device) -> None:
    if chip.type != "cuda":
        return  # recorded: it launches none of our kernels
    problem = attending(sequences(12, 300), dtype=dtype, **SHAPES[name])
    for field in ("query", "key", "value", "sinks"):
        tensor = getattr(problem, field)
        if tensor is not None:
            setattr(problem, field, tensor.detach().to(chip).requires_grad_())
    given = Problem(problem.query, problem.key, problem.value, None, 1.0, problem.softcap)
    assert varlen.supports(given) is (dtype == torch.bfloat16 and problem.softcap is None)
    assert flex.supports(given)
    exact = problem.in_float64()
    want = exact.shared("plain")
    dout = torch.randn_like(want).to(dtype)
    wanted = [want, *gradients(exact, want, dout.double())]
    for how in (
        "auto",
        "masked",
    ):  # the second is FlexAttention, which must not fall back: that warns
        out = problem.shared(how)
        with torch.no_grad():
            assert torch.equal(problem.shared(how), out)
        for ours, theirs in zip([out, *gradients(problem, out, dout)], wanted, strict=True):
            assert (ours.double() - theirs).norm() <= TOLERANCES[dtype] * theirs.norm()
    with torch.no_grad():
        assert flex.attention(given._replace(scale=problem.scale), problem.table) is not None
