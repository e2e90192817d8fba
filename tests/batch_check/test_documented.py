"""The page of findings has every code, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_codes() -> None:
    source = "".join(p.read_text() for p in (ROOT / "fastdpop" / "batch_check").glob("*.py"))
    codes = re.findall(r'Finding\(\s*"([a-z-]+)",', source)
    shown = re.findall(
        r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "check.md").read_text(), re.MULTILINE
    )
    assert len(shown) == len(set(shown))
    assert set(shown) == set(codes)
