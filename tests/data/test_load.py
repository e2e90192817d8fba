"""Loading a whole source: what is kept, what is cached, and what several processes do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

import fastdpop.data.load as load
from fastdpop.data import load_pairs

TEXT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
ASK = {"role": "user", "content": "What color is the sky?"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "f", "arguments": {"n": 2**53 + 1, "x": 0.1, "z": None}}}],
}
CALL_IN_ARROW = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "f", "arguments": {"n": 2**53 + 1, "x": 0.1}}}],
}
TOLD = {"role": "tool", "name": "f", "content": "blué \u2028"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green.", "thinking": "?"}
MESSAGES = {"prompt": [ASK], "chosen": [CALL, TOLD, BLUE], "rejected": [GREEN]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One item for each conversion of a row."""
    done: list[Any] = []
    convert = load.convert
    monkeypatch.setattr(load, "convert", lambda *a, **k: done.append(a) or convert(*a, **k))
    return done


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_text_pairs(tmp_path: Path) -> None:
    same = {"prompt": "p", "chosen": "c", "rejected": "c", "z": 1}
    path = write(tmp_path / "x.jsonl", {**TEXT, "id": 1}, same)
    pairs = load_pairs(path, progress=False)
    assert list(pairs.dataset) == [
        {**TEXT, "place": f"{path}:1"},
        {"prompt": "p", "chosen": "c", "rejected": "c", "place": f"{path}:2"},
    ]
    assert (pairs.format, pairs.unused, pairs.equal) == ("text", ("id", "z"), 1)


def test_messages_come_back_as_they_were(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    first = {**MESSAGES, "tools": tools, "chat_template_kwargs": {"enable_thinking": False, "n": 1}}
    orca = {"question": "Why?", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "x.jsonl", first, orca)
    pairs = load_pairs(path, progress=False)
    assert list(pairs.dataset) == [
        {**first, "tools": json.dumps(tools), "place": f"{path}:1"},
        {
            "prompt": [{"role": "user", "content": "Why?"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
            "tools": None,
            "chat_template_kwargs": {},
            "place": f"{path}:2",
        },
    ]
    assert (pairs.format, pairs.unused, pairs.equal) == ("Orca, chat messages", (), 0)
    assert pairs.dataset.features["chosen"] == datasets.List(datasets.Json())


def test_arguments_of_conversion_and_source_are_passed_on(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", {"q": "other", "chosen": "c", "rejected": "r"})
    write(folder / "test.jsonl", {"q": "hi", "chosen": "c", "rejected": "r"})
    pairs = load_pairs(folder, split="test", columns={"prompt": "q"}, chat=True, progress=False)
    assert pairs.dataset[0]["prompt"] == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "x.jsonl: no pairs"),
        (
            [TEXT, {**TEXT, "chosen": 3}],
            "x.jsonl:2: field 'chosen' is 3, expected a string or a list of chat messages",
        ),
        (
            [TEXT, TEXT, MESSAGES],
            "x.jsonl:3: this pair is messages, while that at x.jsonl:1 is text: all of a source must be one "
            "kind (--chat, chat=True, makes messages of text)",
        ),
        (
            [MESSAGES, TEXT],
            "x.jsonl:2: this pair is text, while that at x.jsonl:1 is messages: all of a source must be one "
            "kind (--chat, chat=True, makes messages of text)",
        ),
    ],
)
def test_errors_name_their_places_and_leave_nothing_behind(
    tmp_path: Path, cache: Path, rows: list[Any], message: str
) -> None:
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(ValueError, match=r".") as error:
        load_pairs(path, progress=False)
    assert str(error.value).replace(f"{tmp_path}/", "") == message
    assert list(cache.rglob("*.arrow")) == []


def test_a_dataset_can_be_the_source() -> None:
    # Arrow gives all messages the same keys.
    rows = [
        {**MESSAGES, "id": 1},
        {**TEXT, "prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN], "id": 2},
    ]
    source = datasets.Dataset.from_list(rows)
    pairs = load_pairs(source, progress=False)
    assert pairs.dataset["place"][:] == ["row 1", "row 2"]
    assert [row["chosen"] for row in pairs.dataset] == [[CALL_IN_ARROW, TOLD, BLUE], [BLUE]]
    assert (pairs.format, pairs.unused, pairs.equal) == ("chat messages", ("id",), 0)
    with pytest.raises(ValueError, match=r"^row 2: field 'chosen' is None, expected"):
        load_pairs(datasets.Dataset.from_list([TEXT, {**TEXT, "chosen": None}]), progress=False)
    with pytest.raises(ValueError, match=r"^the dataset: no pairs"):
        load_pairs(source.select([]), progress=False)


@pytest.mark.parametrize("number", [0.3, 2**70, float("nan")])
def test_numbers_that_would_come_back_changed_are_refused(tmp_path: Path, number: float) -> None:
    call = {"function": {"name": "f", "arguments": {"x": number}}}
    row = {**MESSAGES, "chosen": [{"role": "assistant", "tool_calls": [call]}]}
    path = write(tmp_path / "x.jsonl", row)
    with pytest.raises(
        ValueError, match=r"x\.jsonl:1: field 'chosen' holds a number that datasets does not"
    ):
        load_pairs(path, progress=False)


def test_mixed_kinds_are_one_kind_as_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", TEXT, MESSAGES)
    assert len(load_pairs(path, chat=True, progress=False).dataset) == 2


# -------------------------------------------------------------------------------------------- cache


def test_a_second_load_converts_one_row(tmp_path: Path, conversions: list[Any]) -> None:
    path = write(tmp_path / "x.jsonl", {**TEXT, "id": 1}, TEXT)
    first = load_pairs(path, progress=False)
    conversions.clear()
    second = load_pairs(path, progress=False)
    assert len(conversions) == 1  # to learn the kind of all
    assert list(second.dataset) == list(first.dataset)
    assert (second.format, second.unused, second.equal) == ("text", ("id",), 0)
    assert second.dataset._fingerprint == first.dataset._fingerprint


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", TEXT)
    before, stat = load_pairs(path, progress=False), path.stat()
    write(path, {**TEXT, "chosen": " gray."})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # neither size nor time tells
    after = load_pairs(path, progress=False)
    assert after.dataset[0]["chosen"] == " gray."
    assert before.dataset[0]["chosen"] == " blue."
    assert after.dataset._fingerprint != before.dataset._fingerprint


def test_arguments_are_part_of_what_is_cached(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {**TEXT, "other": "gray"})
    assert load_pairs(path, progress=False).dataset[0]["rejected"] == " green."
    chat = load_pairs(path, chat=True, progress=False)
    assert chat.dataset[0]["rejected"] == [{"role": "assistant", "content": " green."}]
    other = load_pairs(path, columns={"rejected": "other"}, progress=False)
    assert other.dataset[0]["rejected"] == "gray"
    assert other.unused == ("rejected",)


def test_a_progress_bar_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.jsonl", TEXT)
    load_pairs(path, progress=False)
    assert capsys.readouterr().err == ""
    load_pairs(path, chat=True, progress=True)
    error = capsys.readouterr().err
    assert "Generating train split: 1 examples" in error


# ---------------------------------------------------------------------------------------- processes

PROCESS = """
import sys
import fastdpop.data.load as load

done = []
convert = load.convert
load.convert = lambda *a, **k: done.append(a) or convert(*a, **k)
for path in sys.argv[1:]:
    try:
        pairs = load.load_pairs(path)
        print(len(done), pairs.dataset[1]["place"], pairs.dataset._fingerprint)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_one_of_several_processes_does_the_work_and_all_raise_errors(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", TEXT, TEXT)
    bad = write(tmp_path / "bad.jsonl", TEXT, {**TEXT, "prompt": ""})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(good), str(bad)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (loaded, error), (loaded_too, error_too) = (out.splitlines() for out, _ in outputs)
    assert error == error_too == f"{bad}:2: field 'prompt' is '', expected a text that is not empty"
    # The first row is converted once more, to learn the kind of all.
    assert sorted((loaded[0], loaded_too[0])) == ["1", "3"]
    assert loaded[1:] == loaded_too[1:]
    assert loaded[1:].startswith(f" {good}:2 ")
