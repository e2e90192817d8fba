"""Numbers that the data give for each pair: read exactly, or an error with place and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdpop.data import load_pairs
from fastdpop.data.formats import convert
from fastdpop.data.tokens import tokenize
from tests.tiny_model import tiny_tokenizer

TEXT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
ASK = [{"role": "user", "content": "What color is the sky?"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_json_lines(tmp_path: Path) -> None:
    rows = [{**TEXT, "quality": 0.1, "margin": -2, "id": 7}, {**TEXT, "quality": 0, "margin": 1e-9}]
    path = write(tmp_path / "x.jsonl", *rows)
    pairs = load_pairs(
        path, columns={"weight": "quality"}, values=["weight", "margin"], progress=False
    )
    assert pairs.dataset["weight"][:] == [0.1, 0.0]
    assert pairs.dataset["margin"][:] == [-2.0, 1e-9]
    assert pairs.dataset.features["margin"].dtype == "float64"
    assert pairs.unused == ("id",)
    assert pairs.offered == ()
    plain = load_pairs(path, progress=False)
    assert plain.unused == ("id", "margin", "quality")
    assert plain.offered == ("margin",)
    tokens, _ = tokenize(pairs.dataset, tiny_tokenizer(), values=["weight"], progress=False)
    assert set(tokens.column_names) == {
        *("prompt_ids", "chosen_ids", "rejected_ids"),
        "place",
        "weight",
    }
    assert tokens["weight"][:] == [0.1, 0.0]


def test_csv_and_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,chosen,rejected,weight\na,b,c,0.1\na,b,c, 2e-3 \na,b,d,.5\n")
    assert load_pairs(path, values=["weight"], progress=False).dataset["weight"][:] == [
        0.1,
        2e-3,
        0.5,
    ]
    assert load_pairs(path, progress=False).offered == ("weight",)
    rows = {name: [value] * 2 for name, value in TEXT.items()}
    table = pa.table({**rows, "offset": pa.array([0.5, -3], pa.float32())})
    pq.write_table(table, tmp_path / "x.parquet")
    found = load_pairs(tmp_path / "x.parquet", values=["offset"], progress=False)
    assert found.dataset["offset"][:] == [0.5, -3.0]


def test_beside_messages_and_in_any_format(tmp_path: Path) -> None:
    """UltraFeedback's scores, under the names that losses know."""
    answers = [[*ASK, {"role": "assistant", "content": text}] for text in ("Blue.", "Green.")]
    row = {"prompt": ASK[0]["content"], "chosen": answers[0], "rejected": answers[1]}
    row |= {"score_chosen": 8.5, "score_rejected": 6}
    path = write(tmp_path / "x.jsonl", row)
    names = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}
    pairs = load_pairs(path, columns=names, values=[*names], progress=False)
    assert pairs.format == "UltraFeedback"
    assert (pairs.dataset["chosen_score"][:], pairs.dataset["rejected_score"][:]) == ([8.5], [6.0])
    assert pairs.unused == ()


def test_a_number_is_kept_beside_what_tells_a_format() -> None:
    """A column that is a value no longer counts as what may be the prompt."""
    row = {"chosen": "ab c", "rejected": "ab d", "context": 3}
    assert convert(row, values=["context"]).fields == {
        "prompt": "ab", "chosen": " c", "rejected": " d", "context": 3.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "None"),
        ("high", "'high'"),
        ("", "''"),
        ("nan", "'nan'"),
        ("1_000", "'1_000'"),
        ("0,5", "'0,5'"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (10**400, "1000000"),
        ("0.5", "'0.5'"),  # text, from where there are numbers
        (True, "True"),
        ([0.5], "[0.5]"),
        (-0.5, "-0.5"),
    ],
)
def test_what_is_no_weight(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match="expected a finite number >= 0") as error:
        convert({**TEXT, "weight": value}, values=["weight"])
    assert f"field 'weight' is {said}" in str(error.value)
    if value == -0.5:
        assert convert({**TEXT, "margin": value}, values=["margin"]).fields["margin"] == -0.5


def test_text_is_no_number_beyond_csv(tmp_path: Path) -> None:
    row = {**TEXT, "weight": "1.5"}
    path = write(tmp_path / "x.jsonl", TEXT | {"weight": 1.5}, row)
    with pytest.raises(
        ValueError, match=r"x\.jsonl:2: field 'weight' is '1\.5', expected a finite"
    ):
        load_pairs(path, values=["weight"], progress=False)
    assert load_pairs(path, progress=False).offered == ()
    data = datasets.Dataset.from_list([row])
    with pytest.raises(ValueError, match=r"row 1: field 'weight' is '1\.5', expected a finite"):
        load_pairs(data, values=["weight"], progress=False)
    (tmp_path / "x.tsv").write_text("prompt\tchosen\trejected\tweight\na\tb\tc\t1.5\n")
    found = load_pairs(tmp_path / "x.tsv", values=["weight"], progress=False)
    assert found.dataset["weight"][:] == [1.5]


def test_errors_name_the_place(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {**TEXT, "weight": 1}, TEXT)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: field 'weight' is missing") as error:
        load_pairs(path, values=["weight"], progress=False)
    assert "--columns weight=..." in str(error.value)
    with pytest.raises(ValueError, match=r"'weight', expected one of .*--pair-values weight"):
        load_pairs(path, columns={"weight": "weight"}, progress=False)
    with pytest.raises(ValueError, match="takes 'weight' from 'quality', which is missing"):
        load_pairs(path, columns={"weight": "quality"}, values=["weight"], progress=False)
    for name in ("prompt", "tools", "place", "format"):
        with pytest.raises(ValueError, match=f"values contains '{name}'"):
            load_pairs(path, values=[name], progress=False)
