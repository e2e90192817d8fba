"""An attached model's numbers for a monitor, and values of pairs, against its own logits and hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from fastdpop import attach
from tests.displacing import NAMES, of_pairs
from tests.hf.test_exact import Casting
from tests.hf.test_heads import lora
from tests.tiny_models import DPOP, V, tiny

ASKED = {"statistics": ["displacement"]}


def batch() -> dict[str, Any]:
    """Three pairs of a prompt and a beginning in common, one of which ends early, one of which is identical."""
    torch.manual_seed(0)
    ids = torch.randint(3, V, (6, 12))
    for p, shared in enumerate((5, 8, 12)):
        ids[3 + p, :shared] = ids[p, :shared]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_own_logits(model: Any, inputs: dict[str, Any], pairs: list[list[int]]) -> dict[str, Tensor]:
    """By the definitions, from what the model itself returns."""
    with torch.no_grad():
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    logps = out.logits[:, :-1].double().log_softmax(-1)
    own = logps.gather(-1, ids[:, 1:, None])[..., 0]
    own = torch.nn.functional.pad(own, (1, 0))
    return of_pairs(out.hidden_states[-1], inputs["labels"], own, pairs)


def assert_displacement(out: Any, want: dict[str, Tensor]) -> None:
    for name in NAMES:
        torch.testing.assert_close(out[name].double(), want[name], rtol=1e-5, atol=1e-5, msg=name)


PAIRS = {"halves": [[0, 3], [1, 4], [2, 5]], "others": [[2, 5], [4, 1], [0, 3], [0, 4]]}


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma2, softcap", "cohere, logit scale"])
def test_as_by_its_own_logits(name: str, shared: bool, pairs: str) -> None:
    model, inputs, sides = tiny(name), batch(), PAIRS[pairs]
    want = by_own_logits(model, inputs, sides)
    attach(model, share_prefixes=shared)
    refs = torch.full((6,), -30.0)
    weights = torch.tensor([0.5, 3.0, 0.0, 1.0])[: len(sides)]
    given = {"preference": DPOP, "ref_logps": refs}
    options = {**ASKED, "pairs": None if pairs == "halves" else sides}
    out = model(
        **inputs, **given, preference_options={**options, "pair_values": {"weight": weights}}
    )
    assert_displacement(out, want)
    assert want["differs"].any()
    assert not want["differs"].all()
    plain = model(**inputs, **given, preference_options=options)
    torch.testing.assert_close(out.losses, plain.losses * weights)
    torch.testing.assert_close(out.loss, (plain.losses * weights).mean())
    assert all(model(**inputs, **given).get(name) is None for name in NAMES)


def test_a_cast_does_not_reach_it() -> None:
    model, inputs = attach(tiny(dtype=torch.float32)), batch()
    given = {"preference": "sft", "preference_options": ASKED}
    want, out = model(**inputs, **given), Casting(model)(**inputs, **given)
    for name in NAMES:
        assert torch.equal(getattr(out, name), getattr(want, name)), name
        assert out[name].dtype == (torch.bool if name == "differs" else torch.float32)


@pytest.mark.filterwarnings("ignore:.*lora_bias")
@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["q_proj"]], ids=["head", "trunk"])
def test_an_adapter_of_the_head_is_no_part_of_the_state(targets: list[str]) -> None:
    pytest.importorskip("peft")
    model, inputs = lora(tiny(), target_modules=targets), batch()
    want = by_own_logits(model, inputs, PAIRS["halves"])
    attach(model)
    out = model(**inputs, preference="sft", preference_options=ASKED)
    assert_displacement(out, want)


def test_what_log_probs_alone_do_not_take() -> None:
    model = attach(tiny())
    for options in ({"pair_values": {}}, {"statistics": ["displacement"]}, {"state_columns": 3}):
        with pytest.raises(ValueError, match="preference_options contains"):
            model(**batch(), return_logps=True, preference_options=options)
