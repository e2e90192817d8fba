"""Every code block of the documentation works as it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sybil")
pytest.importorskip("trl")

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
    # Every file of pairs that a page names is the same one here.
    pytest.mark.filterwarnings("ignore:.*held-out pairs are training pairs"),
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page(path: Path) -> None:
    page = Page(path)
    page.run()
    if page.failures:
        pytest.fail("\n".join(page.failures), pytrace=False)
    assert page.count.total() == path.read_text().count("```") // 2
