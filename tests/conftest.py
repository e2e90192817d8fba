"""Shared fixtures: one seed for every test, and batches that exercise masks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("fastdpop", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("fastdpop")
# The problems are tiny; two threads that wait for each other on a busy machine take a hundred times
# as long as one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same seed and leaves the generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
