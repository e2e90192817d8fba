"""The package as installed: what it exports, what it drags in, and what its wheel holds."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import pkgutil
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
import torch

import fastdpop
from fastdpop import choices, installed, losses
from fastdpop.choices import words
from fastdpop.compiling import constant

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


PUBLIC = {
    "BatchReport": "fastdpop.batch_check.",
    "FastDPOConfig": "fastdpop.integrations.trl.",
    "FastDPOTrainer": "fastdpop.integrations.trl.",
    "PackedPairs": "fastdpop.prefix.",
    "PreferenceOutput": "fastdpop.output",
    "PromptSampler": "fastdpop.prefix.",
    "attach": "fastdpop.hf.",
    "check_batch": "fastdpop.batch_check.",
    "collate": "fastdpop.data.collate",
    "detach": "fastdpop.hf.",
    "engines": "fastdpop.engines",
    "exact": "fastdpop.",
    "fused_dpop_loss": "fastdpop.api",
    "fused_logps": "fastdpop.api",
    "fused_preference_loss": "fastdpop.api",
    "is_attached": "fastdpop.hf.",
    "losses": "fastdpop.losses",
    "pack": "fastdpop.prefix.",
    "patch_trl": "fastdpop.integrations.trl.",
    "preference_loss": "fastdpop.hf.",
    "unpatch_trl": "fastdpop.integrations.trl.",
}
"""The public names, and where what each stands for is from."""


def test_public_names() -> None:
    assert fastdpop.__all__ == sorted([*PUBLIC, "__version__"])
    assert dir(fastdpop) == fastdpop.__all__
    with pytest.raises(
        AttributeError, match=r"module 'fastdpop' has no attribute 'fused_dpo_loss'"
    ):
        _ = fastdpop.fused_dpo_loss


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name(name: str) -> None:
    value = getattr(fastdpop, name)
    module = value.__name__ if inspect.ismodule(value) else value.__module__
    assert f"{module}.".startswith(PUBLIC[name].removesuffix(".") + ".")
    assert inspect.ismodule(value) or value.__name__ == name
    assert inspect.getdoc(value)


def test_no_module_takes_the_place_of_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(fastdpop.__path__)}
    assert modules & set(PUBLIC) == {"engines", "losses"}  # which are modules


def test_type_checkers_are_told_of_the_same_names() -> None:
    tree = ast.parse(Path(fastdpop.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: node.module if node.module != "fastdpop" else f"fastdpop.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == fastdpop._MODULES
    assert told.keys() == PUBLIC.keys()


CHECKED = """
from typing_extensions import assert_type

import torch

import fastdpop
from fastdpop import NAMES

x = torch.empty(0)
out = fastdpop.fused_dpop_loss(x, x, x, form="outside", reduction="none", statistics=["entropy"])
assert_type(out, PreferenceOutput)
assert_type(out.metrics(), dict[str, float])
assert_type(losses.get("simpo", beta=2.0), losses.PreferenceLoss)
assert_type(exact(x), fastdpop.unrounded.Exact)
fused_preference_loss(x, x, x, loss=str(x), engine="eager", grad_reduction="sum")
fused_logps(x, x, x, reduction="token", engine="cpu")
fused_preference_loss(x, x, x, engine="gpu")  # type: ignore[arg-type]
fused_preference_loss(x, x, x, reduction="avg")  # type: ignore[arg-type]
fused_preference_loss(x, x, x, statistics=["entropies"])  # type: ignore[list-item]
fused_preference_loss(x, x, x, grad_reduction="none")  # type: ignore[arg-type]
fused_logps(x, x, x, reduction="mean")  # type: ignore[arg-type]
losses.DPOP(form="within")  # type: ignore[arg-type]
losses.DPO(divergence="kl")  # type: ignore[arg-type]
patch_trl(engine="gpu")  # type: ignore[arg-type]
fastdpop.fused_dpo_loss  # type: ignore[attr-defined]
"""
CHECKING = """
[mypy]
strict = True
[mypy-fastdpop.*]
ignore_errors = True
[mypy-torch.*,transformers.*,trl.*,accelerate.*,datasets.*,numpy.*,tqdm.*]
follow_imports = skip
ignore_missing_imports = True
"""
"""Of others nothing is read, which would take a minute."""


def test_a_type_checker_sees_names_and_words(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    names = ", ".join(PUBLIC)
    (tmp_path / "script.py").write_text(CHECKED.replace("NAMES", names))
    (tmp_path / "mypy.ini").write_text(CHECKING)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


LOOKS_AT_EVERYTHING = """
import copy, inspect, pickle, sys
sys.modules["transformers"] = sys.modules["trl"] = None  # as where they are not installed
import fastdpop
from fastdpop import *

assert {name for name, _ in inspect.getmembers(fastdpop)} == set(dir(fastdpop))
for name in ("attach", "patch_trl", "FastDPOTrainer", "FastDPOConfig"):
    assert hasattr(fastdpop, name)
    missing = getattr(fastdpop, name)
    assert not hasattr(missing, "anything")
    copies = copy.copy(missing), copy.deepcopy(missing), pickle.loads(pickle.dumps(missing))
    for use in (
        *copies,
        lambda: missing("model", engine="cpu"),
        lambda: type("Derived", (), {}, **missing.__mro_entries__(())),
        lambda: isinstance(3, missing),
        lambda: issubclass(int, missing),
    ):
        try:
            use()
        except ImportError as error:
            print(name, error)
print(attach)
print(fused_logps.__name__)
"""


def test_what_is_not_installed_says_so_when_it_is_used(tmp_path: Path) -> None:
    *uses, shown, other = run(LOOKS_AT_EVERYTHING, tmp_path).splitlines()
    hf = "fastdpop.attach needs transformers: pip install 'transformers>=5' 'accelerate>=1.10'"
    trl = installed.needs("fastdpop's TRL integration", "trl", "trl")
    said = {"attach": hf, "patch_trl": trl, "FastDPOTrainer": trl, "FastDPOConfig": trl}
    assert uses == [f"{name} {text}" for name, text in said.items() for _ in range(7)]
    assert shown == f"<fastdpop.attach, which is not to be had: {hf}>"
    assert other == "fused_logps"


TAKES_TIME = ("torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "triton", "transformers")


def test_import_imports_nothing(tmp_path: Path) -> None:
    code = "import sys, fastdpop; print(*{n.partition('.')[0] for n in sys.modules})"
    assert not {"torch", "numpy", "triton", "transformers"} & set(run(code, tmp_path).split())


def test_the_functions_import_no_more_than_torch(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastdpop
fastdpop.fused_dpop_loss, fastdpop.fused_logps, fastdpop.losses, fastdpop.engines
fastdpop.PreferenceOutput, fastdpop.exact
print(*(set(sys.modules) - before))
"""
    added = set(run(code, tmp_path).split())
    assert "fastdpop" in added
    assert not added & set(TAKES_TIME)
    assert {name.partition(".")[0] for name in added} - sys.stdlib_module_names == {"fastdpop"}


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "doctor --help",
        "train --help",
        "trl --help",
        "train",
        "",
        "nonsense",
        "plan",
        "pairs build --limit x",
        "demo --steps 0",
    ],
)
def test_the_command_line_answers_without_torch(arguments: str, tmp_path: Path) -> None:
    code = f"""
import contextlib, io, sys
from fastdpop.cli import main
with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
    try:
        main({arguments.split()!r})
    except SystemExit:
        pass
assert "fastdpop" in said.getvalue()
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    assert run(code, tmp_path) == "False False\n"


def test_a_mark_for_the_compiler_is_torch_s_own() -> None:
    def function() -> None: ...

    def other() -> None: ...

    assert constant(function) is function
    assert vars(function) == vars(torch.compiler.assume_constant_result(other)) != {}


def test_the_words_of_arguments_are_those_that_are_checked(tmp_path: Path) -> None:
    assert words(choices.LossName) == losses.available()
    of_package = "from fastdpop import engines; print('auto', *(e.name for e in engines.explain()))"
    assert set(words(choices.EngineName)) == set(run(of_package, tmp_path).split())


def test_an_editable_install_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Type checkers follow paths, and no hooks of the import."""
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/no/such/compiler")
    _, unpacked = sdist(tmp_path)
    run(f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})", unpacked)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert not any(name.endswith(".py") for name in archive.namelist())
        assert Path(archive.read(path).decode().strip()) == unpacked


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
