"""HellaSwag's pairs: its text files, and the marks in them."""

from __future__ import annotations

import bz2
from pathlib import Path

import datasets
import pytest

from fastdpop.data.build import Counts, build
from fastdpop.data.build.hellaswag import without_marks

ENDINGS = ["eats it.", "boils it.", "sings.", "flies."]


def test_hellaswag_as_text(tmp_path: Path) -> None:
    lines = ["Cooking: He takes an egg: he", "1", *ENDINGS]
    text = "".join(f"{line}\n" for line in lines * 2).encode()
    for name, content in (("x.txt", text), ("x.txt.bz2", bz2.compress(text))):
        (tmp_path / name).write_bytes(content)
        pairs = list(build("hellaswag", tmp_path / name))
        assert len(pairs) == 6
        assert pairs[0]["prompt"] == "Cooking: He takes an egg: he"
        assert [pairs[0]["source"], pairs[5]["source"]] == [f"{name}:1", f"{name}:7"]
    cut = "x.txt:7: 'Cooking: He takes an egg: he' and 1 more lines, expected 'activity: beginning'"
    for content, message in (
        (text[: text.rindex(b"eats")], cut),
        (b"\xff\n", "x.txt:1: not UTF-8"),
        (text + b"Cooking: A\n\xff\n", "x.txt:14: not UTF-8"),
        (b"no colon\n" + text, "x.txt:1: 'no colon' and 5 more lines, expected"),
    ):
        (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r".") as error:
            list(build("hellaswag", tmp_path / "x.txt"))
        assert message in str(error.value)
    packed = bz2.compress(text)
    for content in (packed[:-5], packed[:9] + b"x" * 40 + packed[49:], b"no bz2"):
        (tmp_path / "x.txt.bz2").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.txt\.bz2:\d+: the compressed data are damaged"):
            list(build("hellaswag", tmp_path / "x.txt.bz2"))
    with pytest.raises(FileNotFoundError):
        list(build("hellaswag", tmp_path / "none.txt"))


def test_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    task = "Cooking: He takes an egg\r\n1\r\n" + "".join(f"{e}\r\n" for e in ENDINGS)
    (tmp_path / "x.txt").write_bytes(f"\ufeff{task}\r\n{task}\n \n".encode())
    pairs = list(build("hellaswag", tmp_path / "x.txt"))
    assert [pair["prompt"] for pair in pairs] == ["Cooking: He takes an egg"] * 6
    assert [pairs[0]["source"], pairs[5]["source"]] == ["x.txt:1", "x.txt:8"]


def test_an_ending_of_marks_alone(tmp_path: Path) -> None:
    counts = Counts()
    row = {
        "activity_label": "Cooking",
        "ctx": "He takes an egg. he",
        "endings": ENDINGS,
        "label": 1,
    }
    rows = [{**row, "endings": [*ENDINGS[:2], "[header]", "[step] it."]}, row]
    pairs = list(build("hellaswag", datasets.Dataset.from_list(rows), counts=counts))
    assert [pair["rejected"] for pair in pairs] == [" eats it.", " sings.", " flies."]
    assert counts.left_out == {"an ending that has nothing but marks such as [header]": 1}


def test_marks_of_wikihow() -> None:
    assert without_marks(" A [header] B [title] C [substeps] d ") == "A B. C d"
