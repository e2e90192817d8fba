"""The losses that are written for one launch, against the package's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from fastdpop import losses
from fastdpop.kernels import losses as jitted_losses
from fastdpop.losses import PairLogps
from tests.kernels.test_kernels import poisoned

LOSSES = [
    losses.get("dpop"),
    losses.get("dpop", form="outside", lam=15.0, label_smoothing=0.2),
    losses.get("dpop", form="additive", lam=3.0),
    losses.get("dpo", label_smoothing=0.1),
    losses.get("sigmoid_norm", beta=5.0),
    losses.get("ipo"),
    losses.get("ipo", average=False),
    losses.get("hinge"),
    losses.get("robust"),
    losses.get("exo_pair"),
    losses.get("nca_pair"),
    losses.get("sppo_hard"),
    losses.get("apo_zero"),
    losses.get("apo_down"),
]


@triton.jit
def loss_kernel(r_w, r_l, n_w, n_l, out, n0, n1, n2, LOSS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    loss, d_w, d_l = LOSS(
        tl.load(r_w + i), tl.load(r_l + i), tl.load(n_w + i), tl.load(n_l + i), n0, n1, n2
    )
    tl.store(out + i, loss)
    tl.store(out + SIZE + i, d_w)
    tl.store(out + 2 * SIZE + i, d_l)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses_and_their_derivatives_are_those_of_the_package(loss: losses.PreferenceLoss) -> None:
    size = 64
    r = torch.randn(2, size) * torch.logspace(-3, 2, size)
    r[:, 0] = 0.0  # the hinge of DPOP is off there
    r[:, 1] = torch.tensor([-1e-3, 300.0])
    lengths = torch.randint(1, 50, (2, size)).float()
    options = {f.name: getattr(loss, f.name) for f in dataclasses.fields(loss)}  # type: ignore[arg-type]
    found = jitted_losses.jitted(type(loss).__name__, options)
    assert found is not None
    function, numbers = found
    got = poisoned(3, size)
    loss_kernel[(1,)](*r, *lengths, got, *numbers, LOSS=function, SIZE=size)
    wide = r.double().requires_grad_()
    there = torch.ones(size, dtype=torch.bool)
    zero = torch.zeros(size, dtype=torch.float64)
    pairs = PairLogps(
        wide[0], wide[1], *lengths.double(), zero, zero, None, None, there, there, None,
        zero.new_tensor(size), zero.new_tensor(2 * size), lengths[0].double().sum(),
    )  # fmt: skip
    values = loss(pairs)
    (derivatives,) = torch.autograd.grad(values.sum(), wide)
    want = torch.cat([values.detach()[None], derivatives])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_losses_without_a_kernel_have_none() -> None:
    assert jitted_losses.jitted("KTO", {}) is None
    assert jitted_losses.jitted("DPO", {"divergence": "js", "beta": 0.1}) is None
