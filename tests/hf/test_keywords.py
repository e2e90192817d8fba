"""A keyword that would have an effect under another name, or elsewhere, is refused, not swallowed by the model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fastdpop import losses
from fastdpop.hf import PreferenceModelOutput, attach, preference_loss
from tests.hf.test_lifecycle import lora
from tests.tiny_models import DPOP, batch, tiny

REF = torch.full((4,), -40.0, dtype=torch.float64)

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"beta": 0.1}, "preference=losses.get('dpop', beta=0.1)", "loss=losses.get('dpop', beta=0.1)"),
    ({"lambda_": 5.0}, "preference=losses.get('dpop', lam=5.0)", "losses.get('dpop', lam=5.0)"),
    ({"dpop_lambda": 5.0}, "losses.get('dpop', lam=5.0)", "losses.get('dpop', lam=5.0)"),
    ({"gamma": 1.0}, "'dpop' has no option 'gamma'; it has beta", "has no option 'gamma'"),
    ({"engine": "eager"}, "fastdpop.attach(model, engine=...)", "attach(model, engine=...)"),
    ({"softcap": 3.0}, "finds it in the model", "finds it in the model"),
    ({"ref_logp": REF}, "did you mean 'ref_logps'?", "did you mean 'ref_logps'?"),
    ({"ref_chosen_logps": REF}, "did you mean 'ref_logps'?", "did you mean 'ref_logps'?"),
    ({"label": REF}, "did you mean 'labels'?", "did you mean 'labels'?"),
    ({"attention_masks": REF}, "did you mean 'attention_mask'?", "mean 'attention_mask'?"),
    ({"loss_type": "dpop"}, "did you mean 'preference'?", "did you mean 'loss'?"),
    ({"preferences": "dpo"}, "did you mean 'preference'?", ""),
    ({"weight": REF[:2]}, "{'pair_values': {'weight': ...}}", "pair_values={'weight': ...}"),
    ({"margin": REF[:2]}, "{'pair_values': {'margin': ...}}", "pair_values={'margin': ...}"),
    ({"loss": "dpop"}, "expected preference=", ""),
    ({"reduction": "sum"}, "expected preference_options={'reduction': ...}", ""),
    ({"pairs": [[0, 2]]}, "expected preference_options={'pairs': ...}", ""),
    ({"share_prefixes": True}, "expected preference_options={'share_prefixes': ...}", ""),
]


@pytest.mark.parametrize(("given", "attached", "by_itself"), REFUSED, ids=lambda x: str(x)[:24])
def test_what_has_no_effect(given: dict[str, Any], attached: str, by_itself: str) -> None:
    (name,) = given
    for model in (attach(tiny()), attach(lora(tiny()))):
        message = (
            f"LlamaForCausalLM was given '{name}', which nothing reads: .*{re.escape(attached)}"
        )
        with pytest.raises(TypeError, match=message):
            model(**batch(), preference="dpop", ref_logps=REF, **given)
        with pytest.raises(TypeError, match=f"given '{name}', which nothing reads"):
            model(**batch(), return_logps=True, **given)
        if by_itself:
            with pytest.raises(TypeError, match=re.escape(by_itself)):
                preference_loss(model, **batch(), loss="dpop", ref_logps=REF, **given)


@pytest.mark.parametrize(
    "option", sorted({o for n in losses.available() for o in losses.options_of(n)})
)
def test_no_option_of_any_loss_is_swallowed(option: str) -> None:
    model = attach(tiny(), check=False)
    for loss in ("dpop", DPOP):
        with pytest.raises(TypeError, match=f"given '{option}', which nothing reads"):
            model(**batch(), preference=loss, ref_logps=REF, **{option: 0.1})


def test_what_models_of_transformers_take_is_passed_on() -> None:
    """Attention's own keywords, and columns of data that are named like nothing here."""
    given = {
        "position_ids": torch.arange(9).expand(4, -1),
        "cu_seq_lens_q": None,
        "max_length_q": None,
        "output_router_logits": False,
        "token_type_ids": None,
        "pixel_values": None,
        "prompt_ids": None,
        "return_loss": None,
        "is_causal": True,
        "use_cache": False,
    }
    seen: dict[str, Any] = {}
    model = attach(tiny())
    model.model.register_forward_pre_hook(lambda _, args, kw: seen.update(kw), with_kwargs=True)
    inputs = batch()
    for call in (
        lambda: model(**inputs, preference=DPOP, ref_logps=REF, **given),
        lambda: preference_loss(model, **inputs, loss=DPOP, ref_logps=REF, **given),
    ):
        seen.clear()
        out = call()
        assert isinstance(out, PreferenceModelOutput)
        assert seen.keys() >= given.keys() - {"output_router_logits"}


def test_transformers_trainer_is_told_what_it_leaves_to_the_model() -> None:
    model, inputs = attach(tiny()), batch()
    want = model(**inputs, preference=DPOP, ref_logps=REF).loss
    with pytest.warns(UserWarning, match=r"Set trainer\.model_accepts_loss_kwargs = False"):
        out = model(**inputs, preference=DPOP, ref_logps=REF, num_items_in_batch=3)
    assert torch.equal(out.loss, want)


def test_an_argument_of_the_models_own_keeps_its_meaning() -> None:
    model = tiny()
    own = type(model).forward
    seen = []

    def forward(self: Any, *args: Any, beta: float | None = None, **kwargs: Any) -> Any:
        seen.append(beta)
        return own(self, *args, **kwargs)

    model.forward = forward.__get__(model)
    model.config.return_dict = True
    attach(model, check=False)
    model(**batch(), preference=DPOP, ref_logps=REF, beta=0.25)
    assert seen == [0.25]


def test_a_model_that_takes_no_keyword_that_it_does_not_know() -> None:
    model = tiny("gpt2")
    own = type(model).forward

    def forward(
        self: Any, input_ids: Any = None, attention_mask: Any = None, return_dict: Any = None
    ) -> Any:
        return own(self, input_ids, attention_mask=attention_mask, return_dict=return_dict)

    model.forward = forward.__get__(model)
    attach(model, check=False)
    with pytest.raises(TypeError, match="GPT2LMHeadModel was given 'xyz', which nothing reads"):
        model(**batch(), preference=DPOP, ref_logps=REF, xyz=1)


ALONE: list[tuple[dict[str, Any], str]] = [
    ({"preferences": "simpo"}, "did you mean 'preference'?"),
    ({"prefrence": "simpo"}, "did you mean 'preference'?"),
    ({"loss_type": "simpo"}, "did you mean 'preference'?"),
    ({"preference_loss": "dpop"}, "did you mean 'preference'?"),
    ({"loss": "simpo"}, "expected preference="),
    ({"return_logp": True}, "did you mean 'return_logps'?"),
    ({"returnlogps": True}, "did you mean 'return_logps'?"),
    ({"ref_log_probs": REF}, "did you mean 'ref_logps'?"),
    ({"ref_logp": REF}, "did you mean 'ref_logps'?"),
    ({"beta": 0.1}, "preference=losses.get(name, beta=0.1)"),
    ({"share_prefixes": True}, "expected preference_options={'share_prefixes': ...}"),
    ({"engine": "eager"}, "expected fastdpop.attach(model, engine=...)"),
]


@pytest.mark.parametrize(("given", "message"), ALONE, ids=lambda x: str(x)[:24])
def test_a_misspelt_keyword_asks_for_no_cross_entropy(given: dict[str, Any], message: str) -> None:
    (name,) = given
    for model in (attach(tiny()), attach(lora(tiny()))):
        said = f"given '{name}', which nothing reads without preference=: .*{re.escape(message)}"
        with pytest.raises(TypeError, match=said):
            model(**batch(), **given)


def test_a_plain_call_takes_what_it_always_took() -> None:
    model, inputs = tiny(), batch()
    given = {"weight": REF, "margin": REF, "my_column": 3, "num_items_in_batch": 3, "beta": None}
    given |= {"references": ["a"], "label": 1, "pairs": [(0, 1)], "check": True, "alpha": [0.5]}
    given |= {"num_logits_to_keep": 1, "return_logits": True, "completion_mask": [1], "group": 0}
    want = model(**inputs, **given).loss
    assert torch.equal(attach(model)(**inputs, **given).loss, want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"foo": 1}, "leave it out"),
        ({"loss_weights": [1.0]}, "leave it out"),
        ({"chosen_input_ids": REF}, "leave it out"),
        ({"completion_mask": REF}, "labels are -100 where a token is not scored"),
        ({"average_log_prob": True}, "ipo, simpo, orpo and sigmoid_norm take means"),
        ({"reference": REF}, "did you mean 'ref_logps'?"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_what_no_module_has_a_name_for(given: dict[str, Any], message: str) -> None:
    (name,) = given
    said = f"LlamaForCausalLM was given '{name}', which nothing reads: .*{re.escape(message)}"
    model = attach(tiny())
    with pytest.raises(TypeError, match=said):
        model(**batch(), preference=DPOP, ref_logps=REF, **given)
    with pytest.raises(TypeError, match=said):
        preference_loss(model, **batch(), loss=DPOP, ref_logps=REF, **given)


def test_somebody_elses_model_may_read_any_name() -> None:
    model = tiny()
    seen: dict[str, Any] = {}

    class Own(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.update(kwargs)
            kwargs.pop("foo", None)
            return super().forward(*args, **kwargs)

    model.__class__ = Own
    attach(model)(**batch(), temperature=2.0)
    assert seen.pop("temperature") == 2.0
    attach(model)(**batch(), preference=DPOP, ref_logps=REF, foo=1)
    assert seen["foo"] == 1


def test_a_batch_that_is_not_given_by_keyword() -> None:
    model, inputs = attach(tiny()), batch()
    with pytest.raises(TypeError, match=r"input_ids is a dict, .*model\(\*\*batch, \.\.\.\)"):
        model(inputs, return_logps=True)
    with pytest.raises(TypeError, match=r"given a dict behind the model, .*\*\*batch, loss="):
        preference_loss(model, inputs, loss=DPOP)  # type: ignore[misc]


def test_a_preference_that_is_no_loss_is_called_that() -> None:
    with pytest.raises(ValueError, match=r"^preference is 'DPO', .*did you mean 'dpo'"):
        attach(tiny())(**batch(), preference="DPO")


def test_token_ids_of_another_tokenizer() -> None:
    model, inputs = attach(tiny()), batch()
    inputs["input_ids"] = inputs["input_ids"] + 5000
    with pytest.raises(ValueError, match=r"input_ids contains \d+, expected ids in \[0, 97\), the"):
        model(**inputs, return_logps=True)


def test_a_router_loss_that_is_not_there() -> None:
    model, inputs = attach(tiny()), batch()
    with pytest.raises(ValueError, match=r"router_loss_weight is 0\.1, but LlamaForCausalLM repor"):
        model(**inputs, preference=DPOP, ref_logps=REF, router_loss_weight=0.1)
    model(**inputs, preference=DPOP, ref_logps=REF, router_loss_weight=0.0)
