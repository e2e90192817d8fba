"""What a release consists of: files, names, and the page that an index makes of README.md.

`make wheels` builds it with the C++ library, audits it, and takes the first step with it; here it is built as on a
machine without a compiler, in seconds.
"""

from __future__ import annotations

import email
import re
import runpy
import subprocess
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import fastdpop
from tools.wheels.build import ROOT, build_sdist, build_wheel, copy_tracked, time_of_last_commit

NONE = {"CC": "/no/such/compiler", "CXX": "/no/such/compiler"}
REPOSITORY = "https://github.com/fastdpop/fastdpop"
VERSION = fastdpop.__version__

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")


def build(folder: Path) -> tuple[Path, Path]:
    seconds = time_of_last_commit()
    sdist = build_sdist(copy_tracked(folder / "tracked"), folder / "sdist", seconds)
    return sdist, build_wheel(sdist, folder / "built", seconds, **NONE)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def metadata(release: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(release[1]) as archive:
        return email.message_from_bytes(archive.read(f"fastdpop-{VERSION}.dist-info/METADATA"))


def tracked(*folders: str) -> set[str]:
    listed = ["git", "ls-files", *folders]
    return set(subprocess.check_output(listed, cwd=ROOT, text=True).splitlines())


def test_one_wheel_for_every_python(release: tuple[Path, Path]) -> None:
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert release[1].name == f"fastdpop-{VERSION}-py3-none-{platform}.whl"
    with zipfile.ZipFile(release[1]) as archive:
        said = archive.read(f"fastdpop-{VERSION}.dist-info/WHEEL").decode()
    assert f"Tag: py3-none-{platform}\n" in said
    assert "Root-Is-Purelib: false" in said


def test_the_wheel_holds_the_package_and_nothing_else(release: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(release[1]) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == tracked("fastdpop")
    assert {"fastdpop/py.typed", "fastdpop/assets/gsm8k-train.jsonl"} <= held


def test_the_sdist_holds_what_builds_it(release: tuple[Path, Path]) -> None:
    with tarfile.open(release[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    texts = {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "SECURITY.md"}
    assert tracked("fastdpop", "csrc") | texts | {"pyproject.toml", "setup.py"} <= held
    assert not {name.split("/")[0] for name in held} & {
        "tests",
        "docs",
        "kernels",
        "build",
        "bench",
    }


def test_the_same_bytes_every_time(release: tuple[Path, Path], tmp_path: Path) -> None:
    again = build(tmp_path)
    for first, second in zip(release, again, strict=True):
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes()


def test_links_of_the_page_on_an_index(metadata: Message) -> None:
    """They are absolute, and lead to files that there are; pictures to the files themselves."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = str(metadata.get_payload())
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", prose)
    links += [
        ("!" * (key != "href"), url)
        for key, url in re.findall(r'\b(href|src|srcset)="([^"]+)"', prose)
    ]
    assert len(links) > 30
    for picture, url in links:
        assert url.startswith(("https://", "mailto:")), url
        if url.startswith(REPOSITORY + "/"):
            kind, path = url.removeprefix(f"{REPOSITORY}/").split("/", 1)
            version, _, name = path.partition("/")
            assert (kind, version) == ("raw" if picture else "blob", f"v{VERSION}"), url
            assert (ROOT / name.partition("#")[0]).exists(), url


def test_a_page_on_an_index_renders(metadata: Message) -> None:
    """No mathematics, which indices do not set, and commands that install from there."""
    page = str(metadata.get_payload())
    assert "$$" not in page
    assert "pip install ." not in page
    assert "pip install '." not in page
    assert "git clone" not in page
    assert "not on PyPI" not in page
    assert "pip install fastdpop" in page


LINKS = """[a](docs/x.md#y) [b](#cost) [c](https://d.org/e)
![f](g.png) <img src="h.png"> [![i](j.png)](k.md)
`pip install .`<!-- in a clone -->, here,<!-- /in a clone --> and pip install '.[trl]'

```python
kernel[grid](args)
```
"""


def test_how_links_become_absolute() -> None:
    rewrite = runpy.run_path(str(ROOT / "setup.py"))["long_description"]
    assert (
        rewrite(LINKS, "https://r", "1")
        == """[a](https://r/blob/v1/docs/x.md#y) [b](https://r/blob/v1/README.md#cost) [c](https://d.org/e)
![f](https://r/raw/v1/g.png) <img src="https://r/raw/v1/h.png"> [![i](https://r/raw/v1/j.png)](https://r/blob/v1/k.md)
`pip install fastdpop` and pip install 'fastdpop[trl]'

```python
kernel[grid](args)
```
"""
    )


def test_what_an_index_lists(metadata: Message) -> None:
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
    assert urls["Repository"] == REPOSITORY
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT"
    assert metadata.get_all("License-File") == ["LICENSE", "fastdpop/assets/gsm8k-LICENSE"]
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)}
    assert versions <= set(metadata.get_all("Classifier", []))


def test_a_citation_names_this_version() -> None:
    said = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {VERSION}\n" in said
    assert f"\nrepository-code: {REPOSITORY}\n" in said
    assert "arXiv:2402.13228" in said
