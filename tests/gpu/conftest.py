"""Where these tests run: on a CUDA GPU; or, to try the tests themselves, tiny and in Triton's
interpreter (``TRITON_INTERPRET=1``), without those that only a chip can answer; or recorded
(``FASTDPOP_RECORD=FILE``, under ``python -O`` and ``--assert=plain``): tiny and on the CPU, with
launches that are written down instead of made, for ``bench/plan.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fastdpop import engines
from fastdpop.engines import Engine
from fastdpop.engines.triton import TritonEngine
from tests.gpu import problems

SHARD = os.environ.get("FASTDPOP_SHARD", "1/1")
"""Which part of the tests to run, as in 2/6."""
RECORD = os.environ.get("FASTDPOP_RECORD")
"""Where to write what would be launched."""
SECONDS = 1.0
"""What a test takes on a chip, apart from compiling, where its mark `takes` says nothing else."""

KERNELS = "triton-kernels"
"""The Triton engine with its own kernels for all products."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "takes(seconds): on a chip, apart from compiling")
    config.addinivalue_line("markers", "unpoisoned: new memory is left as it is")
    if torch.cuda.is_available() and not problems.INTERPRETED:
        from tests import launches

        launches.settle_keys()
    if KERNELS not in engines._ENGINES:
        engines.register(TritonEngine(products="kernels", name=KERNELS), first=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = map(int, SHARD.split("/"))
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    others = [item for i, item in enumerate(here) if i % count != number - 1]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, whatever it held before: what is read before it is written shows."""
    if "unpoisoned" in request.keywords:
        return

    def poisoning(make: Callable[..., Any]) -> Callable[..., Any]:
        def new(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            if made.is_floating_point() and made.device.type != "meta":
                made.detach().fill_(torch.nan)
            return made

        return new

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture
def device() -> torch.device:
    torch.manual_seed(0)
    if torch.cuda.is_available() and RECORD is None:
        return torch.device("cuda")
    if problems.INTERPRETED or RECORD is not None:
        # Threads that wait for each other on tiny problems take a hundred times as long as one.
        torch.set_num_threads(1)
        return torch.device("cpu")
    pytest.skip("needs a CUDA GPU")


@pytest.fixture
def chip(device: torch.device) -> Iterator[torch.device]:
    """A device with streams, graphs and an allocator of its own."""
    if RECORD is not None:
        yield device
        return
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU: the interpreter has no streams and no device memory")
    torch.cuda.empty_cache()
    yield device
    torch.cuda.synchronize()  # an error of a kernel belongs to the test that launched it
    torch.cuda.empty_cache()


def _engine(name: str, device: torch.device) -> Engine:
    found = engines.get(name)
    reason = found.unavailable(device, torch.float32)
    if reason is not None:
        if device.type == "cuda":
            pytest.fail(f"no engine {name} on this GPU: {reason}")
        pytest.skip(reason)
    return found


@pytest.fixture(params=["triton", KERNELS, "eager"])
def any_engine(request: pytest.FixtureRequest, device: torch.device) -> Engine:
    """The engines that run on GPUs, the Triton engine with either choice of products."""
    return _engine(request.param, device)


@pytest.fixture(params=["triton", "eager"])
def engine(request: pytest.FixtureRequest, device: torch.device) -> Engine:
    """The engines that run on GPUs."""
    return _engine(request.param, device)


@pytest.fixture(params=["triton", KERNELS])
def either(request: pytest.FixtureRequest, device: torch.device) -> Engine:
    """The Triton engine with either choice of products."""
    return _engine(request.param, device)


@pytest.fixture
def triton_engine(device: torch.device) -> Engine:
    """The engine of which more is asked than numbers."""
    return _engine("triton", device)


CUDA = (
    *("CUDAGraph", "Stream", "current_stream", "empty_cache", "graph", "max_memory_allocated"),
    *("memory_allocated", "reset_peak_memory_stats", "set_sync_debug_mode", "stream"),
    "synchronize",
)
"""What tests use of a chip beside tensors, which a recording has to do without."""


class _Recorder:
    """Runs tests for their launches only. Results are NaN, so nothing that a test finds out about
    them counts: under ``python -O`` there are no asserts, and an error ends a test in silence.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.tests: list[dict[str, Any]] = []
        self.ended = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> Any:
        from tests import launches

        marked = item.get_closest_marker("takes")
        self.ended = ""
        with contextlib.ExitStack() as stack:
            recording = stack.enter_context(launches.recorded("sm_90a"))
            stack.enter_context(mock.patch.object(torch.testing, "assert_close"))
            for name in CUDA:
                fake = mock.MagicMock(return_value=0 if "memory" in name else mock.DEFAULT)
                stack.enter_context(mock.patch.object(torch.cuda, name, fake))
            result = yield
        self.tests.append(
            {
                "name": item.name,
                "seconds": marked.args[0] if marked else SECONDS,
                "ended": self.ended,
                "compiled": launches.names(recording),
            }
        )
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self) -> Any:
        try:
            yield
        except Exception as error:
            self.ended = repr(error)
        return True

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.tests), encoding="utf-8")


if RECORD is not None:

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(session: pytest.Session) -> None:
        assert RECORD is not None
        session.config.pluginmanager.register(_Recorder(RECORD))
