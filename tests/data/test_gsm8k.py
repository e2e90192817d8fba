"""Corrupting GSM8K's answers, and the excerpt that is shipped."""

from __future__ import annotations

import random

import pytest

from fastdpop.data.gsm8k import corrupt, shipped_problems, without_annotations

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
        "Shown otherwise: <<1000*2=2000>>2,000 and <<2000+1=2001>>2001\n#### 2001",
        "Longer number: <<1+1=2>>20 and <<2+1=3>>3\n#### 3",
    ],
)
def test_answers_without_a_plain_intermediate_result(answer: str) -> None:
    assert corrupt(answer, random.Random(0)) is None


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
