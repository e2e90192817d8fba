"""A sample of the sweep over every causal language model (`make models` runs it all), and the page it writes."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
if sys.version_info < (3, 11):
    pytest.skip(
        "the sample and the page are of a transformers without Python 3.10", allow_module_level=True
    )

import transformers

from fastdpop import attach
from tests.models import sweep
from tests.models.outcome import Outcome
from tests.models.page import POPULAR
from tests.models.shrink import FIXES, LEFT_OUT
from tests.models.sweep import NAMES, PAGE, compare

SAMPLE = (
    "bert",  # bias, behind further layers
    "cohere2",  # logit scale
    "deepseek_v3",  # latent attention
    "dory",  # a learned factor for each token
    "falcon_h1",  # state spaces beside attention, logit scale
    "fuyu",  # a language model inside another model
    "gemma4",  # softcap, vision and audio
    "gpt2",  # tied
    "jamba",  # mixed layers, router loss
    "mllama",  # vision-language
    "phimoe",  # router loss and a bias
    "qwen3",
)


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore")  # transformers' advice on the shrunken configurations
def test_a_sample(name: str) -> None:
    assert compare(name).error is None


def _gradient_off(norm: nn.Parameter) -> None:
    norm.register_hook(lambda gradient: gradient * 1.001)


def _gradient_missing(norm: nn.Parameter) -> None:
    norm.requires_grad_(False)


def _logps_off(norm: nn.Parameter) -> None:
    norm.data.mul_(1.001)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_gradient_off, r"the gradient of model.norm.weight is off by 0.0009"),
        (_gradient_missing, r"gradient in one of the two: \['model.norm.weight'\]"),
        (_logps_off, "not close"),
    ],
)
def test_a_difference_is_found(
    spoil: Callable[[nn.Parameter], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attach_and_spoil(model: Any) -> Any:
        attach(model)
        spoil(model.model.norm.weight)
        return model

    monkeypatch.setattr(sweep, "attach", attach_and_spoil)
    with pytest.raises(AssertionError, match=message):
        compare("llama")


def _good(name: str) -> Outcome:
    return Outcome(name)


def _large(name: str) -> Outcome:
    torch.empty(2**28, dtype=torch.uint8)  # more than malloc may have kept from before
    return Outcome(name)


def _endless(name: str) -> Outcome:
    end = time.process_time() + 60
    while time.process_time() < end:
        pass
    return Outcome(name)


@pytest.mark.parametrize(
    ("task", "error"),
    [(_good, None), (_large, "allocate memory"), (_endless, "took more than 1 second")],
)
def test_limits(task: Callable[[str], Outcome], error: str | None) -> None:
    outcomes = list(sweep.sweep(("a", "b"), jobs=2, task=task, seconds=1, size=2**24))
    assert [outcome.name for outcome in outcomes] == ["a", "b"]
    for outcome in outcomes:
        assert outcome.error is None if error is None else error in str(outcome.error)


def test_the_page_is_of_this_version() -> None:
    """`make models` writes it; it lists every type of model once, the popular ones first, and leaves out those
    that are known.
    """
    text = PAGE.read_text()
    right = text[text.index("## Types that agree") : text.index("## Shared prefixes")]
    listed = re.findall(r"^\| `(.+?)` \|", right, re.MULTILINE)
    rest = text[text.index("## Types that are left out") :]
    assert f"transformers {transformers.__version__} has {len(NAMES)} types" in text
    assert sorted(listed) == sorted(set(NAMES) - LEFT_OUT.keys())
    assert listed[: len(POPULAR)] == list(POPULAR)
    assert listed[len(POPULAR) :] == sorted(listed[len(POPULAR) :])
    assert all(f"| `{name}` | {reason}" in rest for name, reason in LEFT_OUT.items())
    assert len(NAMES) - len(LEFT_OUT) >= 165


def test_every_exception_is_of_a_model_that_exists() -> None:
    parts = {
        type(part).model_type
        for model_type in FIXES.keys() & set(transformers.CONFIG_MAPPING)
        for part in vars(transformers.CONFIG_MAPPING[model_type]()).values()
        if isinstance(part, transformers.PretrainedConfig)
    }
    assert LEFT_OUT.keys() <= set(NAMES)
    assert FIXES.keys() - parts <= set(transformers.CONFIG_MAPPING)
