"""Numbers of the data on their way through ``fastdpop train`` to the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from fastdpop.train import run
from fastdpop.train.trainer import PairTrainer
from tests.train.files import WARNINGS, Files, rows, write

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
RPO = "chosen_score rejected_score weight"
WEIGHTS = [0.5, 2.0, 0.1, 3.0, 1.0, 0.25]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files.make(tmp_path / "files")


def give(files: Files, name: str = "weight", weights: list[Any] = WEIGHTS) -> None:
    pairs = [{**row, name: w} for row, w in zip(rows(len(weights)), weights, strict=True)]
    write(files.folder / "train.jsonl", pairs)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The data sets of trainers."""
    seen = []

    class Recording(PairTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            seen.append(kwargs["train_dataset"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(run, "PairTrainer", Recording)
    return seen


def test_a_weight_of_each_pair(files: Files, made: list[Any]) -> None:
    """Twice the weight is twice the loss and twice the gradient, in every batch."""
    always = (
        "--epochs",
        "1",
        "--save-every",
        "0",
        "--learning-rate",
        "1e-9",
        "--max-grad-norm",
        "0",
    )
    found = []
    for factor, out in ((1.0, "one"), (2.0, "two")):
        give(files, weights=[factor * w for w in WEIGHTS])
        assert files.run(*always, "--pair-values", "weight", out=files.folder / out) == 0
        found.append([r for r in files.metrics(files.folder / out) if "loss" in r])
        assert sorted(made[-1]["weight"][:]) == sorted(factor * w for w in WEIGHTS)
    plain = files.folder / "plain"
    write(files.folder / "train.jsonl", rows(6))
    assert files.run(*always, out=plain) == 0
    first = [run[0]["logps/chosen"] for run in (*found, files.metrics(plain))]
    assert first[0] == first[1] == first[2]
    for one, two, without in zip(*found, files.metrics(plain)[:3], strict=True):
        assert two["loss"] == pytest.approx(2 * one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(2 * one["grad_norm"], rel=1e-5)
        assert one["loss"] != pytest.approx(without["loss"], rel=1e-2)
        # The learning rate is not quite 0, and gradients are others.
        assert one["logps/chosen"] == pytest.approx(without["logps/chosen"], rel=1e-7)


def test_another_name_and_csv(files: Files, made: list[Any]) -> None:
    """From a YAML file, too."""
    path = files.folder / "train.csv"
    lines = [
        f'{r["prompt"]},"{r["chosen"]}",{r["rejected"]},{w}'
        for r, w in zip(rows(6), WEIGHTS, strict=True)
    ]
    path.write_text("prompt,chosen,rejected,quality\n" + "\n".join(lines) + "\n")
    config = files.folder / "run.yaml"
    config.write_text("pair_values: weight\ncolumns: {weight: quality}\n")
    always = ("--steps", "1", "--save-every", "0", "--pairs", str(path))
    assert files.run("--config", str(config), *always) == 0
    assert sorted(made[-1]["weight"][:]) == sorted(WEIGHTS)


def test_a_line_that_has_none(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    give(files, weights=[1.0, None, 2.0])
    assert files.run("--pair-values", "weight") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"{files.folder}/train.jsonl:2: field 'weight' is None, expected a finite number >= 0"
        in said
    )


@pytest.mark.filterwarnings("always:.*the loss does not get:UserWarning")
def test_a_column_that_nobody_asked_for(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    give(files)
    assert files.run("--steps", "1", "--save-every", "0") == 0
    said = capsys.readouterr()
    assert "columns not used: weight" in said.out
    assert f"warning: {files.folder}/train.jsonl: {UNASKED} --pair-values weight if it" in said.err


UNASKED = "the loss does not get weight, expected"
ALL = {"weight": 2.0, "margin": 0.5, "offset": 1, "chosen_score": 3.0, "rejected_score": 1.0}


@pytest.mark.filterwarnings("always:.*the loss does not get:UserWarning")
@pytest.mark.parametrize(
    ("more", "row", "advice"),
    [
        ((), ALL, "weight margin offset"),
        (("--pair-values", "margin"), ALL, "margin weight offset"),
        (("--loss_type", "sft"), ALL, "weight"),
        (("--loss", "rpo_sq", "--pair-values", "chosen_score", "rejected_score"), ALL, RPO),
        # Whose own name is taken by another column.
        (("--pair-values", "weight", "--columns", "weight=offset"), ALL, "weight margin"),
        # Text is no number, and neither is a weight below 0.
        ((), {"weight": -1, "margin": "0.5", "offset": 1}, "offset"),
        ((), {"chosen_score": 1.0, "margin": None}, None),
        (
            ("--pair-values", "weight", "--columns", "weight=offset"),
            {"weight": 1, "offset": 1},
            None,
        ),
    ],
)
def test_the_advice_can_be_followed(
    files: Files,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    row: dict[str, Any],
    advice: str | None,
) -> None:
    """It names what the loss reads and can be given, and nothing that it gets already."""
    write(files.folder / "train.jsonl", [{**pair, **row} for pair in rows(4)])
    always = ("--steps", "1", "--save-every", "0")
    assert files.run(*always, *more) == 0
    said = capsys.readouterr().err
    if advice is None:
        assert "does not get" not in said
        return
    assert f"expected --pair-values {advice} if it is to" in said
    rest = more[: more.index("--pair-values")] if "--pair-values" in more else more
    if "--columns" in more:
        rest = more[more.index("--columns") :]
    again = ("--pair-values", *advice.split())
    assert files.run(*always, *rest, *again, out=files.folder / "again") == 0
    assert "does not get" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ("--loss", "sft", "--pair-values", "margin"),
            "pair_values contains 'margin', which SFT(per='token') does not read",
        ),
        (("--loss_type", "sft", "--pair-values", "margin"), "pair_values contains 'margin', which"),
        (("--pair-values", "list"), "contains 'list', which a trainer cannot give"),
        (("--pair-values", "weight", "weight"), "contains 'weight' twice"),
        (("--columns", "weight=quality"), "--pair-values weight gives it to the loss"),
    ],
)
def test_what_does_not_go_together(
    files: Files, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    """Before anything is loaded."""
    assert files.run(*more) == 1
    assert said in capsys.readouterr().err
    assert not files.out.exists()


def test_other_numbers_are_another_run(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    give(files)
    always = ("--pair-values", "weight", "--save-every", "1")
    assert files.run(*always, "--steps", "1") == 0
    manifest = json.loads((files.out / "checkpoint-1" / "fastdpop.json").read_text())
    assert "values: weight" in manifest["identity"]
    give(files, weights=[*WEIGHTS[:5], 0.26])
    assert files.run(*always, "--steps", "2", "--resume") == 1
    assert "values: weight: " in capsys.readouterr().err
    give(files)
    more = ("--warn_displacement", "false")  # on which no number depends
    assert files.run(*always, *more, "--steps", "2", "--resume") == 0
