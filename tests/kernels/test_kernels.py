"""Each kernel against the same in plain torch, and the interpreter's traps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpop.kernels import combine, config, forward, gradients, tiles
from fastdpop.kernels.forward import Transform
from fastdpop.kernels.repair import repair
from fastdpop.kernels.target_logit import target_logit
from tools.kernels import registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = {
    "plain": Transform(scale=1.4426950408889634, cap=1.0, softcap=False, slope=1.0),
    "softcap": Transform(scale=2.9, cap=0.5, softcap=True, slope=1.3),
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


@dataclasses.dataclass(frozen=True)
class Case:
    """Random operands, as the launchers take them."""

    dtype: torch.dtype
    transform: Transform
    of: config.Config
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor

    @staticmethod
    def of_dtype(dtype: torch.dtype, transform: str = "plain", *, use_tma: bool = True) -> Case:
        of = dataclasses.replace(config.of("interpreter", dtype), use_tma=use_tma)
        hidden, weight, bias, targets = operands(dtype)
        return Case(
            dtype, TRANSFORMS[transform], of, hidden, weight, forward.padded_bias(bias, of), targets
        )

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias, self.targets

    def kept(self) -> Tensor:
        return poisoned(ROWS, forward.kept_width(VOCABULARY, self.of), dtype=self.dtype)

    def logits(self) -> Tensor:
        """z in units of log 2, float64."""
        u = self.hidden.double() @ self.weight.double().T + self.bias[:VOCABULARY].double()
        t = torch.tanh(u * self.transform.cap) if self.transform.softcap else u
        return t * self.transform.scale

    def reference(self) -> Tensor:
        """The targets' logits, or the log-sum-exp where the dtype asks for it."""
        if self.dtype == torch.float16:
            return self.logits().mul(math.log(2.0)).logsumexp(1).div(math.log(2.0)).float().round()
        return target_logit(*self.operands, self.transform)

    def run(self, **options: Any) -> tuple[forward.Forward, combine.Softmax]:
        done = forward.forward(
            *self.operands,
            self.reference(),
            self.transform,
            self.of,
            exp_logits=self.kept(),
            **options,
        )
        return done, combine.combine(done, self.targets, self.transform, VOCABULARY)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("use_tma", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_agree_with_plain_torch(dtype: torch.dtype, use_tma: bool, transform: str) -> None:
    """Targets' logits, forward product, combination, dHidden, dWeight, dBias: through descriptors
    and through pointers.
    """
    case = Case.of_dtype(dtype, transform, use_tma=use_tma)
    of = case.transform
    exact = case.logits().gather(1, case.targets[:, None])[:, 0]
    found = target_logit(*case.operands, of, rounded=False)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    found = target_logit(*case.operands, of)
    assert torch.equal(found, found.round())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.5 + 1e-4)

    got, softmax = case.run(statistics=True)
    want = forward.forward_naive(
        *case.operands, case.reference(), of, case.of, exp_logits=case.kept(), statistics=True
    )
    for name in ("tile_sumexp", "target_logit", "statistics"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=2e-5, atol=2e-5, msg=name
        )
    naive = combine.combine_naive(
        dataclasses.replace(got, exp_logits=want.exp_logits), case.targets, of, VOCABULARY
    )
    assert got.exp_logits is not None
    assert want.exp_logits is not None
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.exp_logits.float(), want.exp_logits.float(), rtol=2 * eps + 1e-5, atol=1e-5
    )
    for name in ("logps", "lse", "rest", "row_scale", "statistics"):
        torch.testing.assert_close(
            getattr(softmax, name), getattr(naive, name), rtol=2e-6, atol=2e-6, msg=name
        )

    factor = gradients.factors(torch.randn(ROWS), softmax.row_scale, of.slope)
    of_hidden, of_weight, of_bias = gradients.gradients_naive(
        got.exp_logits, case.hidden, case.weight, factor
    )

    def close(ours: Tensor, exact: Tensor, bound: float) -> None:
        assert (ours - exact).abs().max() <= bound * exact.abs().max()

    for cublas in {False, gradients.by_cublas(dtype, None)}:
        out = poisoned(ROWS, WIDTH)
        gradients.hidden_gradient(got.exp_logits, case.weight, factor, out, case.of, cublas=cublas)
        close(out, of_hidden, 1e-6)
        out = poisoned(ROWS, WIDTH, dtype=dtype)
        gradients.hidden_gradient(got.exp_logits, case.weight, factor, out, case.of, cublas=cublas)
        close(out, of_hidden, eps + 1e-6)
        out = poisoned(VOCABULARY, WIDTH)
        for times, accumulate in ((1, False), (2, True), (3, True)):
            gradients.weight_gradient(
                got.exp_logits,
                case.hidden,
                factor,
                out,
                case.of,
                accumulate=accumulate,
                cublas=cublas,
            )
            close(out, times * of_weight, 2 * eps + 1e-6)
    out = poisoned(VOCABULARY)
    for times, accumulate in ((1, False), (2, True)):
        gradients.bias_gradient(got.exp_logits, factor, out, accumulate=accumulate)
        close(out, times * of_bias, 2e-6)


def test_certainty_beyond_the_last_bit_of_one() -> None:
    """The other tokens' mass, from 0 to what exceeds the target's own by far: log-probs keep
    float32's relative precision.
    """
    mass = torch.cat([torch.zeros(1), torch.logspace(-36, 12, 97)])
    done = forward.Forward(
        shift=torch.zeros(len(mass)),
        tile_sumexp=mass[None],
        target_logit=torch.zeros(len(mass)),
        statistics=None,
        exp_logits=None,
    )
    plain = forward.Transform(scale=math.log2(math.e), cap=1.0, softcap=False, slope=1.0)
    found = combine.combine(done, torch.zeros(len(mass), dtype=torch.int64), plain, 100)
    want = -torch.log1p(mass.double())
    assert (found.logps - want).abs().le(2.0**-23 * want.abs()).all()


@pytest.mark.parametrize("use_tma", [True, False])
@pytest.mark.parametrize("active", [0, 1, 16, 20, ROWS])
def test_rows_that_are_not_wanted(active: int, use_tma: bool) -> None:
    """are not computed, and do not show, whatever stands in their memory."""
    case = Case.of_dtype(torch.bfloat16, use_tma=use_tma)
    count = torch.tensor(active, dtype=torch.int32)
    case.hidden[-(-active // 16) * 16 :] = torch.nan  # whole tiles, which end at once
    done, softmax = case.run(num_active=count)
    assert done.exp_logits is not None
    dlogp = torch.where(torch.arange(ROWS) < active, torch.randn(ROWS), 0.0)
    factor = gradients.factors(dlogp, softmax.row_scale, 1.0)
    hidden = poisoned(ROWS, WIDTH)
    gradients.hidden_gradient(
        done.exp_logits, case.weight, factor, hidden, case.of, num_active=count, cublas=False
    )
    weight, bias = poisoned(VOCABULARY, WIDTH), poisoned(VOCABULARY)
    gradients.weight_gradient(
        done.exp_logits,
        case.hidden.nan_to_num(),
        factor,
        weight,
        case.of,
        accumulate=False,
        num_active=count,
        cublas=False,
    )
    gradients.bias_gradient(done.exp_logits, factor, bias, accumulate=False)
    want = gradients.gradients_naive(
        done.exp_logits[:active], case.hidden[:active], case.weight, factor[:active]
    )
    for ours, exact in zip((hidden[:active], weight, bias), want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=1e-2)


def test_float16_holds_what_its_exponents_do_not() -> None:
    """Factors over many powers of 2, the largest just above one: dWeight is divided and multiplied
    by the same.
    """
    case = Case.of_dtype(torch.float16)
    done, softmax = case.run()
    assert done.exp_logits is not None
    for peak in (2.0**-40, 1.0, 2.0**20 * (1 + 2.0**-23)):
        dlogp = torch.rand(ROWS) * peak / softmax.row_scale
        dlogp[0] = peak / softmax.row_scale[0]
        factor = gradients.factors(dlogp, softmax.row_scale, 1.0)
        out = poisoned(VOCABULARY, WIDTH)
        gradients.weight_gradient(
            done.exp_logits, case.hidden, factor, out, case.of, accumulate=False, cublas=False
        )
        want = gradients.gradients_naive(done.exp_logits, case.hidden, case.weight, factor)[1]
        assert (out - want).abs().max() <= 2e-3 * want.abs().max()


def test_rows_apart_by_more_than_32_bits() -> None:
    """Strides beyond 2**31 elements, in memory that is never touched."""
    case = Case.of_dtype(torch.float16, use_tma=False)
    far = torch.empty(2**31 + 2**20, dtype=torch.float16)  # pages that nobody writes take no room
    kept = far.as_strided((3, 32), (2**30 + 8, 1))
    assert kept[2].storage_offset() + kept.data_ptr() - far.data_ptr() >= 2**31
    hidden, weight = torch.randn(3, 16).half(), torch.randn(32, 16).half()
    targets = torch.tensor([1, 5, 9])
    results = []
    for room in (kept, poisoned(3, 32, dtype=torch.float16)):
        done = forward.forward(
            hidden, weight, None, targets, torch.zeros(3), case.transform, case.of, exp_logits=room
        )
        softmax = combine.combine(done, targets, case.transform, 32)
        out, of_bias = poisoned(3, 16), poisoned(32)
        gradients.hidden_gradient(room, weight, softmax.row_scale, out, case.of, cublas=False)
        gradients.bias_gradient(room, softmax.row_scale, of_bias, accumulate=False)
        results.append((room, out, of_bias))
    for there, near in zip(*results, strict=True):
        assert torch.equal(there, near)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_overflow_their_reference_are_repaired(dtype: torch.dtype, keep: bool) -> None:
    """The target's probability is 1e-60 in some rows; the others keep their bits."""
    case = Case.of_dtype(dtype)
    rows = torch.arange(3, ROWS, 7)
    case.weight[0] = 1.0
    case.hidden[rows] = 150.0 / WIDTH
    case.weight[1:] *= 0.1
    case.targets[rows] = 5
    exact = torch.log_softmax(case.logits() * math.log(2.0), 1)
    exact = exact.gather(1, case.targets[:, None])[:, 0]
    assert exact[rows].max() < -138
    reference = target_logit(*case.operands, case.transform)
    done = forward.forward(
        *case.operands,
        reference.clone(),
        case.transform,
        case.of,
        exp_logits=case.kept() if keep and dtype != torch.float16 else None,
        statistics=True,
    )
    softmax = combine.combine(done, case.targets, case.transform, VOCABULARY)
    others = torch.ones(ROWS, dtype=torch.bool)
    others[rows] = False
    before = softmax.logps.clone()
    repair(done, *case.operands, case.transform, case.of, softmax.rest)
    combine.combine(done, case.targets, case.transform, VOCABULARY, again=softmax)
    assert torch.equal(done.shift[others], reference[others])
    assert torch.equal(softmax.logps[others], before[others])
    torch.testing.assert_close(softmax.logps.double(), exact, rtol=1e-5, atol=1e-6)
    want = forward.forward_naive(
        *case.operands,
        done.shift,
        case.transform,
        case.of,
        exp_logits=None if done.exp_logits is None else case.kept(),
        statistics=True,
    )
    for name in ("tile_sumexp", "statistics"):
        torch.testing.assert_close(
            getattr(done, name), getattr(want, name), rtol=2e-5, atol=2e-5, msg=name
        )
    naive = combine.combine_naive(want, case.targets, case.transform, VOCABULARY)
    assert softmax.statistics is not None
    assert naive.statistics is not None
    torch.testing.assert_close(softmax.statistics, naive.statistics, rtol=1e-5, atol=1e-4)
    if done.exp_logits is not None and want.exp_logits is not None:
        torch.testing.assert_close(
            done.exp_logits.float() * softmax.row_scale[:, None],
            want.exp_logits.float() * naive.row_scale[:, None],
            rtol=2 * torch.finfo(dtype).eps,
            atol=1e-6,
        )


@pytest.mark.parametrize("target", config.TARGETS)
def test_registry_names_every_argument(target: str) -> None:
    found = registry.variants(target)
    assert len({v.name for v in found}) == len(found)
    kernels = {v.kernel.fn.__name__ for v in found}
    assert kernels >= {
        "target_logit_kernel", "forward_kernel", "repair_kernel", "combine_kernel",
        "pair_loss_kernel", "dhidden_kernel", "dweight_kernel", "dbias_kernel",
    }  # fmt: skip
    for v in found:
        assert list(v.signature) == list(v.kernel.arg_names), v.name
        constants = {n for n, kind in v.signature.items() if kind == "constexpr"}
        assert constants == set(v.constants), v.name
    with pytest.raises(ValueError, match="target is 'sm_1', expected one of"):
        registry.variants("sm_1")


def test_tiles_nest() -> None:
    """What the kernels assume of each other's tiles."""
    for of in {*config.TABLE.values(), config.of("another chip", torch.bfloat16)}:
        assert of.forward.n % of.dhidden.n == 0, "a block of wanted rows was computed as a whole"
        assert of.forward.n % of.dweight.n == 0
        assert of.forward.v % of.repair.v == 0
        assert of.forward.v // 4 % 8 == 0, "a quarter is stored in pieces of 16 bytes"
        assert of.forward.n <= 128, "targets of a quarter are counted in a byte"


@pytest.mark.parametrize("vocabulary", [64, 83])
def test_bias_is_aligned(vocabulary: int) -> None:
    """Whole tiles or not, and wherever the caller's own lies."""
    bias = torch.randn(vocabulary + 1).bfloat16()[1:]
    padded = forward.padded_bias(bias, config.of("interpreter", torch.bfloat16))
    assert bias.data_ptr() % 16
    assert padded.data_ptr() % 16 == 0
    assert torch.equal(padded[:vocabulary], bias)
    assert not padded[vocabulary:].any()


def test_rocm_is_not_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gfx9 reports capability 9, too."""
    target_of = config.detected.__wrapped__
    monkeypatch.setattr(config, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a chip")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert target_of(torch.device("cuda")) == "sm_90a"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    with pytest.warns(UserWarning, match=r"no tile sizes for compute capability 12.0 \(a chip\)"):
        assert target_of(torch.device("cuda")) == "other"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.warns(UserWarning, match=r"no tile sizes for ROCm \(a chip\)"):
        assert target_of(torch.device("cuda")) == "other"


def test_too_many_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="use a smaller workspace_bytes"):
        tiles.grid(2**31)
