"""Hidden states that several places share, against the same states gathered to those places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastdpop import fused_dpop_loss, fused_logps, fused_preference_loss, ops

N, H, V, S, T = 13, 8, 37, 4, 9


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden ``(N, H)``, weight, labels and places ``(S, T)``."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, H, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, V, (S, T), generator=generator)
    labels[:, :2] = -100
    labels[1, 6:] = -100
    index = torch.randint(0, N, (S, T), generator=generator)
    index[2:, :5], labels[2:, :5] = index[:2, :5], labels[:2, :5]  # in common
    return hidden, weight, labels, index


def outcome(function: Any, indexed: bool, packed: bool = False, **options: Any) -> list[Tensor]:
    """What a call returns, and the gradients of hidden and weight."""
    hidden, weight, labels, index = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    if packed:
        labels, index = labels.reshape(-1), index.reshape(-1)
        options["cu_seqlens"] = torch.tensor([0, 9, 18, 20, 36])
    if "ref_hidden" in options and not indexed:
        options["ref_hidden"] = options["ref_hidden"][index]
    states = hidden if indexed else hidden[index]
    where = {"hidden_index": index} if indexed else {}
    out = function(states, weight, labels, **where, **options)
    if isinstance(out, Tensor):
        out.sin().sum().backward()
        values = [out]
    else:
        out.loss.sum().backward()
        values = [v for v in vars(out).values() if isinstance(v, Tensor)]
    return [
        *(v.detach() for v in values),
        *(x.grad for x in (hidden, weight) if x.grad is not None),
    ]


REF = -30 + torch.arange(S, dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(1)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpop": (fused_dpop_loss, {"ref_logps": REF}),
    "dpo, sum": (fused_preference_loss, {"loss": "dpo", "ref_logps": REF, "reduction": "sum"}),
    "ipo, each": (fused_preference_loss, {"loss": "ipo", "ref_logps": REF, "reduction": "none"}),
    "simpo": (fused_preference_loss, {"loss": "simpo"}),
    "aot": (fused_preference_loss, {"loss": "aot", "ref_logps": REF}),
    "shifted": (fused_preference_loss, {"loss": "simpo", "shift_labels": False}),
    "statistics": (
        fused_preference_loss,
        {"loss": "simpo", "statistics": ("entropy", "mean_logits", "token_accuracy")},
    ),
    "pairs": (fused_preference_loss, {"loss": "simpo", "pairs": [[0, 3], [0, 2]]}),
    "reference": (
        fused_dpop_loss,
        {"ref_hidden": torch.randn(N, H, dtype=torch.float64, generator=GENERATOR)},
    ),
    "log-probs": (fused_logps, {}),
    "log-probs of tokens": (fused_logps, {"reduction": "token"}),
    "LD-DPO's": (fused_logps, {"ld_alpha": 0.5}),
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_as_gathered(name: str, packed: bool) -> None:
    function, options = CASES[name]
    expected = outcome(function, False, packed, **options)
    found = outcome(function, True, packed, **options)
    assert len(found) == len(expected) >= 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_only_places_before_scored_labels_are_read() -> None:
    hidden, weight, labels, index = problem()
    expected = fused_logps(hidden, weight, labels, hidden_index=index)
    read = torch.zeros_like(index, dtype=torch.bool)
    read[:, :-1] = labels[:, 1:] != -100
    other = index.masked_fill(~read, 10**6)
    assert torch.equal(fused_logps(hidden, weight, labels, hidden_index=other), expected)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"hidden_index": [[0]]}, TypeError, "hidden_index"),
    "dtype": (
        {"hidden_index": torch.zeros(S, T, dtype=torch.int32)},
        ValueError,
        r"hidden_index has dtype torch.int32, expected torch.int64",
    ),
    "device": (
        {"hidden_index": torch.zeros(S, T, dtype=torch.int64, device="meta")},
        ValueError,
        "hidden_index is on meta, expected cpu",
    ),
    "shape": (
        {"hidden_index": torch.zeros(S, T - 1, dtype=torch.int64)},
        ValueError,
        r"hidden_index has shape \(4, 8\), expected \(4, 9\)",
    ),
    "past the end": (
        {"hidden_index": torch.full((S, T), N)},
        ValueError,
        r"hidden_index contains 13, expected places of hidden states in \[0, 13\)",
    ),
    "below 0": (
        {"hidden_index": torch.full((S, T), -1)},
        ValueError,
        r"hidden_index contains -1, expected places of hidden states in \[0, 13\)",
    ),
    "hidden of 3 dimensions": (
        {"hidden": torch.zeros(1, N, H, dtype=torch.float64)},
        ValueError,
        r"hidden has shape \(1, 13, 8\), expected \(N, H\) because hidden_index is given",
    ),
    "labels of 1 dimension": (
        {"labels": torch.zeros(5, dtype=torch.int64), "hidden_index": torch.zeros(5).long()},
        ValueError,
        r"labels has shape \(5,\), expected 2 dimensions",
    ),
    "packed labels of 2": (
        {"cu_seqlens": torch.tensor([0, 36])},
        ValueError,
        r"labels has shape \(4, 9\), expected 1 dimensions",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    given, kind, message = ERRORS[name]
    hidden, weight, labels, index = problem()
    call = {"hidden": hidden, "weight": weight, "labels": labels, "hidden_index": index, **given}
    for function in (fused_logps, fused_preference_loss):
        own = {"loss": "simpo"} if function is fused_preference_loss else {}
        with pytest.raises(kind, match=message):
            function(**call, **own)


def test_compiled() -> None:
    hidden, weight, labels, index = problem()
    hidden.requires_grad_()

    def call(hidden: Tensor, index: Tensor) -> Tensor:
        return fused_logps(hidden, weight, labels, hidden_index=index)

    expected = call(hidden, index)
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    found = torch.compile(call, backend="aot_eager", fullgraph=True)(hidden, index)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), hidden)[0], gradient)


@pytest.mark.parametrize("shift", [True, False])
def test_opcheck(shift: bool) -> None:
    _, _, labels, index = problem()
    pairs = torch.tensor([[0, 2], [1, 3]])
    given = (labels, V, pairs, None, shift, False, None, None, index, N)
    opcheck(ops.rows_from_labels, given)
