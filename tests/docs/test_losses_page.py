"""docs/losses.md: a card for every loss, with the options that the loss has."""

from __future__ import annotations

import inspect
import re

import pytest

from fastdpop import losses
from tests.docs.site import DOCS

CARD = re.compile(
    r'<div class="loss item" data-kinds="([\w ]+)" markdown>\n\n#### (\w+)\n\n\$\$\n(.+?)\n\$\$\n\n'
    r"(.+?)\n\n(.+?)\n\n\*\*Take it if\*\* (.+?)\n\n\*\*Rather not.*?\*\* (.+?)\n\n(.+?)\n\n</div>"
)
CARDS = {match[2]: match for match in CARD.finditer((DOCS / "losses.md").read_text("utf-8"))}
OTHER_NAMES = {"sigmoid": "dpo", "listwise": "plackett_luce"}


def test_every_loss_has_one_card() -> None:
    assert sorted(CARDS) == sorted(losses.available())


@pytest.mark.parametrize("name", losses.available())
def test_card(name: str) -> None:
    kinds, _, _, paper, options, _, _, cost = CARDS[name].groups()
    loss = losses.get(name)
    assert ("free" in kinds.split()) == (not loss.traits.needs_reference)
    assert cost.startswith("needs a reference" if loss.traits.needs_reference else "no reference")
    assert ("unpaired" in kinds.split()) == loss.traits.accepts_unpaired
    assert ("listwise" in kinds.split()) == ("list" in loss.traits.needs)
    assert ("scores" in kinds.split()) == ("chosen_score" in loss.traits.needs)
    if loss.traits.couples_pairs:
        assert "batch" in kinds.split()
        assert "4 products" in cost
    assert "arxiv.org/abs/" in paper or name in OTHER_NAMES or name == "sft"

    shown = dict(re.findall(r"`(\w+)=([^`]+)`", options))
    assert ("`divergence`" in options) == hasattr(loss, "divergence")
    make = losses._LOSSES[name]
    for option, parameter in inspect.signature(make).parameters.items():
        if option in ("divergence", "alpha") and hasattr(loss, "divergence"):
            continue  # they have a section of their own
        default = getattr(loss, option, parameter.default)
        assert shown.pop(option).replace('"', "'") == repr(default), option
    assert not shown


@pytest.mark.parametrize(("name", "other"), OTHER_NAMES.items())
def test_another_name_has_the_same_formula(name: str, other: str) -> None:
    assert CARDS[name][3] == CARDS[other][3]
    assert CARDS[name][5] == CARDS[other][5]
