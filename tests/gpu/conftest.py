"""Where these tests run: on a CUDA GPU; or, to try the tests themselves, tiny and in Triton's
interpreter (``TRITON_INTERPRET=1``), without those that only a chip can answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastdpop import engines
from fastdpop.engines import Engine

SHARD = os.environ.get("FASTDPOP_SHARD", "1/1")
"""Which part of the tests to run, as in 2/6: most of their time goes to compiling one by one."""
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = map(int, SHARD.split("/"))
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    others = [item for i, item in enumerate(here) if i % count != number - 1]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture
def device() -> torch.device:
    torch.manual_seed(0)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if INTERPRETED:
        return torch.device("cpu")
    pytest.skip("needs a CUDA GPU")


@pytest.fixture
def chip(device: torch.device) -> Iterator[torch.device]:
    """A device with streams, graphs and an allocator of its own."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU: the interpreter has no streams and no device memory")
    torch.cuda.empty_cache()
    yield device
    torch.cuda.synchronize()  # an error of a kernel belongs to the test that launched it
    torch.cuda.empty_cache()


@pytest.fixture(params=["triton", "eager"])
def engine(request: pytest.FixtureRequest, device: torch.device) -> Engine:
    """The engines that run on GPUs."""
    try:
        found = engines.get(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    reason = found.unavailable(device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.fixture
def triton_engine(device: torch.device) -> Engine:
    """The engine of which more is asked than numbers."""
    if "triton" not in engines.available(device):
        if device.type == "cuda":
            pytest.fail(f"no Triton engine on this GPU: {engines.explain(device)}")
        pytest.skip("no Triton engine here")
    return engines.get("triton")
