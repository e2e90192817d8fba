"""The kernels run on the CPU, in Triton's interpreter, and triton decides on that when it is first
imported: `make test` gives them a pytest process of their own, under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    pytest.importorskip("triton")
