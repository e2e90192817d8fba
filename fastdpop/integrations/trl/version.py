"""The versions of TRL that are served."""

from __future__ import annotations

import re

OLDEST, NEWEST = (0, 29), (1, 16)
"""By their first two numbers."""


def check_version(version: str) -> None:
    """
    Raises:
        ImportError: this version of TRL is not served.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    if not OLDEST <= release <= NEWEST:
        after = (NEWEST[0], NEWEST[1] + 1)
        oldest, newest, after_it = (f"{major}.{minor}" for major, minor in (OLDEST, NEWEST, after))
        raise ImportError(
            f"trl is {version}, expected {oldest} to {newest}: pip install 'trl>={oldest},<{after_it}', "
            "or call fastdpop.attach in a loop of your own"
        )
