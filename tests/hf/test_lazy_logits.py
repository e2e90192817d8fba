"""Lazy logits stand for the same numbers as real ones, or refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdpop.hf.interception import lazy_logits_from
from fastdpop.hf.lazy_logits import LazyLogits
from fastdpop.transform import LogitTransform

VOCABULARY = 11


class TinyForCausalLM:
    """Nothing but a name."""


FACTORS = torch.linspace(-1.0, 2.0, VOCABULARY, dtype=torch.float64)


def lazy_and_real(bias: bool = True) -> tuple[LazyLogits, Tensor]:
    """``(2, 5, V)`` logits, both ways."""
    head = nn.Linear(4, VOCABULARY, bias=bias, dtype=torch.float64)
    hidden = torch.randn(2, 5, 4, dtype=torch.float64)
    with lazy_logits_from(head, TinyForCausalLM()):
        lazy = head(hidden)
    return lazy, head(hidden)


def computed(lazy: LazyLogits) -> Tensor:
    """What lazy logits stand for, through the transform that the fused losses apply."""
    product = lazy.product
    raw = nn.functional.linear(product.hidden, product.weight, product.bias)
    return LogitTransform(product.softcap, product.logit_scale).transform_(raw)


FOLLOWED: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda z: z,
    "times": lambda z: z * 0.25,
    "times from the left": lambda z: 2 * z,
    "torch.mul": lambda z: torch.mul(z, 3.0),
    "tensor constant": lambda z: torch.tensor(2.0, dtype=torch.float64) * z,
    "over": lambda z: z / 3,
    "over in place": lambda z: z.div_(3.0),
    "augmented": lambda z: _augmented(z),
    "softcap": lambda z: 30.0 * torch.tanh(z / 30.0),
    "scale, softcap, scale": lambda z: (z * 0.5 / 2.0).tanh() * 2.0 * 1.5,
    "softcap in place": lambda z: z.div_(2.0).tanh_().mul_(2.0),
    "cast": lambda z: z.float().double().to(torch.float64).contiguous().clone(),
    "cast to another's": lambda z: z.type_as(torch.zeros(1)).to(
        torch.zeros((), dtype=torch.float64)
    ),
    "one factor a token": lambda z: z * FACTORS,
    "one factor a token, from the left": lambda z: torch.mul(FACTORS, z * 3.0),
    "sum": lambda z: z * 2.0 + z * 3.0,
    "sum in place": lambda z: z.clone().add_(z[:, :, :]),
    "last positions": lambda z: z[:, -3:, :],
    "one sequence": lambda z: z[1],
    "a range of sequences": lambda z: z[1:],
    "smaller vocabulary": lambda z: z[..., :7] * 2.0,
    "everything": lambda z: z[:, :, :VOCABULARY],
    "rows and vocabulary": lambda z: z[0, 1:3, 2:9],
}


def _augmented(z: Any) -> Any:
    z *= 4.0
    z /= 3.0
    return z


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", FOLLOWED.values(), ids=FOLLOWED.keys())
def test_followed(transform: Callable[[Any], Any], bias: bool) -> None:
    lazy, real = lazy_and_real(bias)
    result, expected = transform(lazy), transform(real)
    assert isinstance(result, LazyLogits)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    # Through float32 the real ones lose digits; the lazy ones do not.
    torch.testing.assert_close(computed(result), expected, rtol=1e-6, atol=1e-6)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "add": lambda z: z + 1.0,
    "negative scale": lambda z: z * -1.0,
    "zero": lambda z: z * 0.0,
    "infinite": lambda z: z * float("inf"),
    "one value a token, under a softcap": lambda z: z.tanh() * FACTORS,
    "one divisor a token": lambda z: z / FACTORS,
    "one value a position": lambda z: z * torch.ones(5, 1, dtype=torch.float64),
    "sum under a softcap": lambda z: z + z.tanh(),
    "sum of different shapes": lambda z: z + z[:, :1],
    "difference": lambda z: z - z,
    "onto a tensor in place": lambda z: torch.zeros(2, 5, VOCABULARY).add_(z),
    "learned scale": lambda z: z * torch.ones((), requires_grad=True),
    "squared": lambda z: z * z,
    "reciprocal": lambda z: 1.0 / z,
    "floor division": lambda z: torch.div(z, 2.0, rounding_mode="floor"),
    "out": lambda z: torch.mul(z, 2.0, out=torch.empty(2, 5, VOCABULARY)),
    "two tanh": lambda z: z.tanh().tanh(),
    "other squash": lambda z: z.sigmoid(),
    "integers": lambda z: z.long(),
    "integer cast": lambda z: z.to(torch.int64),
    "softmax": lambda z: z.log_softmax(-1),
    "detached": lambda z: z.detach(),
    "reshaped": lambda z: z.view(-1, VOCABULARY),
    "mask": lambda z: z[torch.ones(2, 5, dtype=torch.bool)],
    "one token": lambda z: z[..., 3],
    "new dimension": lambda z: z[None],
    "too many": lambda z: z[0, 0, 0:1, 0:1],
    "assignment": lambda z: z.__setitem__((..., 0), 0.0),
    "in a list": lambda z: torch.cat([z, z]),
    "by keyword": lambda z: torch.tanh(input=z),
    "data": lambda z: z.data,
}


@pytest.mark.parametrize("transform", REFUSED.values(), ids=REFUSED.keys())
def test_refused(transform: Callable[[Any], Any]) -> None:
    lazy, _ = lazy_and_real()
    with pytest.raises(RuntimeError, match="TinyForCausalLM applies"):
        transform(lazy)


def test_nothing_is_stored_and_a_name_is_shown() -> None:
    lazy, _ = lazy_and_real()
    assert repr(lazy) == (
        "LazyLogits(shape=(2, 5, 11), dtype=torch.float64, owner='TinyForCausalLM')"
    )
    assert lazy.size(-1) == VOCABULARY
    assert len(lazy) == 2
    with pytest.raises(RuntimeError, match="data_ptr"):
        lazy.data_ptr()


def test_a_cut_that_keeps_the_vocabulary_keeps_the_parameter() -> None:
    """Otherwise its gradient would be copied once more."""
    lazy, _ = lazy_and_real()
    kept = lazy[..., :VOCABULARY]
    assert isinstance(kept, LazyLogits)
    assert kept.product.weight is lazy.product.weight


def test_dtype_under_autocast() -> None:
    head = nn.Linear(4, VOCABULARY)
    with lazy_logits_from(head, TinyForCausalLM()), torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(2, 4)).dtype == torch.bfloat16


def test_head_is_restored_after_an_error() -> None:
    head = nn.Linear(4, VOCABULARY)
    before = set(vars(head))
    with pytest.raises(KeyError), lazy_logits_from(head, TinyForCausalLM()):
        raise KeyError
    assert set(vars(head)) == before


@pytest.mark.parametrize("columns", [0, 3])
def test_a_head_may_be_more_than_a_linear_map(columns: int) -> None:
    """Its own code runs; only linear maps onto the vocabulary are noted down."""

    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, VOCABULARY, dtype=torch.float64)
            self.down = nn.Linear(4, 2, bias=False, dtype=torch.float64)
            self.up = nn.Linear(2, VOCABULARY, dtype=torch.float64)
            self.factors = nn.Parameter(FACTORS.clone())

        def forward(self, input: Tensor) -> Tensor:
            return (super().forward(input) + 0.5 * self.up(self.down(input))) * self.factors

    head, input = LowRank(), torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    with lazy_logits_from(head, TinyForCausalLM(), columns):
        lazy = head(input)
    assert lazy.product.weight.shape == (VOCABULARY, 4 + max(2, columns))
    torch.testing.assert_close(computed(lazy), head(input))
    leaves = [input, *head.parameters()]
    gradient = torch.randn(2, 5, VOCABULARY, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(computed(lazy), leaves, gradient),
        torch.autograd.grad(head(input), leaves, gradient),
    )


def test_a_sum_keeps_the_dtype_of_its_first_term() -> None:
    """An adapter in float32 beside a head in bfloat16, as PEFT makes it."""
    base, adapter = nn.Linear(4, VOCABULARY, dtype=torch.bfloat16), nn.Linear(2, VOCABULARY)
    with lazy_logits_from(base, TinyForCausalLM()), lazy_logits_from(adapter, TinyForCausalLM()):
        lazy = base(torch.randn(3, 4, dtype=torch.bfloat16)) + adapter(torch.randn(3, 2))
    assert lazy.dtype == torch.float32
    assert {lazy.product.hidden.dtype, lazy.product.weight.dtype} == {torch.bfloat16}


def test_a_factor_keeps_its_precision() -> None:
    head = nn.Linear(4, VOCABULARY, dtype=torch.bfloat16)
    with lazy_logits_from(head, TinyForCausalLM()):
        lazy = head(torch.randn(3, 4, dtype=torch.bfloat16)).float() * FACTORS.float()
    assert {lazy.product.hidden.dtype, lazy.product.weight.dtype} == {torch.float32}


class Opaque(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


def test_a_head_that_multiplies_by_itself() -> None:
    head = Opaque(4, VOCABULARY)
    with (
        pytest.raises(
            RuntimeError, match="the head of TinyForCausalLM is a Opaque that computes its logits"
        ),
        lazy_logits_from(head, TinyForCausalLM()),
    ):
        head(torch.randn(2, 4))


def test_unusual_weight() -> None:
    class Sharded(nn.Parameter):
        pass

    head = nn.Linear(4, VOCABULARY)
    head.weight = Sharded(head.weight.detach())
    with (
        pytest.raises(RuntimeError, match="the weight of TinyForCausalLM's head is a Sharded"),
        lazy_logits_from(head, TinyForCausalLM()),
    ):
        head(torch.randn(2, 4))
