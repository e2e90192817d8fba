"""Each kernel against its twin in plain torch, and the interpreter's traps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpop import losses
from fastdpop.kernels import combine, config, forward, gradients, registry, tiles
from fastdpop.kernels import losses as jitted_losses
from fastdpop.losses import PairLogps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = {
    "plain": forward.Transform(scale=1.4426950408889634, cap=1.0, softcap=False, slope=1.0),
    "softcap": forward.Transform(scale=2.9, cap=0.5, softcap=True, slope=1.3),
}
ROWS, VOCABULARY, WIDTH = 37, 83, 40


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(ROWS, WIDTH).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.3).to(dtype)
    return hidden, weight, torch.randn(VOCABULARY).to(dtype), torch.randint(0, VOCABULARY, (ROWS,))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr, OURS: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    if OURS:
        total = tiles.dot(tl.load(a + at), tl.load(b + at), total)
    else:
        total = tl.dot(tl.load(a + at), tl.load(b + at), total)
    tl.store(out + at, total)


@pytest.mark.parametrize("ours", [True, False])
def test_products_of_bfloat16_are_not_those_of_its_bits(ours: bool) -> None:
    """The interpreter's own product still takes bfloat16 for integers; ours must not."""
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = poisoned(16, 16)
    product_kernel[(1,)](a, b, out, SIZE=16, OURS=ours)
    right = torch.allclose(out.double(), a.double() @ b.double(), atol=1e-4)
    assert right == ours, "if the interpreter has learnt bfloat16, tiles.dot needs no help"


@triton.jit
def narrow_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tiles.narrow(tl.load(x + i), tl.bfloat16))


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    x = torch.randn(256)
    x[:3] = torch.tensor([torch.nan, torch.inf, 1.0 + 2**-8])
    out = torch.empty(256, dtype=torch.bfloat16)
    narrow_kernel[(1,)](x, out, SIZE=256)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_agree_with_their_twins(
    dtype: torch.dtype, described: bool, transform: str
) -> None:
    """Forward, combination, placed targets, dHidden, dWeight, dBias: through descriptors and
    through pointers.
    """
    of, c = TRANSFORMS[transform], torch.randn(ROWS)
    own = dataclasses.replace(config.tiles("interpreter", dtype), descriptors=described)
    hidden, weight, bias, targets = operands(dtype)
    kept = poisoned(ROWS, forward.kept_width(VOCABULARY, own), dtype=dtype)
    got = forward.forward(hidden, weight, bias, targets, of, own, kept=kept, moments=True)
    want = forward.forward_twin(
        hidden, weight, bias, targets, of, own, kept=torch.empty_like(kept), moments=True
    )
    for name in ("tops", "totals", "targets", "moments"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=2e-5, atol=2e-5, msg=name
        )
    assert got.kept is not None
    assert want.kept is not None
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.kept.float(), want.kept.float(), rtol=2 * eps + 1e-5, atol=1e-5)

    softmax, statistics = combine.combine(got, of, VOCABULARY)
    twin, twin_statistics = combine.combine_twin(got, of, VOCABULARY)
    for name in ("logps", "lse", "rests", "tops", "logs"):
        torch.testing.assert_close(
            getattr(softmax, name), getattr(twin, name), rtol=2e-6, atol=2e-6, msg=name
        )
    torch.testing.assert_close(statistics, twin_statistics, rtol=1e-5, atol=1e-5)

    a = gradients.softmax_twin(got, softmax, targets, own, of.softcap)
    want_all = gradients.gradients_twin(a, hidden, weight, c, -of.slope)
    gradients.place_targets(got, softmax, targets, own, of.softcap)
    of_hidden = poisoned(ROWS, WIDTH)
    gradients.hidden_gradient(got, weight, of_hidden, own, -of.slope, coefficients=c)
    peak = gradients.weigh(got, softmax, targets, own, of.softcap, c * -of.slope)
    of_weight, of_bias = poisoned(VOCABULARY, WIDTH), poisoned(VOCABULARY)
    gradients.weight_gradient(got, hidden, peak, of_weight, own, add=False)
    gradients.bias_gradient(got, peak, of_bias, own, add=False)
    for ours, exact in zip((of_hidden, of_weight, of_bias), want_all, strict=True):
        assert (ours - exact).abs().max() <= (2 * eps + 1e-6) * exact.abs().max()
    # once more on top: dWeight of a second chunk
    gradients.weight_gradient(got, hidden, peak, of_weight, own, add=True)
    assert (of_weight - 2 * want_all[1]).abs().max() <= (4 * eps + 2e-6) * want_all[1].abs().max()


def test_rows_apart_by_more_than_32_bits() -> None:
    """Strides beyond 2**31 elements, in memory that is never touched."""
    own = dataclasses.replace(config.tiles("interpreter", torch.float16), descriptors=False)
    far = torch.empty(2**31 + 2**20, dtype=torch.float16)  # pages that nobody writes take no room
    kept = far.as_strided((3, 32), (2**30 + 8, 1))
    assert kept[2].storage_offset() + kept.data_ptr() - far.data_ptr() >= 2**31
    hidden, weight = torch.randn(3, 16).half(), torch.randn(32, 16).half()
    targets = torch.tensor([1, 5, 9])
    of = TRANSFORMS["plain"]
    got = forward.forward(hidden, weight, None, targets, of, own, kept=kept)
    near = forward.forward(
        hidden, weight, None, targets, of, own, kept=poisoned(3, 32, dtype=torch.float16)
    )
    assert near.kept is not None
    assert torch.equal(kept, near.kept)
    softmax, _ = combine.combine(got, of, 32)
    results = []
    for partials in (got, near):
        gradients.place_targets(partials, softmax, targets, own, False)
        out = poisoned(3, 16)
        gradients.hidden_gradient(partials, weight, out, own, -1.0)
        results.append(out)
    assert torch.equal(*results)


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


@pytest.mark.parametrize("target", config.TARGETS)
def test_registry_names_every_argument(target: str) -> None:
    found = registry.variants(target)
    assert len({v.name for v in found}) == len(found)
    kernels = {v.kernel.fn.__name__ for v in found}
    assert kernels == {
        "forward_kernel", "combine_kernel", "pair_loss_kernel", "place_targets_kernel",
        "shares_kernel", "rescale_kernel", "hidden_kernel", "weight_kernel", "bias_kernel",
        "list_kernel",
    }  # fmt: skip
    for v in found:
        assert list(v.signature) == list(v.kernel.arg_names), v.name
        constants = {n for n, kind in v.signature.items() if kind == "constexpr"}
        assert constants == set(v.constants), v.name
    with pytest.raises(ValueError, match="target is 'sm_1', expected one of"):
        registry.variants("sm_1")


def test_tiles_nest() -> None:
    """What the kernels assume of each other's tiles."""
    for own in {*config.TABLE.values(), config.tiles("another chip", torch.bfloat16)}:
        assert own.hidden_rows == own.rows, "a block of live rows has been computed as a whole"
        assert own.rows % own.weight_depth == 0
        assert own.tokens % own.hidden_depth == 0
        assert own.tokens % own.weight_tokens == 0


def test_too_many_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="use a smaller workspace_bytes"):
        tiles.grid(2**31)
