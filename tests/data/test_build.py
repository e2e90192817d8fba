"""The paper's pairs, from rows of every form that their sources have."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpop.data import load_pairs
from fastdpop.data.build import KINDS, Counts, build

SHARED = Path(__file__).parents[3] / "shared" / "data"
with_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the original files")

PLAYERS = (
    "Each player requires a $25 jersey, a $15.20 pair of shorts, and a pair of socks priced at $6.80. So "
    "the total cost for each player is $25 + $15.20 + $6.80 = $47. Since there are sixteen players on the "
    "football team, the total cost for all of them is 16 * $47 = $752. #### 752 The answer is: 752"
)
"""The example of the DPOP paper's Appendix D."""
TEXTS = ["ice", "fire", "fog"]
ARC = {"id": "Q1", "question": "Which is hot?", "choices": TEXTS, "label": 1}
ENDINGS = ["eats it.", "boils it.", "sings.", "flies."]
SWAG = {
    "activity_label": "Cooking",
    "ctx": "He takes an egg. he",
    "endings": ENDINGS,
    "label": 1,
}
GSM = {
    "question": "How many?",
    "answer": "He has 2*3=<<2*3=6>>6.\nThen 6+1=<<6+1=7>>7.\n#### 7",
}
MATH = {"query": "What is the total?", "response": PLAYERS, "type": "GSM_Rephrased"}
EXAMPLES = {"arc": ARC, "hellaswag": SWAG, "gsm8k": GSM, "metamath": MATH}


def put(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(kind: str, folder: Path, *rows: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return list(build(kind, put(folder / "x.jsonl", *rows), **options))


def check_edit(pair: dict[str, Any], final: str) -> None:
    """One value differs, all else and the final answer are the same."""
    chosen, rejected, edit = pair["chosen"], pair["rejected"], pair["edit"]
    start, right, wrong = edit["start"], edit["right"], edit["wrong"]
    assert chosen[start:].startswith(right)
    assert rejected == chosen[:start] + wrong + chosen[start + len(right) :]
    assert chosen != rejected
    assert float(right.replace(",", "")) != float(wrong.replace(",", ""))
    # The whole number, not a part of a longer one
    assert not chosen[:start][-1:].isdigit()
    assert not chosen[start + len(right) :][:1].isdigit()
    assert rejected.endswith(final)
    assert start + len(right) <= len(chosen) - len(final)


# ------------------------------------------------------------------------------------------ calculations


def test_the_example_of_the_paper(tmp_path: Path) -> None:
    wrong = set()
    for seed in range(60):
        (pair,) = made("metamath", tmp_path, MATH, seed=seed)
        assert pair["prompt"] == "Question: What is the total?\nAnswer:"
        assert pair["chosen"] == f" {PLAYERS}"
        assert pair["source"] == "x.jsonl:1"
        assert pair["edit"]["start"] == pair["chosen"].index("47. Since")
        assert pair["edit"]["right"] == "47"
        check_edit(pair, ". Since" + PLAYERS.split(". Since")[1])
        wrong.add(pair["edit"]["wrong"])
    assert wrong == {
        "37",
        "42",
        "44",
        "45",
        "46",
        "48",
        "49",
        "50",
        "52",
        "57",
    }  # 52 is the paper's


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Q", "response": "2 * 3 = 6.\n6 + 1 = 7.\n#### 7\nThe answer is: 7"},
        {"query": "Q", "response": "2 * 3 = 6.\n6 + 1 = \\boxed{7}.\nThe answer is: 7"},
        {"question": "Q", "answer": "7", "output": "2 * 3 = 6.\n6 + 1 = 7.\n#### 7\nThe answer is: 7"},
        {"question": "Q", "answer": "7", "inv_question_pred_answer": "2 * 3 = 6.\nx = 7.\nSo it is 7."},
    ],
)  # fmt: skip
def test_forms_of_metamath(tmp_path: Path, row: dict[str, Any]) -> None:
    (pair,) = made("metamath", tmp_path, row)
    assert pair["edit"]["right"] == "6"
    assert pair["edit"]["start"] == len(" 2 * 3 = ")


def test_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        MATH,
        {"query": "Q", "response": "It is 7.\nThe answer is: 7"},
        {"query": "Q", "response": "3 + 4 = 7.\nThe answer is: 7"},
        {"query": "Q", "response": "3 + 4 = 7 are all"},
        {"question": "Q", "answer": "8", "output": "3 + 3 = 6\n#### 7\nThe answer is: 7"},
    ]
    counts = Counts()
    assert len(made("metamath", tmp_path, *rows, counts=counts)) == 1
    assert counts == Counts(
        rows=5,
        pairs=1,
        left_out=Counter(
            {
                "no intermediate result to make wrong": 2,
                "a solution that does not say its answer": 1,
                "a solution that ends with another answer than the right one": 1,
            }
        ),
    )


def test_gsm8k(tmp_path: Path) -> None:
    bare = {"question": "Q", "answer": "He has 2*3=6.\nThen 6+1=7.\n#### 7"}
    for row in (GSM, bare):
        (pair,) = made("gsm8k", tmp_path, row)
        assert pair["chosen"] == " He has 2*3=6.\nThen 6+1=7.\n#### 7"
        assert pair["edit"]["start"] == len(" He has 2*3=")
        check_edit(pair, ".\nThen 6+1=7.\n#### 7")


LAST = "He has 2*3=<<2*3=6>>6.\nThen 1,000*6=<<1000*6=6000>>6,000.\n"


@pytest.mark.parametrize(
    ("end", "rights"),
    [
        ("That is <<6000=6000>>6000.\n#### 6,000", {"6"}),
        ("Of 5+5=<<5+5=10>>10.\n#### 6000", {"6"}),
        ("So 3000*2=<<3000*2=6,000>>6,000.\n#### 6000", {"6", "6,000"}),  # also another's value
        ("#### 6000", {"6"}),
    ],
)
def test_the_answer_s_calculation_stays_right(tmp_path: Path, end: str, rights: set[str]) -> None:
    row = {"question": "Q", "answer": LAST + end}
    pairs = [made("gsm8k", tmp_path, row, seed=seed)[0] for seed in range(20)]
    assert {pair["edit"]["right"] for pair in pairs} == rights


def test_a_fraction_whose_numerator_is_the_answer(tmp_path: Path) -> None:
    text = "2 * 75 = 150.\nx = 150 / 450 = 1/3.\n#### 1\nThe answer is: 1"
    pairs = [
        made("metamath", tmp_path, {"query": "Q", "response": text}, seed=s)[0] for s in range(20)
    ]
    assert {pair["edit"]["right"] for pair in pairs} == {"150"}


def test_numbers_of_any_length(tmp_path: Path) -> None:
    """They end nothing, are never made wrong, and 0.5 is the answer with any number of zeros."""
    for digits in (21, 29, 5000):
        n = "9" * digits
        right = f"It is {n}-0={n}.\nSo 3+4=7.\n5-3=2.\n#### 2"
        answer = f"It is {n}-0=<<{n}-0={n}>>{n}.\nSo 3+4=<<3+4=7>>7.\n5-3=<<5-3=2>>2.\n#### 2"
        for kind, row in (
            ("gsm8k", {"question": f"Q {n}", "answer": answer}),
            ("metamath", {"query": f"Q {n}/{n}", "response": right}),
            ("metamath", {"query": "Q", "response": f"{right}\nThe answer is: 2 {n} {n}/{n}"}),
            ("metamath", {"query": "Q", "response": right.replace("5-3", f"{n}/{n} = 1/{n}")}),
        ):
            for seed in range(2):
                (pair,) = made(kind, tmp_path, row, seed=seed)
                assert pair["edit"]["right"] == "7"
                check_edit(pair, pair["chosen"].split("3+4=7")[1])
    half = f"1/2 = 0.5. 3 + 4 = 7.\n#### 0.5{'0' * 5000}"
    for seed in range(2):
        (pair,) = made("metamath", tmp_path, {"query": "Q", "response": half}, seed=seed)
        assert pair["edit"]["right"] == "7"


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), min_size=2, max_size=6),
    st.integers(),
)
def test_any_solution(steps: list[tuple[int, int]], seed: int) -> None:
    """One value of a step but the last differs, whichever of the two sets it is."""
    notes = "".join(f"Now {a}+{b} = $<<{a}+{b}={a + b}>>{a + b} in all.\n" for a, b in steps)
    last = sum(steps[-1])
    gsm = {"question": "Q", "answer": f"{notes}#### {last}"}
    text = "".join(f"Now {a:,} + {b:,} = ${a + b:,} in all.\n" for a, b in steps)
    math = {"query": "Q", "response": f"{text}#### {last}\nThe answer is: {last}"}
    for kind, row in (("gsm8k", gsm), ("metamath", math)):
        source = datasets.Dataset.from_list([row])
        if kind == "metamath" and all(sum(step) == last for step in steps):
            with pytest.raises(
                ValueError, match=r"no pairs of 1 rows; 1 rows with no intermediate"
            ):
                list(build(kind, source, seed=seed))
            continue
        (pair,) = build(kind, source, seed=seed)
        check_edit(pair, pair["chosen"][pair["chosen"].rindex("Now") :])
        assert [pair] == list(build(kind, source, seed=seed))


def test_a_row_has_its_own_chance(tmp_path: Path) -> None:
    """Neither other rows, nor a limit, nor the format change what becomes of it."""
    rows = [{**GSM, "question": f"Q{i}"} for i in range(30)]
    whole = made("gsm8k", tmp_path, *rows, seed=3)
    assert len({pair["edit"]["wrong"] for pair in whole}) > 3
    assert made("gsm8k", tmp_path, *rows, seed=3, limit=7) == whole[:7]
    (alone,) = made("gsm8k", tmp_path, rows[11], seed=3)
    assert alone == {**whole[11], "source": "x.jsonl:1"}
    assert made("gsm8k", tmp_path, *rows, seed=4) != whole
    chat = made("gsm8k", tmp_path, *rows, seed=3, chat=True)
    assert [c["rejected"][0]["content"] for c in chat] == [w["rejected"][1:] for w in whole]
    assert chat[0]["edit"]["start"] == whole[0]["edit"]["start"] - 1


# ------------------------------------------------------------------------------------------ choices


@pytest.mark.parametrize(
    "row",
    [
        ARC,
        {
            "id": "Q1",
            "question": {
                "stem": "Which is hot?",
                "choices": [{"text": t, "label": k} for t, k in zip(TEXTS, "ABC", strict=True)],
            },
            "answerKey": "B",
        },
        {**ARC, "choices": {"text": TEXTS, "label": ["1", "2", "3"]}, "answerKey": "2"},
    ],
)
def test_forms_of_arc(tmp_path: Path, row: dict[str, Any]) -> None:
    one = {"prompt": "Question: Which is hot?\nAnswer:", "chosen": " fire", "source": "Q1"}
    expected = [{**one, "rejected": " ice"}, {**one, "rejected": " fog"}]
    assert made("arc", tmp_path, row) == expected
    assert list(build("arc", datasets.Dataset.from_list([row]))) == expected


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (SWAG, "Cooking: He takes an egg. he"),
        ({**SWAG, "label": "1"}, "Cooking: He takes an egg. he"),
        ({**SWAG, "ctx_a": "He takes an egg.", "ctx_b": "he"}, "Cooking: He takes an egg. He"),
        (
            {**SWAG, "ctx_a": "How to cook [title] Eggs [step] Take one.", "ctx_b": ""},
            "Cooking: How to cook. Eggs Take one.",
        ),
    ],
)
def test_forms_of_hellaswag(tmp_path: Path, row: dict[str, Any], prompt: str) -> None:
    pairs = made("hellaswag", tmp_path, row)
    assert [pair["rejected"] for pair in pairs] == [" eats it.", " sings.", " flies."]
    assert {(pair["prompt"], pair["chosen"]) for pair in pairs} == {(prompt, " boils it.")}


def test_a_wrong_answer_that_is_the_right_one_makes_no_pair(tmp_path: Path) -> None:
    counts = Counts()
    row = {**ARC, "choices": ["fire", "fire", "fog"]}
    assert [p["rejected"] for p in made("arc", tmp_path, row, counts=counts)] == [" fog"]
    assert counts.left_out == {"a wrong answer that is the right one, word for word": 1}


# ------------------------------------------------------------------------------------------ examples


def test_examples_are_other_tasks_with_their_right_answers(tmp_path: Path) -> None:
    rows = [{**ARC, "id": str(i), "question": f"Q{i}?"} for i in range(9)]
    pairs = made("arc", tmp_path, *rows, few_shot=3, seed=1)
    drawn = Counter()
    for pair in pairs:
        *examples, asked = pair["prompt"].split("\n\n")
        assert asked == f"Question: Q{pair['source']}?\nAnswer:"
        assert len({*examples}) == 3
        own = {f"Question: Q{i}?\nAnswer: fire" for i in range(9) if str(i) != pair["source"]}
        assert {*examples} <= own
        drawn.update(examples)
    assert len(drawn) == 9
    assert made("arc", tmp_path, *rows, few_shot=3, seed=1, limit=4) == pairs[:4]
    assert made("arc", tmp_path, *rows, few_shot=3, seed=2) != pairs
    chat = made("arc", tmp_path, *rows, few_shot=3, seed=1, chat=True)[0]
    assert [turn["role"] for turn in chat["prompt"]] == ["user", "assistant"] * 3 + ["user"]
    assert chat["prompt"][0]["content"] == pairs[0]["prompt"][len("Question: ") :].split("\n")[0]
    assert chat["chosen"] == [{"role": "assistant", "content": "fire"}]
    with pytest.raises(ValueError, match=r"x\.jsonl: 8 other tasks, too few for 9 examples"):
        made("arc", tmp_path, *rows, few_shot=9)


def test_no_example_was_made_from_the_same_question(tmp_path: Path) -> None:
    rows = [{**MATH, "query": f"Q{i}", "original_question": f"O{i // 3}"} for i in range(9)]
    for i, pair in enumerate(made("metamath", tmp_path, *rows, few_shot=6)):
        others = {f"Q{j}" for j in range(9) if j // 3 != i // 3}
        examples = pair["prompt"].split("\n\n")[:-1]
        assert {text.split("\n")[0].removeprefix("Question: ") for text in examples} == others


def test_examples_of_a_large_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn from a pool that is as likely to hold its last task as its first."""
    monkeypatch.setattr("fastdpop.data.build.POOL", 20)
    rows = [{**ARC, "id": str(i), "question": f"Q{i}?"} for i in range(200)]
    pairs = made("arc", tmp_path, *rows, few_shot=2, seed=5)
    drawn = {text for pair in pairs for text in pair["prompt"].split("\n\n")[:-1]}
    assert len(drawn) == 20
    numbers = [int(text.split("?")[0].removeprefix("Question: Q")) for text in drawn]
    assert min(numbers) < 50
    assert max(numbers) > 150


# -------------------------------------------------------------------------------------------- sources


def test_a_data_set_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([GSM, GSM])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = list(build("gsm8k", "openai/gsm8k", config="main", split="test"))
    assert asked == [("openai/gsm8k", "main", "test")]
    assert [pair["source"] for pair in pairs] == [f"openai/gsm8k[test] row {i}" for i in (1, 2)]


def test_what_is_built_can_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for kind, row in EXAMPLES.items():
        for chat in (False, True):
            pairs = made(kind, tmp_path, row, chat=chat)
            loaded = load_pairs(put(tmp_path / "pairs.jsonl", *pairs), progress=False)
            assert loaded.format == ("chat messages" if chat else "text")
            assert loaded.dataset[0]["prompt"] == pairs[0]["prompt"]
            assert {*loaded.unused} <= {"source", "edit"}
            assert loaded.equal == 0


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("hellaswag", ARC, "no row of hellaswag: field 'activity_label' is missing (fields here: ['choices', "),
        ("arc", SWAG, "no row of arc: field 'question' is missing (fields here: ['activity_label', "),
        ("arc", GSM, "no row of arc: field 'choices' is missing (fields here: ['answer', 'question'])"),
        ("metamath", GSM, "expected fields 'query' and 'response' or 'question' and 'output' or"),
        ("gsm8k", MATH, "no row of gsm8k: field 'question' is missing"),
        ("gsm8k", {**GSM, "answer": "7"}, "field 'answer' is '7', expected a solution that ends with a line"),
        ("gsm8k", {**GSM, "answer": " "}, "field 'answer' is ' ', expected a text that is not empty"),
        ("gsm8k", {**GSM, "question": "\ud800"}, "field 'question' has half a surrogate pair, '\\ud800'"),
        ("arc", {**ARC, "label": 3}, "field 'label' is 3, expected one of [0, 1, 2]"),
        ("arc", {**ARC, "label": True}, "field 'label' is True, expected one of"),
        ("arc", {**ARC, "choices": ["a"]}, "field 'choices' is ['a'], expected a list of two texts or more"),
        ("arc", {**ARC, "choices": ["a", None]}, "item 1 of field 'choices' is None, expected a text"),
        (
            "arc",
            {**ARC, "choices": {"text": ["a", "b"], "label": ["A", "A"]}},
            "field 'choices' has 2 texts under the labels ['A', 'A']",
        ),
        ("arc", {**ARC, "question": {"stem": None}}, "field 'question.stem' is None, expected a text"),
        ("hellaswag", {**SWAG, "label": ""}, "field 'label' is '', expected a number from 0 to 3 (the test"),
        ("hellaswag", {**SWAG, "endings": "x"}, "field 'endings' is 'x', expected a list of two texts"),
    ],
)  # fmt: skip
def test_rows_of_another_kind(tmp_path: Path, kind: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"x\.jsonl:2: no row of ") as error:
        made(kind, tmp_path, EXAMPLES[kind], row)
    assert message in str(error.value)


def test_arguments(tmp_path: Path) -> None:
    file = put(tmp_path / "x.jsonl", ARC)
    for options, message in (
        ({"kind": "mmlu"}, "kind is 'mmlu', expected one of ['metamath', 'arc', 'hellaswag', 'gsm8k']"),
        ({"few_shot": -1}, "few_shot is -1, expected 0 or more"),
        ({"limit": 0}, "limit is 0, expected 1 or more"),
        ({"split": "test"}, "a file has no splits"),
        ({"kind": "hellaswag", "source": "x.txt", "split": "train"}, "a text has no splits"),
        ({"source": tmp_path / "none.jsonl"}, "no such file or folder"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r".") as error:
            build(**{"kind": "arc", "source": file, **options})
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"x\.jsonl: no pairs of 0 rows"):
        made("arc", tmp_path)


# -------------------------------------------------------------------------------- the original files


@with_shared
@pytest.mark.parametrize(
    ("kind", "file", "rows", "pairs"),
    [
        ("arc", "arc_challenge/train.jsonl", 1119, 3357),  # as in the paper
        ("arc", "arc_challenge/test.jsonl", 1172, 3515),
        ("hellaswag", "hellaswag/hellaswag_val_full.txt.bz2", 10042, 30126),  # as in the paper
        ("hellaswag", "hellaswag/val_first1000.jsonl", 1000, 3000),
        ("gsm8k", "gsm8k/train.jsonl", 7473, 7355),
        ("gsm8k", "gsm8k/test.jsonl", 1319, 1298),
        ("metamath", "metamath_gsm8k_backward/GSM8K_Backward.jsonl", 1270, 947),
    ],
)
def test_counts(kind: str, file: str, rows: int, pairs: int) -> None:
    counts = Counts()
    for pair in build(kind, SHARED / file, counts=counts, seed=7):
        assert pair["chosen"] != pair["rejected"]
        if "edit" in pair:
            final = pair["chosen"].split("####")[-1] if "####" in pair["chosen"] else ""
            check_edit(pair, final)
    assert (counts.rows, counts.pairs) == (rows, pairs)


def test_every_kind_has_an_example() -> None:
    assert {*EXAMPLES} == {*KINDS}
