"""``fastdpop pairs stats``, on a tiny model's tokens: one for each character, and one that ends a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

pytest.importorskip("trl")

from transformers import (
    BloomConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
)

from fastdpop.cli import main
from fastdpop.pair_stats import model_work
from fastdpop.prefix.stats import Work
from tests.tiny_model import CHATML, tiny_llama, tiny_tokenizer
from tests.train.files import WARNINGS, write

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

PAIRS = [
    {"prompt": "0123456789", "chosen": "yes", "rejected": answer}
    for answer in ("no", "not", "nope")
]
SIZES: Any = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: Any = {"num_attention_heads": 4, "intermediate_size": 32}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_llama().config.save_pretrained(tmp_path / "model")  # its weights are not needed
    tiny_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def stats(model: Path, pairs: list[dict[str, Any]], *more: str) -> int:
    file = write(model.parent / "pairs.jsonl", pairs)
    return main(["pairs", "stats", str(file), "--model", str(model), *more])


def test_numbers_counted_by_hand(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stats(model, PAIRS, "--json") == 0
    said = capsys.readouterr()
    assert "pairs.jsonl: 3 pairs (text)" in said.err
    found = json.loads(said.out)
    assert found["pairs"] == 3
    assert found["prompts"] == 1
    assert found["batch_pairs"] == 8
    assert found["batches"] == 1
    # The longest sequence has 15 tokens; below the prompt's 10 stand "yes." and "no" with ".", "t." and "pe.".
    assert found["tokens"] == {"padded": 90, "real": 84, "tree": 10 + 4 + 2 + 1 + 2 + 3}
    assert found["completion_tokens_shared"] == 0
    # "yes." against "no.", "not." and "nope."
    assert found["edit_distance"] == {
        "positional": {"mean": pytest.approx((1 + 3 / 4 + 1) / 3), "median": 1},
        "levenshtein": {"mean": pytest.approx((3 / 4 + 3 / 4 + 4 / 5) / 3), "median": 0.75},
    }
    assert found["gain"] == dict.fromkeys(("all", "min", "p25", "median", "p75", "max"), 90 / 22)
    linear, head, width = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32), 258 * 16, 2 * 16
    padded = 90 * linear + 24 * head + 2 * width * 6 * sum(range(1, 16))
    seen = [*range(1, 15), *range(11, 14), *range(13, 15), *range(13, 16)]
    tree = 22 * linear + 12 * head + 2 * width * sum(seen)
    assert found["estimated_speedup"]["all"] == pytest.approx(padded / tree)
    assert found["no_estimate"] is None


def test_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stats(model, PAIRS, "--batch-pairs", "1") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{model.parent / 'pairs.jsonl'}: 3 pairs (text)\n\n")
    lines = said.splitlines()
    assert "batches of 1 pairs                               3" in lines
    # Sequences of 14, 14 and 15 tokens; trees of 17, 18 and 19.
    assert "tokens, padded                                  86" in lines
    assert "tokens, real                                    84" in lines
    assert "tokens, in the trees                            54" in lines
    assert "  by position (Hamming)                      91.7%    100.0%" in lines
    (gain,) = (line for line in lines if line.startswith("tokens, padded / in the tree"))
    assert gain.split()[6::2] == ["1.59", "1.56", "1.57", "1.58", "1.61", "1.65"]
    assert "not measured" in lines[-1]


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_picture(model: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a single batch, and where a file's name looks like a formula."""
    pairs = write(model.parent / "$x$ $^.jsonl", PAIRS)
    picture = model.parent / name
    argv = ["pairs", "stats", str(pairs), "--model", str(model), "--picture", str(picture)]
    assert main(argv) == 0
    assert f"Picture: {picture}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG" if name == "a.png" else b"<?xml")


def test_options_of_reading(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = [{"q": x["prompt"], "good": x["chosen"], "bad": x["rejected"]} for x in PAIRS]
    columns = ["--columns", "prompt=q", "chosen=good", "rejected=bad"]
    assert (
        stats(model, renamed, *columns, "--max-length", "14", "--too-long", "drop", "--json") == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 2
    assert found["tokens"]["real"] == 14 + 13 + 14 + 14
    # With a chat template: two tokens around the prompt, and one more ends the completion.
    assert stats(model, PAIRS, "--chat", "--json") == 0
    chat = json.loads(capsys.readouterr().out)
    assert chat["tokens"]["real"] > 84


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--max-length", "14"], 1, "pairs.jsonl:3: the pair has 15 tokens, more than max_length"),
        (["--columns", "prompt"], 1, "--columns is 'prompt', expected NAME=COLUMN"),
        (["--columns", "prompt=q"], 1, "pairs.jsonl:1: "),
        (["--chat-template-path", "no-such.jinja"], 1, "no-such.jinja"),
        (["--dataset-train-split", "test"], 1, "a file has no splits"),
        (["--picture", "no-such-folder/a.png"], 1, "--picture is 'no-such-folder/a.png'"),
        (["--picture", "a.nonsense"], 1, "--picture is 'a.nonsense', expected a name that ends"),
        (["--batch-pairs", "0"], 2, "argument --batch-pairs: 0 is not a positive number"),
        (["--too-long", "cut"], 2, "argument --too-long: invalid choice: 'cut'"),
        (["--learning-rate", "1"], 2, "unrecognized arguments: --learning-rate 1"),
    ],
)
def test_mistakes(
    model: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    if code == 1:
        assert stats(model, PAIRS, *more) == 1
    else:
        with pytest.raises(SystemExit) as stop:
            stats(model, PAIRS, *more)
        assert stop.value.code == 2
    said = capsys.readouterr()
    (line,) = (line for line in said.err.splitlines() if "error: " in line)
    assert message in line


def test_no_such_file_or_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pairs", "stats", "no-such.jsonl", "--model", str(model)]) == 1
    assert "no-such.jsonl" in capsys.readouterr().err
    assert stats(model.parent / "none", PAIRS) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, code in ((["pairs"], 2), (["pairs", "stats", "x"], 2), (["pairs", "stats", "-h"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == code
    assert "--batch-pairs N" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "linear", "attention"),
    [
        (LlamaConfig(**SIZES, **HEADS), 2 * (4 * 16 * 16 + 3 * 16 * 32), [(16, None)] * 2),
        (GPT2Config(**SIZES, n_head=4), 2 * 12 * 16 * 16, [(16, None)] * 2),
        (
            MistralConfig(**SIZES, **HEADS, num_key_value_heads=2, sliding_window=7),
            2 * (3 * 16 * 16 + 3 * 16 * 32),
            [(16, 7)] * 2,
        ),
        (
            Gemma2Config(**SIZES, **HEADS, num_key_value_heads=2, head_dim=8, sliding_window=7),
            2 * (3 * 16 * 32 + 3 * 16 * 32),
            [(32, 7), (32, None)],
        ),
        (  # two of four experts, and what chooses them
            MixtralConfig(**SIZES, **HEADS, num_key_value_heads=2, num_local_experts=4),
            2 * (3 * 16 * 16 + 2 * 3 * 16 * 32 + 4 * 16),
            [(16, None)] * 2,
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
@pytest.mark.filterwarnings("ignore")
def test_work_of_models(
    tmp_path: Path, config: Any, linear: int, attention: list[tuple[int, int | None]]
) -> None:
    config.save_pretrained(tmp_path)
    assert model_work(str(tmp_path)) == (Work(linear, 16 * 100, tuple(attention)), None)


@pytest.mark.parametrize("config", [MambaConfig(**SIZES), FalconH1Config(**SIZES, **HEADS)])
def test_models_whose_layers_carry_a_state_get_no_estimate(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    work, why = model_work(str(tmp_path))
    assert work is None
    assert why is not None
    assert "state runs along the sequence" in why


@pytest.mark.parametrize("kind", [BloomConfig, GPTNeoConfig])
def test_models_that_cannot_share_get_no_estimate(tmp_path: Path, kind: Any) -> None:
    kind().save_pretrained(tmp_path)
    work, why = model_work(str(tmp_path))
    assert work is None
    assert str(why).endswith("cannot share prefixes: its attention is its own")


def test_table_without_an_estimate(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MambaConfig(**SIZES | {"vocab_size": 258}).save_pretrained(model)
    assert stats(model, PAIRS) == 0
    said = capsys.readouterr().out
    assert "no estimate of a step's speed-up: mamba has layers" in said
    assert "tokens, padded / in the tree" in said
    assert "speed-up of a step, estimate" not in said


def test_a_plan_from_pairs(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths and the tree's share are those that ``pairs stats`` counts."""
    file = write(model.parent / "pairs.jsonl", PAIRS)
    assert stats(model, PAIRS, "--batch-pairs", "3", "--json") == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    options = ["--pairs", str(file), "--pairs-per-gpu", "3", "--gpus", "H100", "--json"]
    assert main(["plan", "--model", str(model), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == tokens["padded"] / 6
    assert found["tree_share"] == pytest.approx(tokens["tree"] / tokens["padded"])
    assert found["real_share"] == pytest.approx(tokens["real"] / tokens["padded"])
    assert found["completion_tokens"] == 4  # 3 x "yes" and "no", "not", "nope", each with its end
