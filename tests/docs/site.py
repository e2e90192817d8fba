"""The built site as the tests see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ADDRESS = "https://fastdpop.github.io/fastdpop/"


@dataclass
class Page(HTMLParser):
    """One page: its elements with their attributes, its text and the ids that a link may name."""

    path: Path
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self.ids.add(attributes["id"])

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def having(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.elements if name in attributes]


@dataclass(frozen=True)
class Site:
    """A folder that `mkdocs build` wrote."""

    folder: Path
    pages: dict[Path, Page]

    def page(self, name: str) -> Page:
        """The page of docs/`name`.md."""
        return self.pages[self.folder / ("" if name == "index" else name) / "index.html"]


def read(folder: Path) -> Site:
    return Site(folder, {path: Page(path) for path in sorted(folder.rglob("*.html"))})
