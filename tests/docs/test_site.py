"""The site: what links, pictures, scripts and the search lead to. Looking at it is `make look`'s."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from fastdpop import losses
from tests.docs.site import ADDRESS, DOCS, ROOT, Site

pytestmark = pytest.mark.xdist_group("site")

LINK = re.compile(r"\]\(([^)\s]+)\)")
TEXTS = ("README.md", "CONTRIBUTING.md", "recipes/smaug/RECIPES.md")
# Elements that make a browser ask for what they name; a link is followed by a reader alone.
LOADING = ("script", "img", "source", "iframe", "embed", "object", "video", "audio", "track")


def target(site: Site, page: Path, link: str) -> tuple[Path, str]:
    """The file and the id that a link leads to."""
    address, anchor = urldefrag(link)
    path = unquote(urlsplit(address).path)
    if path.startswith("/fastdpop/"):  # the page for what is not found names everything in full
        file = site.folder / path.removeprefix("/fastdpop/")
    else:
        file = (page.parent / path).resolve() if path else page
    return (file / "index.html" if file.is_dir() else file), unquote(anchor)


def is_inside(link: str) -> bool:
    return not urlsplit(link).scheme and not link.startswith("//")


def test_links_and_anchors_of_the_site(site: Site) -> None:
    broken, seen = [], 0
    for path, page in site.pages.items():
        for link in {a["href"] for a in page.all("a") if "href" in a}:
            if link.startswith(ADDRESS):
                link = "/fastdpop/" + link.removeprefix(ADDRESS)
            if not is_inside(link):
                continue
            file, anchor = target(site, path, link)
            known = site.pages[file].ids if file in site.pages else set()
            # The theme's own button to the top, on every page
            if not file.is_file() or (anchor and anchor not in known and anchor != "__"):
                broken.append(f"{path.relative_to(site.folder)}: {link}")
            seen += 1
    assert not broken
    assert seen > 500


@pytest.mark.parametrize("name", TEXTS)
def test_links_of_texts_outside_of_the_site(site: Site, name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = [link for link in LINK.findall(text) if is_inside(link)]
    assert links
    for link in links:
        path, anchor = urldefrag(link)
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.exists(), f"{name}: {link}"
        if anchor and file.parent == DOCS:
            assert anchor in site.page(file.stem).ids, f"{name}: {link}"
        elif anchor:
            assert anchor in _headings(file.read_text(encoding="utf-8")), f"{name}: {link}"


def _headings(text: str) -> set[str]:
    """Anchors as a repository's host makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_pictures_exist_and_are_described(site: Site) -> None:
    seen = set()
    for path, page in site.pages.items():
        for image in page.all("img"):
            file, _ = target(site, path, image["src"])
            assert file.is_file(), f"{path}: {image['src']}"
            seen.add(file.name)
            if "logo" not in image["src"]:
                assert len(image.get("alt", "")) > 20, f"{path}: {image['src']}"
    # A picture that no page shows is left over. The last one is for other sites, which show it beside a link.
    kept = {path.name for path in (DOCS / "assets").glob("*.png")}
    kept |= {path.name for path in (ROOT / "bench" / "results").glob("*.png")}
    assert kept - seen == {"social.png"}


def test_nothing_is_loaded_from_elsewhere(site: Site) -> None:
    policy = re.compile("default-src 'self' ")
    for path, page in site.pages.items():
        loaded = [e.get("src", e.get("data", "")) for e in page.all(*LOADING)]
        loaded += [e["srcset"] for e in page.having("srcset")]
        loaded += [
            e["href"] for e in page.all("link") if e["rel"] not in ("canonical", "prev", "next")
        ]
        assert all(map(is_inside, loaded)), f"{path}: {loaded}"
        assert any(policy.match(e.get("content", "")) for e in page.all("meta")), path
        # The theme's component that asks the repository's host for its stars
        assert "source" not in [e["data-md-component"] for e in page.having("data-md-component")]
    for style in site.folder.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text), style


def test_every_page_has_what_a_link_to_it_shows(site: Site) -> None:
    for path, page in site.pages.items():
        named = {e.get("name") or e.get("property"): e.get("content") for e in page.all("meta")}
        assert named["description"], path
        assert named["og:title"], path
        picture = str(named["og:image"])
        assert (site.folder / picture.removeprefix(ADDRESS)).is_file()
        if path.name == "index.html":
            canonical = [e["href"] for e in page.all("link") if e["rel"] == "canonical"]
            place = path.parent.relative_to(site.folder).as_posix()
            assert canonical == [ADDRESS if place == "." else f"{ADDRESS}{place}/"]


def test_a_page_has_one_name_and_a_description_of_its_own(site: Site) -> None:
    """In the navigation, in the tab and above the text."""
    said = []
    for path, page in site.pages.items():
        if path.parent == site.folder:
            continue  # the first page, and that for what is not found
        source = path.read_text(encoding="utf-8")
        (heading,) = re.findall(r"<h1[^>]*>(.*?)<a class=\"headerlink\"", source, re.DOTALL)
        (title,) = re.findall(r"<title>(.*?) - fastdpop</title>", source)
        assert _text(heading).strip() == unescape(title), path
        said += [e["content"] for e in page.all("meta") if e.get("name") == "description"]
    assert len(said) == len(set(said)) > 25


@pytest.mark.parametrize("name", ["docs/install.md", "docs/index.md", "README.md"])
def test_the_way_in_is_a_clone_of_this_repository(name: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (address,) = re.findall(r'^Repository = "(.+)"$', project, re.MULTILINE)
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"git clone (\S+)", text) == [address]
    assert "not on PyPI yet" in text


def test_every_page_is_in_the_navigation(site: Site) -> None:
    """Of the page for what is not found: it lists them all."""
    path = site.folder / "404.html"
    listed = {target(site, path, a["href"])[0] for a in site.pages[path].all("a") if "href" in a}
    assert set(site.pages) - {path} <= listed


def test_search_finds_what_people_look_for(site: Site) -> None:
    index = json.loads((site.folder / "search" / "search_index.json").read_text(encoding="utf-8"))
    entries = {entry["location"]: f"{entry['title']} {entry['text']}" for entry in index["docs"]}
    for name in losses.available():
        assert name in entries[f"losses/#{name}"], name
    words = (
        "patch_trl share_prefixes fused_dpop_loss ref_logps fused_preference_loss attach "
        "dpop_lambda SmolLM2 FSDP2 Axolotl Liger qwen3_moe workspace_bytes log-prob label_smoothing"
    )
    text = " ".join(entries.values())
    assert not [word for word in words.split() if word not in text]
    # The browser cuts texts and what is typed at this, and compares what is left.
    found = set(re.split(index["config"]["separator"], re.sub(r"<[^>]+>", "", text)))
    assert {"OOM", "QLoRA", "NaN", "rewards/accuracies", "dpop_lambda", "2402.13228"} <= found


def test_formulas_are_in_the_font(site: Site) -> None:
    """Every formula was converted, and the subset of the font that is shipped has its letters."""
    style = (DOCS / "style.css").read_text(encoding="utf-8")
    face = re.search(r"unicode-range: ([^;]+);", style)
    assert face is not None
    ranges = [part.strip().removeprefix("U+").partition("-") for part in face[1].split(",")]
    bounds = [(int(first, 16), int(last or first, 16)) for first, _, last in ranges]
    count = 0
    for path in site.pages:
        source = path.read_text(encoding="utf-8")
        assert "arithmatex" not in source, path
        assert set(re.findall(r'mathvariant="(\w+)"', source)) <= {"normal"}, path
        for formula in re.findall(r"<math.*?</math>", source, re.DOTALL):
            count += 1
            for letter in set(_text(formula)):
                assert any(a <= ord(letter) <= b for a, b in bounds), f"{path}: {letter!r}"
    assert count > 250


def _text(formula: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", formula))


def test_the_button_copies_commands_alone(site: Site) -> None:
    copied = [e["data-copy"] for page in site.pages.values() for e in page.having("data-copy")]
    assert len(copied) > 10
    assert "make bench" in "\n".join(copied)
    for text in copied:
        assert text.strip()
        assert not re.search(r"^\$", text, re.MULTILINE), text
    assert any(re.search(r"--num_processes 32 \\\n +--machine_rank \$N", text) for text in copied)


@pytest.mark.parametrize("name", ["trl_dpop.py", "quickstart.py"])
def test_scripts_stand_whole_on_the_first_page(site: Site, name: str) -> None:
    script = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert script.strip() in site.page("index").text
