"""Processes for all tests of this folder, which run in one worker of pytest's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/distributed" in item.path.as_posix():
            item.add_marker(pytest.mark.xdist_group("distributed"))


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    """Two processes."""
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Pool]:
    """Four processes."""
    pool = Pool(4)
    yield pool
    pool.stop()
