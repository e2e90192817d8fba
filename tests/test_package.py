"""The package as installed: what it exports, what it drags in, and what its wheel holds."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastdpop

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_version_everywhere() -> None:
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert declared is not None
    assert newest is not None
    assert fastdpop.__version__ == declared[1] == newest[1]
    assert fastdpop.__version__ == importlib.metadata.version("fastdpop")


def test_public_names() -> None:
    expected = {
        "PackedPairs",
        "PreferenceOutput",
        "PromptSampler",
        "__version__",
        "attach",
        "detach",
        "engines",
        "exact",
        "fused_dpop_loss",
        "fused_logps",
        "fused_preference_loss",
        "is_attached",
        "losses",
        "pack",
        "patch_trl",
        "unpatch_trl",
    }
    assert expected == set(fastdpop.__all__)
    assert all(hasattr(fastdpop, name) for name in expected)


def test_import_needs_torch_only(tmp_path: Path) -> None:
    optional = ("transformers", "accelerate", "peft", "trl", "tqdm", "matplotlib", "gguf", "triton")
    # None makes an import fail as it does where the package is not installed.
    code = f"""
import sys
sys.modules.update(dict.fromkeys({optional!r}))
import fastdpop, fastdpop.cli
fastdpop.cli.parser()
print(fastdpop.losses.get("dpop").lam)
"""
    assert run(code, tmp_path).strip() == "50.0"


def test_command_line_entry_point() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="fastdpop")
    assert callable(entry.load())


@pytest.mark.parametrize(
    ("named", "built_with", "there", "taken"),
    [
        (None, "g++ -pthread", {"g++", "clang++"}, None),  # as Python says
        (None, "clang++ -pthread", {"g++"}, "g++"),
        (None, "clang++ -pthread", {"g++", "clang++"}, "g++"),
        (None, "clang++ -pthread", {"clang++"}, "clang++"),
        (None, None, {"clang++"}, "clang++"),
        (None, "g++", set(), None),
        ("mine", "clang++", {"g++"}, "mine"),
    ],
)
def test_the_compiler_that_builds_the_library(
    monkeypatch: pytest.MonkeyPatch,
    named: str | None,
    built_with: str | None,
    there: set[str],
    taken: str | None,
) -> None:
    name_compiler = runpy.run_path(str(ROOT / "setup.py"))["name_compiler"]
    monkeypatch.setenv("CXX", "")  # so that what is set here does not stay
    monkeypatch.delenv("CXX")
    if named is not None:
        monkeypatch.setenv("CXX", named)
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: built_with)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    name_compiler()
    assert os.environ.get("CXX") == taken


def sdist(folder: Path) -> tuple[Path, Path]:
    """An sdist of this checkout: the files that it was made from, and those that it holds."""
    source = folder / "source"
    source.mkdir()
    files = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
    for name in files:
        shutil.copy(ROOT / name, source)
    built = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("fastdpop", "csrc", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=built)
    run(f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})", source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return source, unpacked


def test_sdist_holds_no_tests(tmp_path: Path) -> None:
    """Setuptools adds those that it finds, without what they import."""
    source, unpacked = sdist(tmp_path)
    assert (source / "tests" / "test_package.py").exists()
    assert not (unpacked / "tests").exists()
    assert (unpacked / "csrc").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_wheel_from_sdist(compiler: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel built from the sdist, as an index serves it, holds every module, the assets and the
    type marker, and the C++ library where there is a compiler.
    """
    if not compiler:
        for name in ("CC", "CXX"):
            monkeypatch.setenv(name, "/no/such/compiler")
    source, unpacked = sdist(tmp_path)
    run(f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})", unpacked)
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("fastdpop/")}
        archive.extractall(tmp_path / "installed")
    there = {
        path.relative_to(source).as_posix()
        for path in (source / "fastdpop").rglob("*")
        if path.is_file()
    }
    library = {name for name in held if name.startswith("fastdpop/engines/_cpu")}
    assert held - library == there
    assert len(library) == compiler
    assert "fastdpop/py.typed" in held
    assert any(name.startswith("fastdpop/assets/") for name in held)
    where_kernels = "import fastdpop.kernels as k; print(*k.__path__)"
    assert Path(run(where_kernels, tmp_path / "installed").strip()) == (
        tmp_path / "installed" / "fastdpop" / "kernels"
    )
    code = "import fastdpop; print(fastdpop.__file__); print(fastdpop.engines.available())"
    where, engines = run(code, tmp_path / "installed").splitlines()
    assert Path(where).is_relative_to(tmp_path / "installed")
    assert engines == str(("cpu", "eager") if compiler else ("eager",))


@pytest.mark.skipif(
    (ROOT / "kernels").is_file(),
    reason="kernels is a text file here: this checkout was made without symbolic links",
)
def test_the_folder_of_kernels_is_the_package_of_a_checkout() -> None:
    code = "import fastdpop.kernels as k; print(*k.__path__)"
    assert Path(run(code, ROOT).strip()) == (ROOT / "kernels").resolve()
