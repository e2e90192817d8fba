"""These tests need Axolotl, which pins much: `make test-axolotl` runs them in an environment of their own."""

from __future__ import annotations

import importlib.util
import os

import pytest

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
MISSING = importlib.util.find_spec("axolotl") is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if MISSING and str(item.path).startswith(here):
            item.add_marker(pytest.mark.skip(reason="axolotl is not installed: make test-axolotl"))
