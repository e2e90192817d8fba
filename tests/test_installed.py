"""Commands that tell a user what to install: in messages, in the documentation, in this repository's texts."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fastdpop import installed
from fastdpop.integrations.trl.version import NEWEST, OLDEST

ROOT = Path(__file__).parents[1]
REQUIRES = [
    "torch>=2.9",
    'transformers>=5; extra == "hf"',
    'fastdpop[hf]; extra == "trl"',
    'trl<1.17,>=0.29; extra == "trl"',
    'peft>=0.18; extra == "trl"',
    'fastdpop[trl]; extra == "train"',
    'datasets>=4.7; extra == "train"',
    "triton>=3.6; platform_system == 'Linux' and extra == 'triton'",
]


def plant(monkeypatch: pytest.MonkeyPatch, there: set[str], origin: str | None = None) -> None:
    """Packages that are there, ``name`` new enough or ``name==version``; torch always is."""
    versions = {"torch": "2.9"}
    for one in there:
        name, _, number = one.partition("==")
        versions[name] = number or {"transformers": "5", "trl": "1.16"}.get(name, "99")

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(importlib.metadata, "version", version)
    package = SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: package)


def test_what_an_extra_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, set())
    asked = {extra: installed.command(installed.required(extra)) for extra in ("", "trl", "none")}
    assert asked == {
        "": "pip install 'torch>=2.9'",
        "trl": "pip install 'torch>=2.9' 'transformers>=5' 'trl>=0.29,<1.17' 'peft>=0.18'",
        "none": "pip install 'torch>=2.9'",
    }


@pytest.mark.parametrize(
    ("there", "command"),
    [
        (set(), "pip install 'transformers>=5' 'trl>=0.29,<1.17' 'peft>=0.18'"),
        ({"transformers"}, "pip install 'trl>=0.29,<1.17' 'peft>=0.18'"),
        ({"transformers", "peft"}, "pip install 'trl>=0.29,<1.17'"),
        ({"transformers", "peft", "trl==0.28"}, "pip install 'trl>=0.29,<1.17'"),
        # All are there, so one of them is broken: pip finds out which.
        (
            {"transformers", "peft", "trl"},
            "pip install 'transformers>=5' 'trl>=0.29,<1.17' 'peft>=0.18'",
        ),
    ],
)
def test_the_command_names_what_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, there: set[str], command: str
) -> None:
    plant(monkeypatch, there)
    assert installed.install("trl") == command
    assert installed.needs("patch_trl", "trl", "trl") == f"patch_trl needs trl: {command}"


@pytest.mark.parametrize(
    ("module", "there", "said"),
    [
        ("trl.trainer", {"transformers"}, ": pip install 'trl>=0.29,<1.17' 'peft>=0.18'"),
        ("transformers", set(), ": pip install 'transformers>=5'"),
        ("trl.trainer", {"transformers", "trl==0.28", "peft"}, ": pip install 'trl>=0.29,<1.17'"),
        ("numpy", {"transformers", "trl", "peft"}, ": pip install 'datasets>=4.7'"),  # by datasets
        ("theirs", {"transformers", "trl", "peft", "datasets"}, ""),
    ],
)
def test_what_is_said_of_a_module_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, module: str, there: set[str], said: str
) -> None:
    plant(monkeypatch, there)
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert installed.message(error) == f"No module named {module!r}{said}"
    assert installed.message(ImportError("x: pip install y")) == "x: pip install y"
    assert installed.message(ValueError("x")) == "x"


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        (None, "fastdpop"),
        ('{"url": "file:///src/my%20folder", "dir_info": {}}', "'/src/my folder'"),
        ('{"url": "file:///src/f", "dir_info": {"editable": true}}', "--editable /src/f"),
        ('{"url": "file:///f-1.tar.gz", "archive_info": {}}', "/f-1.tar.gz"),
        (
            '{"url": "https://h/f.git", "vcs_info": {"vcs": "git", "commit_id": "1a"}}',
            "git+https://h/f.git@1a",
        ),
    ],
)
def test_the_command_that_installs_again(
    monkeypatch: pytest.MonkeyPatch, origin: str | None, source: str
) -> None:
    plant(monkeypatch, set(), origin)
    assert installed.reinstall() == (
        f"pip install --force-reinstall --no-deps --no-cache-dir {source}"
    )


def test_a_folder_that_pip_knows_nothing_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    for name in ("requires", "version", "distribution"):
        monkeypatch.setattr(importlib.metadata, name, unknown)
    assert installed.install("trl") == "pip install 'fastdpop[trl]'"
    assert installed.reinstall().endswith(" --no-cache-dir fastdpop")


PIP = re.compile(r"(?<![\w-])pip install((?: +(?:'[^'\n]*'|[^\s'\"`,;:#&|(){}]+))+)")
TEXTS = ("*.md", "*.py", "*.toml", "*.txt", "*.yml", "*.ipynb", "*.cff")
WITH_VALUE = {
    "--constraint",
    "-c",
    "--requirement",
    "-r",
    "--index-url",
    "--find-links",
    "--target",
}


def pip_commands() -> list[tuple[str, list[str]]]:
    """Every one that stands in this repository, with what it installs; f-strings are tested above."""
    listed = ["git", "ls-files", "--", *TEXTS, ":!tests", ":!CHANGELOG.md", ":!setup.py"]
    found = []
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        text = (ROOT / name).read_text("utf-8") if (ROOT / name).exists() else ""
        for command in PIP.findall(text):
            words = shlex.split(command)
            valued = {i + 1 for i, word in enumerate(words) if word in WITH_VALUE}
            asked = [w for i, w in enumerate(words) if i not in valued and not w.startswith("-")]
            found.append((f"{name}: pip install{command}", asked))
    return found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")
def test_pip_commands_of_this_repository() -> None:
    """From a checkout, where the package is on no index: extras that there are, and pyproject's versions."""
    metadata = importlib.metadata.metadata("fastdpop")
    extras = set(metadata.get_all("Provides-Extra", []))
    own: dict[str, set[str]] = {}
    for line in importlib.metadata.requires("fastdpop") or []:
        requirement = Requirement(line)
        own.setdefault(requirement.name, set()).add(str(requirement.specifier))
    after = f"{NEWEST[0]}.{NEWEST[1] + 1}"
    assert str(SpecifierSet(f">={OLDEST[0]}.{OLDEST[1]},<{after}")) in own["trl"]
    commands = [
        (where, asked)
        for where, asked in pip_commands()
        if "{" not in where and "--find-links" not in where
    ]
    assert len(commands) > 10
    for where, asked in commands:
        for word in asked:
            local = re.fullmatch(r"(?:\.|\S*\.whl|\S*fastdpop-\S+)(?:\[(.+)\])?", word)
            if local is not None:
                assert set((local[1] or "").split(",")) - {""} <= extras, where
            elif not word.startswith("fastdpop") and re.search(r"[<>=]", word):
                requirement = Requirement(word)
                if requirement.name in own and "==" not in word:
                    assert str(requirement.specifier) in own[requirement.name], where
            else:
                assert not word.startswith("fastdpop"), f"{where}: fastdpop is on no index"
