"""Pairs that come from a stream."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.tokenization import WARNINGS, dataset, pair, tokens, user
from tests.data.tokenizers import GEMMA, QWEN3, byte_level

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]

CHAT = [user("2+2?")]


def stream(*rows: Any, tokenizer: Any, **options: Any) -> list[dict[str, Any]]:
    """Pairs that come in two batches."""
    data = dataset(*rows, *rows[-1:] * 150).to_iterable_dataset()
    made, dropped = tokens(data, tokenizer, **options)
    assert dropped == 0
    return list(made)


@pytest.mark.parametrize("row", [pair("2=", "4<|im_end|> "), pair(CHAT, "4<|im_end|> ")])
def test_a_stream_gives_the_same_and_one_remark(row: Any) -> None:
    tokenizer = byte_level(QWEN3)
    with pytest.warns(UserWarning, match="an end of turn") as remarks:
        made = stream(row, tokenizer=tokenizer)
    said = [str(remark.message) for remark in remarks if "an end of turn" in str(remark.message)]
    assert len(said) == 1
    assert said[0].startswith("pairs.jsonl:1: ")
    with pytest.warns(UserWarning, match="an end of turn"):
        assert made[0] == tokens(row, tokenizer)[0][0]
    assert len(made) == 151


def test_a_stream_is_checked_when_it_comes() -> None:
    good, long = pair("2="), pair("2=", "444")
    with pytest.raises(ValueError, match=r"^pairs.jsonl:2: the pair has 6 tokens"):
        stream(good, long, good, tokenizer=byte_level(), max_length=4)
    made = stream(good, long, good, tokenizer=byte_level(), max_length=4, too_long="drop")
    assert [row["place"] for row in made[:2]] == ["pairs.jsonl:1", "pairs.jsonl:3"]
    with pytest.raises(ValueError, match="has the id 257"):
        stream(good, tokenizer=byte_level(), vocab_size=257)
    with pytest.raises(ValueError, match=r"^pairs.jsonl:1: the chat template refuses"):
        stream(pair([*CHAT, *CHAT]), tokenizer=byte_level(GEMMA))
