"""The picture that a run leaves in its folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastdpop.train.picture import PICTURE, drawn
from fastdpop.train.trainer import PairTrainer
from tests.train.files import WARNINGS, Files

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files.make(tmp_path / "files")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Those that are saved."""
    found: list[Figure] = []
    own = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a: found.append(self) or own(self, *a))
    return found


def curves(axes: Axes) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values by what the legend calls them."""
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): tuple(map(list, line.get_data())) for line in lines}


def logged(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    there = [row for row in rows if name in row]
    return [row["step"] for row in there], [row[name] for row in there]


def test_a_run_is_drawn_from_what_it_logged(
    files: Files, figures: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run("--eval-pairs", str(files.folder / "test.jsonl"), "--eval-every", "2") == 0
    assert capsys.readouterr().out.endswith(f"\nPicture: {files.out / PICTURE}\n")
    assert (files.out / PICTURE).read_bytes().startswith(b"\x89PNG")
    rows = files.metrics()
    (figure,) = figures
    loss, logratios, shares = map(curves, figure.axes)
    names = {"chosen": "logratios/chosen", "rejected": "logratios/rejected"}
    shown = {"hinge on": "hinge_on", "told apart": "rewards/accuracies"}
    for panel, known in ((loss, {"loss": "loss"}), (logratios, names), (shares, shown)):
        want = {f"{label}, training": logged(rows, name) for label, name in known.items()}
        want |= {
            f"{label}, held out": logged(rows, f"eval_{name}") for label, name in known.items()
        }
        assert panel == want
    assert loss["loss, training"][0] == [1, 2, 3]
    assert loss["loss, held out"][0] == [0, 2, 3]


@pytest.mark.parametrize(
    ("ratio", "error", "step", "title"),
    [
        (0.004, 0.0, 3, "Chosen completions are as likely as before"),
        (0.3, 0.2, 3, "What chosen completions became may be chance"),
        (-0.5, 0.2, 3, "Chosen completions became less likely"),
        (0.5, 0.2, 2, "Chosen completions became more likely (step 2)"),
    ],
)
def test_the_title_says_what_the_last_lines_say(
    ratio: float, error: float, step: int, title: str, tmp_path: Path, figures: list[Figure]
) -> None:
    """And up to which step, where the run was not evaluated at its end."""
    name = "eval_logratios/chosen"
    held_out = {"step": step, "eval_loss": 0.7, name: ratio, f"{name}_standard_error": error}
    assert drawn([{"step": 3, "loss": 0.7}, held_out], tmp_path) is not None
    (figure,) = figures
    assert figure.axes[1].get_title(loc="left") == title


def test_a_run_without_held_out_pairs(files: Files, figures: list[Figure]) -> None:
    assert files.run("--steps", "1") == 0
    (figure,) = figures
    assert list(curves(figure.axes[0])) == ["loss"]
    assert figure.axes[1].get_title(loc="left") == "Log-ratios"


@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupted_run(
    after: int, files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = PairTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == after:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", compute_loss)
    assert files.run() == 130
    said = capsys.readouterr()
    assert f"interrupted after step {after}" in said.err
    assert (f"Picture: {files.out / PICTURE}" in said.out) == (after > 0)
    assert (files.out / PICTURE).exists() == (after > 0)


def test_without_matplotlib_a_run_says_what_to_install(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "matplotlib" else own(name, *a),
    )
    assert files.run() == 0
    assert capsys.readouterr().out.count("pip install matplotlib") == 1
    assert not (files.out / PICTURE).exists()


def test_a_picture_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    row = {"step": 1, "loss": 0.7, "logratios/chosen": 0.0, "logratios/rejected": 0.0}
    said = drawn([row], tmp_path / "none")
    assert said is not None
    assert said.startswith("No picture of the run: ")
    assert str(tmp_path / "none") in said


def test_nothing_logged_is_no_picture(tmp_path: Path) -> None:
    assert drawn([{"step": 0, "eval_loss": 0.7}], tmp_path) is None
    assert not any(tmp_path.iterdir())
