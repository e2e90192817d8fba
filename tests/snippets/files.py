"""Models and data of the names that a command line has, in the working directory."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import yaml

from tests.tiny_model import CHATML, tiny_llama, tiny_tokenizer

FIXTURES = Path(__file__).parents[1] / "recipes" / "fixtures"
_MODELS = ("--model", "--reference", "--model_name_or_path")
_PAIRS = ("--pairs", "--eval-pairs", "--dataset_name")
_REST = ["--model", "PATH", "--pairs", "pairs.jsonl", "--output", "run"]
"""What stands for ``...`` behind ``fastdpop train`` and ``trl dpo``."""

_CARD = "---\nconfigs:\n- config_name: main\n  data_files: train.jsonl\n---\n"
ROWS = [
    {"prompt": f"{n} + {n} = ", "chosen": f"{2 * n}, yes", "rejected": f"{2 * n + 1}, yes"}
    for n in range(10, 18)
]


def provide(argv: list[str]) -> list[str]:
    """Make what the options name, if it isn't there; the arguments, whole where ``...`` stood."""
    rest = _REST if argv[0] == "train" else []
    if argv[:2] == ["trl", "dpo"]:
        rest = ["--model_name_or_path", "PATH", "--dataset_name", "pairs", "--output_dir", "run"]
    whole = [word for given in argv for word in (rest if given == "..." else [given])]
    for option, value in zip(whole, [*whole[1:], ""], strict=True):
        if option in _MODELS:
            model(value)
        elif option in _PAIRS:
            pairs(value)
        elif option == "--config" and value.endswith(".yaml"):
            _config(Path(value))
        elif option in ("--output", "--out") and "--resume" not in whole:
            _remove(value)  # of another line
    if whole[:2] == ["pairs", "stats"]:
        pairs(whole[2])
    if whole[:2] == ["pairs", "build"]:
        source(*whole[2:4])
    return whole


def _config(path: Path) -> None:
    if not path.exists():
        path.write_text("model: PATH\npairs: pairs.jsonl\noutput: run\n")
    given = yaml.safe_load(path.read_text())
    model(given["model"])
    pairs(given["pairs"])
    _remove(given["output"])


def _remove(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def model(name: str) -> None:
    """A tiny model with its tokenizer, or its configuration where that is a JSON file."""
    path = Path(name)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(tiny(), target_is_directory=True)


@functools.cache
def tiny() -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = Path(tempfile.mkdtemp())
    made = tiny_llama(seed=1, tied=False, initializer_range=0.2)
    made.config.max_position_embeddings = 2048  # of data in the documentation
    made.save_pretrained(folder)
    tiny_tokenizer(CHATML).save_pretrained(folder)
    return folder


def pairs(name: str) -> None:
    """A file of pairs, or a folder with one."""
    path = Path(name)
    if not path.exists():
        path = path if path.suffix else path / "train.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def source(kind: str, name: str) -> None:
    """Rows of the data set that pairs are built from: ours, of its form."""
    path = Path(name)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if (FIXTURES / name).is_dir():
        shutil.copytree(FIXTURES / name, path)
        return
    folders = {"arc": "allenai/ai2_arc", "metamath": "meta-math", "hellaswag": "Rowan"}
    if kind == "gsm8k":
        rows = [{"question": "1+1?", "answer": "It is 1+1=<<1+1=2>>2.\n2+1=<<2+1=3>>3\n#### 3"}]
        path.mkdir()
        (path / "README.md").write_text(_CARD)
        (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
        return
    found = sorted(FIXTURES.glob(f"{folders[kind]}/**/*.json*"))
    shutil.copy(
        next(file for file in found if "train" in file.name or "MATH" in str(file).upper()), path
    )
