"""Where code blocks run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

import fastdpop
from tests.snippets import files


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
