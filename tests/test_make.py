"""``make setup`` and ``make clean``: which Python it takes and what it says, on machines made of stubs.

Nothing is installed: the Pythons of these machines say of themselves what a test wants, and the
environments that they make do nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

COMPILER = "No C++ compiler was found"
# Real tools of the recipes; `make` gets no other PATH than the machine's own folder.
TOOLS = ("sh", "touch", "sed", "mkdir", "cp", "chmod", "rm")
PYTHON = """#!/bin/sh
echo "$0 $*" >> {log}
test "$1" != -m || {{ mkdir -p {environment}/bin && cp {stub} {environment}/bin/python; exit; }}
exec {real} -c "import sys; sys.version_info = {version}; sys.modules.update({missing}); $2"
"""
# As pyenv leaves of a Python that it has and does not use.
BROKEN = "#!/bin/sh\necho 'no such version is active' >&2\nexit 127\n"


class Machine:
    """A folder of programs, and what ``make setup`` does with no others."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.environment = folder / "environment"
        self.log = folder / "log"
        self.log.touch()
        for tool in TOOLS:
            (self.programs / tool).symlink_to(shutil.which(tool) or "")
        self.stub = self.add("stub", "#!/bin/sh\n")

    def add(self, name: str, text: str) -> Path:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, version: tuple[int, int], name: str = "", missing: str = "") -> Path:
        return self.add(
            name or f"python{version[0]}.{version[1]}",
            PYTHON.format(
                log=self.log,
                environment=self.environment,
                stub=self.stub,
                real=sys.executable,
                version=(*version, 0),
                missing={missing: None} if missing else {},
            ),
        )

    def setup(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.make("setup", f"VENV={self.environment}", *arguments, **variables)

    def make(
        self, *arguments: str, cwd: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(MAKE), "-f", str(ROOT / "Makefile"), *arguments],
            cwd=cwd,
            env={"PATH": str(self.programs), **variables},
            text=True,
            capture_output=True,
            check=False,
        )

    def made_by(self) -> list[str]:
        """The programs that made an environment."""
        lines = self.log.read_text().splitlines()
        return [Path(line.split()[0]).name for line in lines if " -m venv " in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_newest_python_that_can_make_environments(machine: Machine) -> None:
    for minor in (9, 10, 12):
        machine.python((3, minor))
    machine.python((3, 13), missing="ensurepip")
    machine.add("python3.14", BROKEN)
    machine.python((3, 12), "python3")
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.made_by() == ["python3.12"]
    assert (machine.environment / ".ready").exists()


@pytest.mark.parametrize("minor", [10, 14])
def test_python3_where_no_other_name_is_there(machine: Machine, minor: int) -> None:
    machine.python((3, minor), "python3")
    assert machine.setup().returncode == 0
    assert machine.made_by() == ["python3"]


@pytest.mark.parametrize(
    "versions", [(), ((3, 9),), ((3, 15),), ((2, 7),), ((3, 12), "python3", "ensurepip")]
)
def test_no_python(machine: Machine, versions: tuple[Any, ...]) -> None:
    """None at all, one out of range, and Debian's without its venv package."""
    if versions:
        version, *more = versions
        machine.python(version, *(more or ["python3"]))
    done = machine.setup()
    assert done.returncode != 0
    (said,) = done.stderr.splitlines()
    assert "No Python from 3.10 to 3.14 with its venv module was found" in said
    assert "python3-venv" in said
    assert "make PYTHON=" in said
    assert machine.made_by() == []


def test_python_names_another(machine: Machine) -> None:
    machine.python((3, 14))
    own = machine.python((3, 11), "my-python")
    assert machine.setup(f"PYTHON={own}").returncode == 0
    assert machine.made_by() == ["my-python"]


def test_python_may_have_spaces_in_its_path(machine: Machine) -> None:
    machine.python((3, 14))
    (machine.programs / "my pythons").mkdir()
    own = machine.python((3, 11), "my pythons/python")
    assert machine.setup(f"PYTHON={own}").returncode == 0
    (line,) = (line for line in machine.log.read_text().splitlines() if " -m venv " in line)
    assert line.startswith(f"{own} -m venv ")


@pytest.mark.parametrize("given", ["/no/such/python", "python3.9", "broken", "no venv", "a b"])
def test_python_names_none(machine: Machine, given: str) -> None:
    machine.python((3, 14))
    machine.python((3, 9))
    machine.python((3, 12), "no venv", "venv")
    machine.add("broken", BROKEN)
    done = machine.setup(f"PYTHON={given}")
    assert done.returncode != 0
    (said,) = done.stderr.splitlines()
    assert f"PYTHON is '{given}', expected a Python from 3.10 to 3.14 with its venv module" in said
    assert machine.made_by() == []


@pytest.mark.parametrize("command", ["clean", "setup", "help"])
@pytest.mark.parametrize("name", ["VENV", "AXOLOTL"])
@pytest.mark.parametrize("path", ["{0}/x y", "{0}/x ", "{0}/x\t{0}/z", ""])
def test_no_environment_with_spaces(
    machine: Machine, tmp_path: Path, command: str, name: str, path: str
) -> None:
    """``make clean`` would remove what stands before the space."""
    machine.python((3, 12))
    (tmp_path / "x").mkdir()
    (tmp_path / "build").mkdir()
    path = path.format(tmp_path)
    done = machine.make(command, f"{name}={path}", cwd=tmp_path)
    assert done.returncode != 0
    (said,) = done.stderr.splitlines()
    assert f"{name} is '{path}', expected the path of a folder without spaces" in said
    assert done.stdout == ""
    assert (tmp_path / "x").exists()
    assert (tmp_path / "build").exists()
    assert machine.log.read_text() == ""


def test_clean_removes_what_it_names_alone(machine: Machine, tmp_path: Path) -> None:
    checkout = tmp_path / "with a space"
    kept, own = checkout / "kept", checkout / "kept&own"
    for folder in (kept, own, checkout / "build"):
        folder.mkdir(parents=True)
    done = machine.make("clean", f"VENV={own.name}", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in checkout.iterdir()] == ["kept"]


def test_an_environment_that_is_there_is_kept(machine: Machine) -> None:
    machine.python((3, 12))
    assert machine.setup().returncode == 0
    (machine.environment / ".ready").unlink()
    machine.python((3, 13))
    assert machine.setup().returncode == 0
    assert machine.made_by() == ["python3.12"]


def test_an_environment_whose_python_is_gone_is_made_anew(machine: Machine) -> None:
    machine.python((3, 12))
    assert machine.setup().returncode == 0
    (machine.environment / ".ready").unlink()
    (machine.environment / "bin" / "python").unlink()
    assert machine.setup().returncode == 0
    assert machine.made_by() == ["python3.12"] * 2


@pytest.mark.parametrize("compiler", ["c++", "g++", "clang++", None])
def test_no_compiler_is_said_once(machine: Machine, compiler: str | None) -> None:
    machine.python((3, 12))
    if compiler is not None:
        machine.add(compiler, "#!/bin/sh\n")
    done = machine.setup()
    assert done.returncode == 0
    assert done.stdout.count(COMPILER) == (compiler is None)


def test_cxx_names_the_compiler(machine: Machine) -> None:
    machine.python((3, 12))
    machine.add("c++", "#!/bin/sh\n")
    machine.add("my-c++", "#!/bin/sh\n")
    assert COMPILER not in machine.setup(CXX="my-c++").stdout
    (machine.environment / ".ready").unlink()
    assert COMPILER in machine.setup("CXX=/no/such/compiler").stdout


@pytest.mark.parametrize("version", ["3.10.0", "3.11.2", "3.11.9", "3.12.1", "3.13.0", "3.14.1"])
def test_every_python_has_one_pin_for_each_package(version: str) -> None:
    """Markers that overlap make `pip` fail, and a gap between them lets any version in."""
    python = {"python_version": version[:4], "python_full_version": version}
    pins: dict[str, int] = {}
    for line in (ROOT / "requirements" / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            holds = pin.marker is None or pin.marker.evaluate(python)
            pins[pin.name] = pins.get(pin.name, 0) + holds
    # What stands in for the standard library of later versions, and what older packages need.
    old = {"async-timeout", "exceptiongroup", "pytz", "six", "tomli"}
    assert {n for n, count in pins.items() if count != 1} == (
        set() if version.startswith("3.10.") else old
    )
