"""Every code block of the documentation works as it is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sybil")
pytest.importorskip("trl")

import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

import fastdpop
from tests.snippets import files
from tests.snippets.page import Page

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "recipes/**/*.md")
    for path in ROOT.glob(pattern)
    if "```" in path.read_text()
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of TRL and what it imports
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder, empty but for the small model that the pages name, and trainers that take the CPU where readers
    have a GPU.
    """
    monkeypatch.chdir(tmp_path)
    files.model("HuggingFaceTB/SmolLM2-135M-Instruct")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    check = TrainingArguments.__post_init__

    def on_a_cpu(self: Any) -> None:
        self.use_cpu = True
        check(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_a_cpu)
    yield
    fastdpop.unpatch_trl()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page(path: Path) -> None:
    page = Page(path)
    page.run()
    if page.failures:
        pytest.fail("\n".join(page.failures), pytrace=False)
    assert page.count.total() == path.read_text().count("```") // 2
