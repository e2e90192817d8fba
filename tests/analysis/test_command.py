"""``fastdpop analyze`` on tiny models: its files, its choices and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

from fastdpop.cli import main
from tests.analysis.test_report import Wellformed
from tests.tiny_model import CHATML, tiny_llama, tiny_tokenizer
from tests.train.files import WARNINGS, rows, write

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in WARNINGS),
    pytest.mark.filterwarnings("default:.*chosen equals rejected"),  # printed
    pytest.mark.filterwarnings("default:.*its chat template is not"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "tuned")):
        tiny_llama(seed, initializer_range=0.2).save_pretrained(tmp_path / name)
        tiny_tokenizer(CHATML).save_pretrained(tmp_path / name)
    write(tmp_path / "pairs.jsonl", [*rows(6), {"prompt": "<b>", "chosen": "x", "rejected": "x"}])
    return tmp_path


def analyze(*more: str, device: str = "cpu") -> int:
    return main(["analyze", "--pairs", "pairs.jsonl", "--device", device, *more])


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "analysis.json").read_text())
    assert (folder / "analysis.png").read_bytes().startswith(b"\x89PNG")
    Wellformed((folder / "analysis.html").read_text())
    return found


def test_two_models_and_a_reference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", "tuned", "--model", "base", "--reference", "base", "--output", "new/out"]
    assert analyze(*argv, "--name", "A", "--name", "B") == 0
    found = results(folder / "new" / "out")
    said, warned = capsys.readouterr()
    assert "chosen equals rejected in 1 of 7 pairs" in warned
    assert all(line in said for line in found["summary"])
    assert f"Report: {Path('new/out/analysis.html')}" in said
    assert [model["name"] for model in found["models"]] == ["A", "B"]
    assert found["pairs"]["count"] == found["pairs"]["read"] == 7
    assert found["pairs"]["equal"] == 1
    assert found["reference"]["path"] == "base"
    # B is the reference itself.
    assert found["models"][1]["change"]["chosen"]["mean"] == 0
    assert found["models"][0]["change"]["chosen"]["mean"] != 0
    assert found["models"][1]["logps"] == found["reference"]["logps"]
    place = found["by_pair"][0]
    assert place["place"] == "pairs.jsonl:1"
    assert set(place["chosen_logps"]) == {"A", "B", "reference"}


def test_alone_and_a_draw(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze("--model", "base", "--limit", "3", "--seed", "1", "--batch-pairs", "2") == 0
    found = results(folder)
    assert found["reference"] is None
    assert found["models"][0]["change"] is None
    assert found["models"][0]["name"] == "base"
    assert found["pairs"]["count"] == len(found["by_pair"]) == 3
    assert found["pairs"]["read"] == 7
    assert "3 pairs of 7, drawn with seed 1" in (folder / "analysis.html").read_text()
    first = [row["place"] for row in found["by_pair"]]
    assert analyze("--model", "base", "--limit", "3", "--seed", "1") == 0
    assert [row["place"] for row in results(folder)["by_pair"]] == first


def test_an_adapters_base_is_its_reference(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(initializer_range=0.2), peft.LoraConfig(r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(folder / "adapter")
    assert analyze("--model", "adapter") == 0
    assert "Reference: base, the adapters' base" in capsys.readouterr().out
    found = results(folder)
    assert found["reference"]["path"] == "base"
    assert abs(found["models"][0]["change"]["chosen"]["mean"]) > 0.01
    assert analyze("--model", "adapter", "--reference", "tuned") == 0
    assert results(folder)["reference"]["path"] == "tuned"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "./none"], "--model is './none': there is no such folder"),
        (["--reference", "./none"], "--reference is './none': there is no such folder"),
        (["--name", "A", "--name", "B"], "--name is given 2 times, expected once for each of 1"),
        (["--name", "reference"], "expected names of which no two are the same"),
        (["--model", "base"] * 6, "--model is given 7 times, expected at most 6"),
        (
            ["--model", "tuned", "--model-revision", "x"],
            "--model-revision is given for 2 models, expected one",
        ),
        (["--reference", "other"], "other: its tokenizer is not that of base"),
        (
            ["--reference", "broken", "--batch-pairs", "1"],
            "broken: its log-probs of pairs.jsonl:1 are not finite",
        ),
        (["--reference", "small"], "small: its embedding has 40 rows, and the pairs have a token"),
        (["--columns", "prompt=q"], "pairs.jsonl:1: "),
        (["--max-length", "5"], "more than max_length = 5"),
        (["--device", "nonsense"], "--device is 'nonsense', expected a device"),
    ],
)
def test_mistakes(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    if "other" in more:
        tiny_llama().save_pretrained(folder / "other")
        tokenizer = tiny_tokenizer(CHATML)
        tokenizer.add_tokens(["more"])
        tokenizer.save_pretrained(folder / "other")
    if "small" in more:  # and without a tokenizer of its own
        model = tiny_llama()
        model.resize_token_embeddings(40)
        model.save_pretrained(folder / "small")
    if "broken" in more:  # by one token, which is in no batch but the first pair's
        monkeypatch.setattr("fastdpop.train.model._check_finite", lambda _: None)
        model = tiny_llama(tied=False)
        with torch.no_grad():
            model.model.embed_tokens.weight[tiny_tokenizer()("6")["input_ids"]] = float("nan")
        model.save_pretrained(folder / "broken")
        tiny_tokenizer(CHATML).save_pretrained(folder / "broken")
    first = [] if "./none" in more and "--model" in more else ["--model", "base"]
    assert analyze(*first, *more) == 1
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "error: " in x)
    assert message in line
    assert not (folder / "analysis.json").exists()


def test_names_of_folders_that_are_called_alike(folder: Path) -> None:
    (folder / "old").mkdir()
    (folder / "base").rename(folder / "old" / "tuned")
    assert analyze("--model", "tuned", "--model", "old/tuned") == 0
    assert [m["name"] for m in results(folder)["models"]] == ["tuned", "old/tuned"]


def test_a_reference_with_another_chat_template(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer(CHATML.replace("<|end|>", "<end>")).save_pretrained(folder / "base")
    assert analyze("--model", "tuned", "--reference", "base", "--limit", "2") == 0
    warning = "base: its chat template is not that of tuned, with which all pairs are written"
    assert warning in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code in ((["analyze"], 2), (["analyze", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == code
    assert "--reference" in capsys.readouterr().out
