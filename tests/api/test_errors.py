"""Every wrong argument is an error that names the argument, its value and what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpop import fused_dpop_loss, fused_preference_loss, losses

S, T, H, V = 4, 6, 5, 11
KTO = {"loss": "kto"}
LD = {"loss": losses.length_desensitised(losses.get("dpop"), 0.5)}


def good() -> dict[str, Any]:
    """Arguments that are right; each test spoils one."""
    return {
        "hidden": torch.randn(S, T, H),
        "weight": torch.randn(V, H),
        "labels": torch.randint(0, V, (S, T)),
        "ref_logps": torch.zeros(S),
    }


def labels(wrong: int) -> Tensor:
    table = torch.ones(S, T, dtype=torch.int64)
    table[2, 3] = wrong
    return table


def packed(bounds: Any, **others: Any) -> dict[str, Any]:
    return {
        "hidden": torch.randn(S * T, H),
        "labels": torch.randint(0, V, (S * T,)),
        "cu_seqlens": bounds,
        **others,
    }


def longs(*values: int) -> Tensor:
    return torch.tensor(values)


META = torch.device("meta")
REF_HIDDEN = {"ref_logps": None, "ref_hidden": torch.randn(S, T, H)}

WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    # hidden
    (TypeError, "hidden is list, expected a torch.Tensor", {"hidden": [1.0]}),
    (ValueError, "hidden has dtype torch.int64, expected one of", {"hidden": longs(1)}),
    (
        ValueError,
        "hidden has shape (24, 5), expected (sequences, T, H), or packed (positions, H) with",
        {"hidden": torch.randn(S * T, H), "labels": torch.ones(S * T, dtype=torch.int64)},
    ),
    (
        ValueError,
        "hidden has shape (4, 6, 5), expected packed (positions, H) because cu_seqlens is given",
        {"cu_seqlens": longs(0, 6, 12, 18, 24)},
    ),
    (
        ValueError,
        "the batch holds 0 sequences, expected at least one",
        {"hidden": torch.randn(0, T, H), "labels": torch.ones(0, T, dtype=torch.int64)},
    ),
    (
        ValueError,
        "the batch holds 3 sequences, expected an even number",
        {"hidden": torch.randn(3, T, H), "labels": torch.ones(3, T, dtype=torch.int64)},
    ),
    (
        ValueError,
        "V and H at least 1",
        {"hidden": torch.randn(S, T, 0), "weight": torch.randn(V, 0)},
    ),
    # labels
    (TypeError, "labels is list, expected a torch.Tensor", {"labels": [[1]]}),
    (
        ValueError,
        "labels has dtype torch.float32, expected torch.int64",
        {"labels": torch.ones(S, T)},
    ),
    (ValueError, "labels has dtype torch.bool", {"labels": torch.ones(S, T, dtype=torch.bool)}),
    (
        ValueError,
        "labels has shape (4, 5), expected (4, 6): one label for each hidden state",
        {"labels": torch.ones(S, T - 1, dtype=torch.int64)},
    ),
    (ValueError, "labels contain 11, expected token ids in [0, 11) or -100", {"labels": labels(V)}),
    (ValueError, "labels contain -1, expected token ids in [0, 11)", {"labels": labels(-1)}),
    (ValueError, "labels contain -101, expected token ids", {"labels": labels(-101)}),
    (ValueError, "labels contain 11, expected token ids in", {"labels": labels(V).int()}),
    (
        ValueError,
        "labels is on meta, expected cpu, where hidden is",
        {"labels": torch.ones(S, T, dtype=torch.int64, device=META)},
    ),
    # weight and bias
    (TypeError, "weight is NoneType, expected a torch.Tensor", {"weight": None}),
    (
        ValueError,
        "weight has shape (11, 4), expected (V, 5) to fit hidden (4, 6, 5)",
        {"weight": torch.randn(V, 4)},
    ),
    (ValueError, "weight has shape (5,), expected (V, 5)", {"weight": torch.randn(H)}),
    (ValueError, "weight has shape (0, 5), expected (V, 5)", {"weight": torch.randn(0, H)}),
    (
        ValueError,
        "weight has dtype torch.bfloat16, expected torch.float32, that of hidden",
        {"weight": torch.randn(V, H).bfloat16()},
    ),
    (
        ValueError,
        "weight has dtype torch.float64, expected torch.float32",
        {"weight": torch.randn(V, H).double()},
    ),
    (ValueError, "weight is on meta, expected cpu", {"weight": torch.randn(V, H, device=META)}),
    (TypeError, "bias is float, expected a torch.Tensor", {"bias": 0.0}),
    (
        ValueError,
        "bias has shape (5,), expected (11,): one value per token",
        {"bias": torch.randn(H)},
    ),
    (
        ValueError,
        "bias has dtype torch.float16, expected torch.float32",
        {"bias": torch.randn(V).half()},
    ),
    (ValueError, "bias is on meta, expected cpu", {"bias": torch.randn(V, device=META)}),
    # cu_seqlens
    (TypeError, "cu_seqlens is list, expected a torch.Tensor", packed([0, 6, 12, 18, 24])),
    (
        ValueError,
        "cu_seqlens has shape (5,) and dtype torch.float32, expected (sequences + 1,)",
        packed(torch.tensor([0.0, 6, 12, 18, 24])),
    ),
    (ValueError, "cu_seqlens has shape (1, 5)", packed(longs(0, 6, 12, 18, 24)[None])),
    (
        ValueError,
        "cu_seqlens is [0, 6, 12, 18, 23], expected non-decreasing bounds from 0 to the "
        "number of positions, 24",
        packed(longs(0, 6, 12, 18, 23)),
    ),
    (ValueError, "cu_seqlens is [1, 6, 12, 18, 24]", packed(longs(1, 6, 12, 18, 24))),
    (ValueError, "cu_seqlens is [0, 12, 6, 18, 24]", packed(longs(0, 12, 6, 18, 24))),
    (ValueError, "the batch holds 0 sequences", packed(longs(0))),
    (
        ValueError,
        "the batch holds 3 sequences, expected an even number",
        packed(longs(0, 6, 12, 24)),
    ),
    # the reference
    (
        ValueError,
        " needs a reference: pass ref_logps= or ref_hidden=",
        {"ref_logps": None},
    ),
    (ValueError, "ref_logps and ref_hidden are both given", {"ref_hidden": torch.randn(S, T, H)}),
    (ValueError, "ref_weight is given without ref_hidden", {"ref_weight": torch.randn(V, H)}),
    (ValueError, "ref_bias is given without ref_weight", {"ref_bias": torch.randn(V)}),
    (
        ValueError,
        "ref_bias is given without ref_weight",
        {**REF_HIDDEN, "ref_bias": torch.randn(V)},
    ),
    (
        ValueError,
        "ref_logps has shape (2,), expected (4,): one value per sequence",
        {"ref_logps": torch.zeros(2)},
    ),
    (ValueError, "ref_logps has shape (2, 2), expected (4,)", {"ref_logps": torch.zeros(2, 2)}),
    (
        ValueError,
        "ref_logps[1] has shape (3,), expected (2,): one value per pair",
        {"ref_logps": (torch.zeros(2), torch.zeros(3))},
    ),
    (
        TypeError,
        "ref_logps is tuple, expected a tensor (4,) or a pair of tensors (2,)",
        {"ref_logps": (torch.zeros(2),)},
    ),
    (
        TypeError,
        "ref_logps[0] is list, expected a torch.Tensor",
        {"ref_logps": ([0.0, 0.0], torch.zeros(2))},
    ),
    (TypeError, "ref_logps is float, expected a tensor", {"ref_logps": 0.5}),
    (
        ValueError,
        "ref_logps has dtype torch.int64, expected floating point",
        {"ref_logps": torch.zeros(S, dtype=torch.int64)},
    ),
    (
        ValueError,
        "ref_logps[0] has dtype torch.bool",
        {"ref_logps": (torch.zeros(2) > 0, torch.zeros(2))},
    ),
    (
        ValueError,
        "ref_logps has dtype torch.bfloat16, in which it is rounded, expected torch.float32",
        {"ref_logps": torch.zeros(S).bfloat16()},
    ),
    (
        ValueError,
        "ref_logps[1] has dtype torch.float16, in which it is rounded",
        {"ref_logps": (torch.zeros(2), torch.zeros(2).half())},
    ),
    (ValueError, "ref_logps is on meta", {"ref_logps": torch.zeros(S, device=META)}),
    (
        ValueError,
        "ref_logps[1] is on meta",
        {"ref_logps": (torch.zeros(2), torch.zeros(2, device=META))},
    ),
    (
        ValueError,
        "ref_hidden has shape (4, 5, 5), expected (4, 6, 'H'), the positions of hidden",
        {"ref_logps": None, "ref_hidden": torch.randn(S, T - 1, H)},
    ),
    (
        ValueError,
        "ref_hidden has dtype torch.int64",
        {"ref_logps": None, "ref_hidden": torch.ones(S, T, H, dtype=torch.int64)},
    ),
    (
        ValueError,
        "ref_hidden is on meta",
        {"ref_logps": None, "ref_hidden": torch.randn(S, T, H, device=META)},
    ),
    (
        ValueError,
        "ref_weight has shape (11, 4), expected (V, 5) to fit ref_hidden",
        {**REF_HIDDEN, "ref_weight": torch.randn(V, 4)},
    ),
    (
        ValueError,
        "ref_weight has 12 rows, expected 11, the vocabulary of weight",
        {**REF_HIDDEN, "ref_weight": torch.randn(V + 1, H)},
    ),
    (
        ValueError,
        "ref_weight has dtype torch.float64, expected torch.float32, that of ref_hidden",
        {**REF_HIDDEN, "ref_weight": torch.randn(V, H).double()},
    ),
    (
        ValueError,
        "ref_bias has shape (5,), expected (11,)",
        {**REF_HIDDEN, "ref_weight": torch.randn(V, H), "ref_bias": torch.randn(H)},
    ),
    # kl
    (
        ValueError,
        "label_smoothing=0.0) does not read it: leave it out",
        {"kl": torch.tensor(0.1)},
    ),
    (TypeError, "kl is float, expected a torch.Tensor", {**KTO, "kl": 0.1}),
    (ValueError, "kl has shape (2,), expected (): a 0-d tensor", {**KTO, "kl": torch.zeros(2)}),
    (ValueError, "kl is on meta, expected cpu", {**KTO, "kl": torch.zeros((), device=META)}),
    (ValueError, "kl has dtype torch.int64", {**KTO, "kl": torch.tensor(1)}),
    (
        ValueError,
        "kl has dtype torch.float16, in which it is rounded",
        {**KTO, "kl": torch.tensor(0.1).half()},
    ),
    # pairs
    (
        ValueError,
        "pairs contains 4, expected sequence indices in [0, 4) or -1",
        {"pairs": [[0, 4]]},
    ),
    (ValueError, "pairs contains -2, expected sequence indices", {"pairs": [[0, -2]]}),
    (ValueError, "pairs contains -1, expected both sides of every pair", {"pairs": [[0, -1]]}),
    (
        ValueError,
        "pairs contains [-1, -1], expected at least one side",
        {**KTO, "pairs": [[0, 1], [-1, -1]]},
    ),
    (
        ValueError,
        "pairs has shape (2,) and dtype torch.int64, expected (P, 2) integers",
        {"pairs": [0, 1]},
    ),
    (ValueError, "pairs has shape (1, 3)", {"pairs": [[0, 1, 2]]}),
    (ValueError, "pairs has shape (0, 2)", {"pairs": torch.zeros(0, 2, dtype=torch.int64)}),
    (ValueError, "dtype torch.float32, expected (P, 2) integers", {"pairs": torch.zeros(1, 2)}),
    (ValueError, "dtype torch.bool, expected (P, 2) integers", {"pairs": [[True, False]]}),
    (
        TypeError,
        "pairs is [[0, 1], [2]], expected (P, 2) sequence indices",
        {"pairs": [[0, 1], [2]]},
    ),
    (TypeError, "pairs is 'all', expected (P, 2) sequence indices", {"pairs": "all"}),
    (
        ValueError,
        "ref_logps has one value per sequence, expected (chosen, rejected) by pair",
        {**LD, "pairs": [[0, 1], [0, 2]]},
    ),
    (
        ValueError,
        "ref_logps has one value per sequence, expected (chosen, rejected) by pair",
        {"loss": losses.length_desensitised(losses.get("kto"), 0.5), "pairs": [[0, -1], [0, 1]]},
    ),
    # options
    (
        ValueError,
        "reduction is 'avg', expected one of ('mean', 'sum', 'none')",
        {"reduction": "avg"},
    ),
    (ValueError, "reduction is None", {"reduction": None}),
    (ValueError, "engine is 'cuda', expected 'auto' or one of", {"engine": "cuda"}),
    (ValueError, "engine is None, expected 'auto'", {"engine": None}),
    (
        ValueError,
        "workspace_bytes is 0, expected a positive number of bytes",
        {"workspace_bytes": 0},
    ),
    (ValueError, "workspace_bytes is -1", {"workspace_bytes": -1}),
    (ValueError, "workspace_bytes is 1000000.0", {"workspace_bytes": 1e6}),
    (ValueError, "workspace_bytes is True", {"workspace_bytes": True}),
    (
        ValueError,
        "statistics contains 'perplexity', expected names among",
        {"statistics": ("entropy", "perplexity")},
    ),
    (ValueError, "statistics contains 'aligned_logps'", {"statistics": ("aligned_logps",)}),
    (TypeError, "statistics is 'entropy', expected a sequence of names", {"statistics": "entropy"}),
    (TypeError, "statistics is None, expected a sequence of names", {"statistics": None}),
    (ValueError, "softcap is 0, expected a positive finite number or None", {"softcap": 0}),
    (ValueError, "softcap is -2.0", {"softcap": -2.0}),
    (ValueError, "softcap is nan", {"softcap": float("nan")}),
    (ValueError, "softcap is True", {"softcap": True}),
    (ValueError, "logit_scale is None, expected a positive finite number", {"logit_scale": None}),
    (ValueError, "logit_scale is inf", {"logit_scale": float("inf")}),
    (ValueError, "temperature is 0.0, expected a positive finite number", {"temperature": 0.0}),
    (ValueError, "temperature is '1'", {"temperature": "1"}),
    (TypeError, "shift_labels is None, expected True or False", {"shift_labels": None}),
    (TypeError, "shift_labels is 1, expected True or False", {"shift_labels": 1}),
    (TypeError, "check_finite is 'yes', expected True or False", {"check_finite": "yes"}),
    # the loss
    (ValueError, "loss is 'dppo', which is not a loss (did you mean", {"loss": "dppo"}),
    (TypeError, "loss is 3, expected a name, a PreferenceLoss object or a function", {"loss": 3}),
    (TypeError, "expected a name, a PreferenceLoss object", {"loss": type(losses.get("dpo"))}),
    (
        ValueError,
        "returned (), expected one value per pair: a tensor of shape (2,)",
        {"loss": lambda pairs: pairs.chosen.mean()},
    ),
    (ValueError, "returned float, expected one value per pair", {"loss": lambda pairs: 0.0}),
    (
        ValueError,
        "this loss reads the reference's log-probabilities: pass ref_logps=",
        {"loss": lambda pairs: pairs.chosen_logratios, "ref_logps": None},
    ),
    (
        ValueError,
        "this loss reads the reference's log-probabilities: pass ref_logps=",
        {
            "loss": losses.wpo_weighted(losses.pairwise(lambda pairs: pairs.chosen_logratios)),
            "ref_logps": None,
        },
    ),
]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "no gradient"])
@pytest.mark.parametrize(
    ("error", "message", "spoilt"),
    WRONG,
    ids=[f"{i} {m[:30]}" for i, (_, m, _) in enumerate(WRONG)],
)
def test_a_wrong_argument_is_named(
    error: type[Exception], message: str, spoilt: dict[str, Any], trained: bool
) -> None:
    arguments = {**good(), **spoilt}
    if trained and isinstance(arguments["weight"], Tensor):
        arguments["weight"] = arguments["weight"].detach().requires_grad_()
    with pytest.raises(error, match=re.escape(message)):
        fused_preference_loss(
            arguments.pop("hidden"),
            arguments.pop("weight"),
            arguments.pop("labels"),
            **arguments,
        )


def test_the_arguments_that_are_spoilt_are_right() -> None:
    arguments = good()
    assert fused_preference_loss(**arguments).loss.isfinite()
    assert fused_preference_loss(**{**arguments, **packed(longs(0, 6, 12, 18, 24))}).loss.isfinite()
    assert fused_preference_loss(**{**arguments, **REF_HIDDEN}).loss.isfinite()
    assert fused_preference_loss(**{**arguments, **KTO, "kl": torch.tensor(0.1)}).loss.isfinite()
    assert fused_preference_loss(**{**arguments, **LD, "pairs": [[0, 1]]}).loss.isfinite()


@pytest.mark.parametrize(
    ("error", "message", "option"),
    [
        (ValueError, "DPOP: beta is 0.0, expected a finite number > 0", {"beta": 0.0}),
        (ValueError, "DPOP: lam is -1.0, expected a finite number >= 0", {"lam": -1.0}),
        (ValueError, "DPOP: form is 'between', expected one of", {"form": "between"}),
        (ValueError, "DPOP: label_smoothing is 0.5, expected", {"label_smoothing": 0.5}),
        (TypeError, "DPOP: beta is '0.3', expected", {"beta": "0.3"}),
    ],
)
def test_fused_dpop_loss_names_its_options(
    error: type[Exception], message: str, option: dict[str, Any]
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fused_dpop_loss(**{**good(), **option})


def test_autocast_takes_no_float64_weight() -> None:
    arguments = {**good(), "weight": torch.randn(V, H).double()}
    message = "weight has dtype torch.float64, expected one of .* under autocast"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=message):
        fused_preference_loss(**arguments)


def test_an_engine_that_cannot_run_here_says_why() -> None:
    from fastdpop import engines
    from fastdpop.engines.eager import EagerEngine

    class Elsewhere(EagerEngine):
        name = "elsewhere"

        def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
            return f"it needs a GPU, not {device.type}"

    engines.register(Elsewhere())
    try:
        assert fused_preference_loss(**good()).loss.isfinite()
        message = "engine 'elsewhere' cannot run on cpu: it needs a GPU, not cpu"
        with pytest.raises(ValueError, match=message):
            fused_preference_loss(**good(), engine="elsewhere")
    finally:
        engines._ENGINES.pop("elsewhere")
