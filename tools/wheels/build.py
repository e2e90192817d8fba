"""From the files that git knows to an sdist and a wheel, the same bytes every time."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BACKEND = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"


def copy_tracked(to: Path) -> Path:
    """The files of this checkout that git knows, as they are now: nothing built gets in.

    Raises:
        OSError: this is no checkout.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        raise OSError(f"{ROOT} is no git checkout: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if not os.path.lexists(ROOT / name):
            continue  # removed, and not yet committed
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return to


def time_of_last_commit() -> int:
    """In seconds since 1970: what files are dated with."""
    shown = ["git", "log", "-1", "--format=%ct"]
    return int(subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def run_backend(kind: str, source: Path, out: Path, seconds: int, **variables: str) -> None:
    """What pip calls to build an ``sdist`` or a ``wheel``, in the environment of this Python.

    Raises:
        OSError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", BACKEND.format(kind=kind), str(out)],
        cwd=source,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(seconds), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise OSError(f"building the {kind} failed:\n{done.stdout}{done.stderr}")


def build_sdist(source: Path, out: Path, seconds: int) -> Path:
    """The sdist of a copy of the sources, packed again without what differs from build to build."""
    made, unpacked = out / "made", out / "unpacked"
    run_backend("sdist", source, made, seconds)
    (archive,) = made.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(unpacked, filter="data")
    packed = out / archive.name
    with (
        packed.open("wb") as file,
        gzip.GzipFile("", "wb", mtime=seconds, fileobj=file) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(unpacked.rglob("*")):
            info = tar.gettarinfo(path, path.relative_to(unpacked).as_posix())
            info.mtime, info.mode = seconds, 0o755 if path.is_dir() else 0o644
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            if path.is_file():
                with path.open("rb") as content:
                    tar.addfile(info, content)
            else:
                tar.addfile(info)
    return packed


def build_wheel(sdist: Path, out: Path, seconds: int, **variables: str) -> Path:
    """The wheel of an sdist, as an index's users would build it."""
    with tarfile.open(sdist) as opened:
        opened.extractall(out / "source", filter="data")
    (source,) = (out / "source").iterdir()
    run_backend("wheel", source, out, seconds, **variables)
    (wheel,) = out.glob("*.whl")
    return wheel
