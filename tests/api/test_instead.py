"""What newcomers pass to the fused functions by mistake, and what the messages tell them to pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastdpop
from fastdpop import fused_dpop_loss, fused_logps, fused_preference_loss, losses
from fastdpop.names import near

S, T, H, V = 4, 6, 8, 19
HIDDEN, WEIGHT = torch.ones(S, T, H), torch.ones(V, H)
LABELS, REF = torch.ones(S, T, dtype=torch.int64), torch.full((S,), -9.0)
GIVEN: dict[str, Any] = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "ref_logps": REF}

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "logits": ({"hidden": torch.ones(S, T, V)}, "if these are logits, pass the hidden states"),
    "transposed": ({"weight": WEIGHT.T}, "if weight is transposed, weight.T"),
    "a head": (
        {"weight": nn.Linear(H, V)},
        "weight is Linear, expected a torch.Tensor: its .weight",
    ),
    "all layers": (
        {"hidden": (HIDDEN, HIDDEN)},
        "hidden is tuple, expected a torch.Tensor: the last",
    ),
    "a trunk's output": (
        {"hidden": SimpleNamespace(last_hidden_state=HIDDEN)},
        "its .last_hidden_state",
    ),
    "a model's output": (
        {"hidden": SimpleNamespace(logits=0, hidden_states=(HIDDEN,))},
        "its .hidden_states[-1]",
    ),
    "no hidden states": (
        {"hidden": SimpleNamespace(logits=0, hidden_states=None)},
        "which output_hidden_states=True gives",
    ),
    "an array": (
        {"hidden": HIDDEN.numpy()},
        "hidden is ndarray, expected a torch.Tensor: torch.as_te",
    ),
    "a mask": ({"labels": LABELS > 0}, "of a mask, input_ids.masked_fill(~mask, -100)"),
    "a float mask": ({"labels": LABELS.float()}, "expected torch.int64: token ids, -100 where not"),
    "a list of labels": (
        {"labels": LABELS.tolist()},
        "labels is list, expected a torch.Tensor: torch.",
    ),
    "a reference's output": ({"ref_logps": SimpleNamespace(logps=REF)}, "(2,): its .logps"),
    "numbers": ({"ref_logps": [1.0, 2.0, 3.0, 4.0]}, "(2,): torch.as_tensor(...) makes one"),
    "exact": ({"ref_logps": fastdpop.exact(REF)}, "its .value, since fastdpop.exact is for"),
    "a loss of torch": ({"loss": nn.CrossEntropyLoss()}, "which compares logits with labels"),
    "several losses": (
        {"loss": ["dpo", "sft"]},
        "a sum of losses is written get('dpop') + 0.1 * get",
    ),
    "a class": ({"loss": losses.DPOP}, "DPOP(), not the class"),
    "beta": (
        {"beta": 0.1},
        "it is an option of the loss, expected loss=losses.get('dpop', beta=0.1)",
    ),
    "TRL's lambda": ({"loss": "dpop", "dpop_lambda": 5}, "expected loss=losses.get('dpop', lam=5)"),
    "not its option": (
        {"loss": "simpo", "lam": 5},
        "the loss 'simpo' has no option 'lam'; it has beta",
    ),
    "a reference": (
        {"reference_logps": REF},
        "no argument 'reference_logps' (did you mean 'ref_logps'?)",
    ),
    "a label": ({"label": LABELS}, "no argument 'label' (did you mean 'labels'?)"),
    "a model": (
        {"model": None},
        "fastdpop.preference_loss(model, **batch, loss=...) takes a model",
    ),
    "an engine": ({"engine": "cuda"}, "(did you mean 'triton'?)"),
    "a statistic": ({"statistics": ["accuracy"]}, "(did you mean 'token_accuracy'?)"),
    "a reduction": ({"reduction": "batchmean"}, "(did you mean 'mean'?)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_to_pass(name: str) -> None:
    given, message = MISTAKES[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        fused_preference_loss(**{**GIVEN, **given})


def test_other_functions() -> None:
    call: Callable[..., Any] = fused_dpop_loss
    with pytest.raises(TypeError, match=r"fused_dpop_loss has no .*'lambda_' \(did you mean 'lam'"):
        call(**GIVEN, lambda_=5)
    with pytest.raises(TypeError, match="the loss 'dpop' has no option 'gamma'"):
        call(**GIVEN, gamma=5)
    call = fused_logps
    with pytest.raises(TypeError, match="'loss', expected none: fused_preference_loss takes any"):
        call(HIDDEN, WEIGHT, LABELS, loss="dpop")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dpo_positive", "dpop"),
        ("dpo-positive", "dpop"),
        ("DPOP", "dpop"),
        ("dpop_loss", "dpop"),
        ("ipo_loss", "ipo"),
        ("Sigmoid", "sigmoid"),
        ("kto_pair", "kto"),
        ("aot_pair", "aot"),
        ("bco", "bco_pair"),
        ("sppo", "sppo_hard"),
        ("SimPO", "simpo"),
        ("alphapo", "alpha_po"),
        ("slic", "hinge"),
    ],
)
def test_names_of_losses(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"not a loss \(did you mean '{meant}'"):
        losses.get(name)


@pytest.mark.parametrize("name", ["lambda_", "lambda", "lambd", "dpop_lambda", "LAM"])
def test_names_of_options(name: str) -> None:
    with pytest.raises(
        TypeError, match=rf"no option '{name}' \(did you mean 'lam'\?\); it has beta"
    ):
        losses.get("dpop", **{name: 5.0})
    with pytest.raises(TypeError, match=r"'temperature' \(did you mean 'beta'\?\)"):
        losses.get("dpo", temperature=0.1)


def test_nothing_is_guessed() -> None:
    assert near("xyzzy", losses.available()) == []
    assert near("", ["mean"]) == near(["a"], ["mean"]) == []
    with pytest.raises(ValueError, match="'xyzzy', which is not a loss: expected one of dpop, dpo"):
        losses.get("xyzzy")
