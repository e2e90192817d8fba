"""Scores of pairs against a model's own logits and hidden states, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from fastdpop import attach, is_attached
from fastdpop.analysis.score import (
    Mean,
    PairScores,
    around_edit,
    by_position,
    first_difference,
    score_pairs,
)
from tests.analysis.cases import PAIRS, own_logps, own_states
from tests.tiny_models import CONFIGS, tiny


@pytest.mark.parametrize("name", ["llama, tied", "gemma2, softcap", "cohere, logit scale", "gpt2"])
@pytest.mark.parametrize("batch_pairs", [3, 100])
def test_token_logps_are_the_models_own(name: str, batch_pairs: int) -> None:
    model = tiny(name)
    scores = score_pairs(model, PAIRS, batch_pairs=batch_pairs)
    assert len(scores) == len(PAIRS)
    for i, side in itertools.product(range(len(PAIRS)), ("chosen", "rejected")):
        found = scores.side(side)[i]
        assert found.dtype == torch.float64
        # Norms compute in float32, whatever a model's weights are in.
        torch.testing.assert_close(found, own_logps(model, PAIRS[i], side), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        scores.sums("rejected"), torch.stack([x.sum() for x in scores.rejected_logps])
    )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_ches_by_hand(name: str) -> None:
    model = tiny(name)
    scores = score_pairs(model, PAIRS, batch_pairs=4)
    assert scores.ches is not None
    assert scores.ches_normalised is not None
    for i, pair in enumerate(PAIRS):
        chosen, rejected = (own_states(model, pair, side)[1] for side in ("chosen", "rejected"))
        w, l = chosen.sum(0), rejected.sum(0)  # noqa: E741
        assert float(scores.ches[i]) == pytest.approx(float(w @ l - w @ w), rel=1e-5, abs=1e-4)
        w, l = w / max(len(chosen), 1), l / max(len(rejected), 1)  # noqa: E741
        assert float(scores.ches_normalised[i]) == pytest.approx(
            float(w @ l - w @ w), rel=1e-5, abs=1e-4
        )
    assert float(scores.ches[1]) == pytest.approx(0, abs=1e-4)  # equal completions


def test_a_model_that_cannot_share_prefixes() -> None:
    model = tiny("llama")
    model.config.reorder_and_upcast_attn = True
    with pytest.warns(UserWarning, match="reorder_and_upcast_attn"):
        found = score_pairs(model, PAIRS)
    model.config.reorder_and_upcast_attn = False
    expected = score_pairs(model, PAIRS)
    torch.testing.assert_close(found.chosen_logps, expected.chosen_logps)
    torch.testing.assert_close(found.ches, expected.ches)


def test_the_model_is_as_before() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    score_pairs(model, PAIRS[:1])
    assert not is_attached(model)
    assert model.training
    assert not model.model.layers[0].training
    assert not model.lm_head._forward_pre_hooks
    attach(model)
    assert score_pairs(model, PAIRS[:1], ches=False).ches is None
    assert is_attached(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
def test_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found = score_pairs(model, PAIRS)
    for own, pair in zip(found.chosen_logps, PAIRS, strict=True):
        torch.testing.assert_close(own, own_logps(model, pair, "chosen"), rtol=1e-6, atol=1e-6)


def test_no_pairs() -> None:
    scores = score_pairs(tiny("llama"), [])
    assert len(scores) == 0
    assert scores.ches is not None
    assert scores.ches.shape == (0,)
    assert around_edit(scores)["at"] == Mean(None, None, 0, 0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "place"),
    [("abc", "abd", 2), ("abc", "abc", -1), ("ab", "abc", 2), ("abc", "", 0), ("", "", -1)],
)
def test_first_difference(chosen: str, rejected: str, place: int) -> None:
    assert first_difference([*map(ord, chosen)], [*map(ord, rejected)]) == place


def test_first_differences_of_pairs() -> None:
    found = score_pairs(tiny("llama"), PAIRS).first_difference
    assert found.dtype == torch.int64
    assert found.tolist() == [2, -1, 2, 0, 0, 0, 2, 0]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"prompt_ids": [3], "chosen_ids": [4]}, r"pairs\[1\] has no rejected_ids"),
        ("text", r"pairs\[1\] has no prompt_ids"),
        (
            {"prompt_ids": [], "chosen_ids": [4], "rejected_ids": [4]},
            r"prompt_ids of pairs\[1\] is empty",
        ),
        (
            {"prompt_ids": [3], "chosen_ids": [4, 97], "rejected_ids": [4]},
            r"chosen_ids of pairs\[1\] is \[4, 97\], expected ids below 97",
        ),
        (
            {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [-100]},
            r"rejected_ids of pairs\[1\] is \[-100\]",
        ),
    ],
)
def test_pairs_that_are_none(pair: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_pairs(tiny("llama"), [PAIRS[0], pair])


def test_batch_of_no_pairs() -> None:
    with pytest.raises(ValueError, match="batch_pairs is 0, expected at least 1"):
        score_pairs(tiny("llama"), PAIRS, batch_pairs=0)


def numbers(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


SCORES = PairScores(
    numbers([-1, -2, -3, -4], [-5, -6], [-7], []),
    numbers([-1, -8, -9], [-5, -6], [-10, -11], [-12]),
    torch.tensor([1, -1, 0, 0]),
)


def test_around_edit_by_hand() -> None:
    """The second pair has no difference, and the chosen completion of the last no token."""
    chosen, rejected = around_edit(SCORES), around_edit(SCORES, "rejected")
    assert chosen["before"] == Mean(-1.0, None, 1, 1)
    # -2 and -7: half their difference.
    assert chosen["at"] == Mean(-4.5, pytest.approx(2.5), 2, 2)  # type: ignore[arg-type]
    assert chosen["after"] == Mean(-3.5, None, 2, 1)
    assert rejected["at"].mean == pytest.approx(-10)
    assert rejected["at"].pairs == 3
    assert rejected["after"].mean == pytest.approx(-10)


def test_standard_error_counts_pairs_not_tokens() -> None:
    """Each pair's tokens ten times over make it no more certain."""
    few = Mean.of(numbers([1], [2], [6]))
    many = Mean.of(numbers([1] * 10, [2] * 10, [6] * 10))
    assert few.mean == pytest.approx(3)
    assert few.standard_error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert many.standard_error == pytest.approx(few.standard_error)
    assert many.tokens == 30


def test_by_position_against_a_loop() -> None:
    scores = score_pairs(tiny("llama"), PAIRS)
    for side in ("chosen", "rejected"):
        found = by_position(scores, 3, 8, side)
        assert found.places == list(range(-3, 9))
        for place, mean in zip(found.places, found.means, strict=True):
            there = []
            for pair in PAIRS:
                m = first_difference(pair["chosen_ids"], pair["rejected_ids"])
                if m >= 0 and 0 <= m + place < len(pair[f"{side}_ids"]):
                    there.append(float(scores.side(side)[PAIRS.index(pair)][m + place]))
            assert mean.pairs == mean.tokens == len(there)
            if not there:
                assert mean.mean is None
                continue
            assert mean.mean == pytest.approx(sum(there) / len(there))
            if len(there) > 1:
                spread = torch.tensor(there, dtype=torch.float64).std()
                assert mean.standard_error == pytest.approx(float(spread) / math.sqrt(len(there)))


def test_change() -> None:
    model, reference = tiny("llama"), tiny("llama")
    first, second = score_pairs(model, PAIRS), score_pairs(reference, PAIRS)
    change = first.change_from(second)
    assert change.ches is None
    torch.testing.assert_close(
        change.sums("chosen"), first.sums("chosen") - second.sums("chosen"), rtol=1e-9, atol=1e-9
    )
    with pytest.raises(ValueError, match="reference has scores of other pairs"):
        first.change_from(score_pairs(reference, PAIRS[::-1]))
