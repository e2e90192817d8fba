"""What an attached model returns: a mapping, with the metrics of its loss."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

pytest.importorskip("transformers")

from fastdpop import attach, fused_preference_loss
from fastdpop.hf import PreferenceModelOutput
from tests.tiny_models import DPOP, batch, tiny

REF = -40 + torch.arange(4, dtype=torch.float64)


def output() -> PreferenceModelOutput:
    out: PreferenceModelOutput = attach(tiny("llama"))(
        **batch(), preference=DPOP, ref_logps=REF, preference_options={"statistics": ["entropy"]}
    )
    return out


def test_metrics_are_those_of_the_fused_function() -> None:
    model, inputs = attach(tiny("llama")), batch()
    out = model(**inputs, preference=DPOP, ref_logps=REF)
    hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    own = fused_preference_loss(
        hidden.last_hidden_state, model.lm_head.weight, inputs["labels"], loss=DPOP, ref_logps=REF
    )
    assert out.metrics() == pytest.approx(own.metrics(), rel=1e-9)
    assert {"loss", "rewards/margins", "hinge_on"} <= out.metrics().keys()
    assert repr(out) == repr(own).replace("PreferenceOutput", "PreferenceModelOutput")


def test_the_router_s_loss() -> None:
    out = attach(tiny("mixtral, router loss"))(**batch(), preference="simpo")
    found = out.metrics()
    assert found["aux_loss"] == pytest.approx(out.aux_loss.item())
    assert (
        found["loss"] == pytest.approx(out.loss.item()) != pytest.approx(out.losses.mean().item())
    )


def test_log_probs_alone_have_no_metrics() -> None:
    out = attach(tiny("llama"))(**batch(), return_logps=True)
    with pytest.raises(ValueError, match=r"metrics\(\) needs the loss of pairs.*are in \.logps"):
        out.metrics()
    assert repr(out) == "PreferenceModelOutput(logps: (4,))"


def test_it_is_still_a_mapping_that_can_be_copied() -> None:
    out = output()
    assert dict(out).keys() == set(out)
    assert "entropy" in out
    assert "ches" not in out
    assert out["pairs"].tolist() == [[0, 2], [1, 3]]
    assert out[0] is out.loss
    leaves, layout = tree_flatten(out)
    for same in (
        tree_unflatten(leaves, layout),
        copy.copy(out),
        pickle.loads(
            pickle.dumps(PreferenceModelOutput(**{k: v.detach() for k, v in out.items()}))
        ),
    ):
        assert same.metrics() == out.metrics()
        assert repr(same) == repr(out)
