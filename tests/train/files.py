"""A model and pairs so small that `fastdpop train` takes seconds on a CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastdpop.cli import main
from tests.tiny_model import CHATML, tiny_llama, tiny_tokenizer

WARNINGS = [
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:.*pin_memory:UserWarning",
]
"""Of TRL and what it imports."""


def rows(count: int, offset: int = 0) -> list[dict[str, Any]]:
    """Sums, right and wrong, of several lengths."""
    return [
        {
            "prompt": f"{n} + {n} = ",
            "chosen": f"{2 * n}" + ", of course" * (n % 3),
            "rejected": f"{2 * n + 1}" + "!" * (n % 4),
        }
        for n in range(3 + offset, 3 + offset + 7 * count, 7)
    ]


def write(path: Path, pairs: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@dataclass
class Files:
    """A folder with ``model``, ``train.jsonl`` and ``test.jsonl``; runs go into ``out``."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, train: int = 6, test: int = 3) -> Files:
        folder.mkdir(exist_ok=True)
        tiny_llama(initializer_range=0.2).save_pretrained(folder / "model")
        tiny_tokenizer(CHATML).save_pretrained(folder / "model")
        write(folder / "train.jsonl", rows(train))
        write(folder / "test.jsonl", rows(test, 5))
        return cls(folder)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def argv(self, *more: str, out: Path | None = None) -> list[str]:
        """A short run: 2 pairs in a batch, a learning rate that shows, a log line for every step."""
        fixed = {
            "--model": self.folder / "model",
            "--pairs": self.folder / "train.jsonl",
            "--output": out or self.out,
            "--batch-pairs": 2,
            "--learning-rate": 1e-2,
            "--warmup": 0,
            "--logging-steps": 1,
            "--device": "cpu",
        }
        given = {text.partition("=")[0] for text in more}
        argv = [str(x) for pair in fixed.items() if pair[0] not in given for x in pair]
        return ["train", *argv, *more]

    def run(self, *more: str, out: Path | None = None) -> int:
        return main(self.argv(*more, out=out))

    def metrics(self, out: Path | None = None) -> list[dict[str, Any]]:
        lines = ((out or self.out) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self, out: Path | None = None) -> list[float]:
        return [row["loss"] for row in self.metrics(out) if "loss" in row]

    def weights(self, out: Path | None = None) -> dict[str, torch.Tensor]:
        (path,) = (out or self.out).glob("*model.safetensors")
        return load_file(path)
