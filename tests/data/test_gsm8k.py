"""Corrupting GSM8K's answers, and the excerpt that is shipped."""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from fastdpop.data.gsm8k import corrupt, shipped_pairs, shipped_problems, without_annotations

ANSWER = "Each costs $25 + $22 = $<<25+22=47>>47.\nAll cost 16 * 47 = $<<16*47=752>>752.\n#### 752"


def test_corrupts_the_only_intermediate_result() -> None:
    clean = without_annotations(ANSWER)
    assert clean == "Each costs $25 + $22 = $47.\nAll cost 16 * 47 = $752.\n#### 752"
    for seed in range(20):
        wrong = corrupt(ANSWER, random.Random(seed))
        assert wrong is not None
        before, rest = wrong.split(" = $", 1)
        value, after = rest.split(".", 1)
        assert before == "Each costs $25 + $22"
        assert value != "47"
        assert int(value) > 0
        assert after == "\nAll cost 16 * 47 = $752.\n#### 752"


@pytest.mark.parametrize(
    "answer",
    [
        "No annotation.\n#### 3",
        "Only the last: <<1+2=3>>3\n#### 3",
        "Shown otherwise: <<1/2=.5>>0.5 and <<.5+1=1.5>>1.5\n#### 1.5",
        "Not so: <<2*3=5>>5 and <<5+1=6>>6\n#### 6",
        "Longer number: <<1+1=2>>20 and <<2+1=3>>3\n#### 3",
    ],
)
def test_answers_without_a_plain_intermediate_result(answer: str) -> None:
    assert corrupt(answer, random.Random(0)) is None


def test_commas() -> None:
    answer = "<<500*2=1000>>1,000 then <<1000*0.5=500>>500\n#### 500"
    wrong = {corrupt(answer, random.Random(seed)) for seed in range(200)}
    values = ("990", "995", "997", "998", "999", "1,001", "1,002", "1,003", "1,005", "1,010")
    assert wrong == {f"{value} then 500\n#### 500" for value in values}


def test_pairs_of_the_shipped_problems_stay_as_they_are() -> None:
    """What the demo and the benchmarks train on; their published numbers depend on it."""
    for split, known in (("train", "d2e28c3fa0dc5eee"), ("test", "cdacd2990247555f")):
        pairs = json.dumps([shipped_pairs(split, seed) for seed in (0, 1, 2)])
        assert hashlib.sha256(pairs.encode()).hexdigest()[:16] == known


def test_decimals() -> None:
    wrong = corrupt("<<12/60=0.2>>0.2 then <<0.2*50=10>>10\n#### 10", random.Random(0))
    assert wrong in {f"{e}.2 then 10\n#### 10" for e in (1, 2, 3, 5, 10)}


@pytest.mark.parametrize(("split", "count"), [("train", 300), ("test", 60)])
def test_shipped_problems_can_all_be_corrupted(split: str, count: int) -> None:
    rows = shipped_problems(split)
    assert len({row["question"] for row in rows}) == count
    for row in rows:
        clean, wrong = without_annotations(row["answer"]), corrupt(row["answer"], random.Random(0))
        assert wrong is not None
        assert wrong != clean
        assert wrong.split("####")[1] == clean.split("####")[1]


def test_shipped_splits_are_disjoint() -> None:
    train, test = ({row["question"] for row in shipped_problems(s)} for s in ("train", "test"))
    assert not train & test
