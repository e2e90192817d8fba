"""How fastdpop was installed, and what to tell pip: from the package's own metadata, so that commands in
messages are those that pyproject.toml stands for.
"""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:  # packaging takes 0.05 s to import, and is needed for a message only
    from packaging.requirements import Requirement

PACKAGE = "fastdpop"
_EXTRAS = ("", "hf", "trl", "train", "demo")
"""Each needs what the one before it needs."""


def required(extra: str = "") -> list[Requirement]:
    """What ``fastdpop[extra]`` asks for on this machine, what every use of fastdpop needs among it."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # a folder that pip knows nothing of
        return [Requirement(f"{PACKAGE}[{extra}]" if extra else PACKAGE)]
    found: dict[str, Requirement] = {}
    for one in map(Requirement, lines):
        if one.marker is not None and not one.marker.evaluate({"extra": extra}):
            continue
        if one.name == PACKAGE:  # an extra that names others
            found |= {inner.name: inner for named in one.extras for inner in required(named)}
        else:
            found[one.name] = one
    return list(found.values())


def lack(needed: Requirement) -> str | None:
    """What is wrong with the installed version of a package, or None."""
    try:
        version = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{needed.name} is not installed"
    if needed.specifier.contains(version, prereleases=True):
        return None
    return f"{needed.name} is {version}, expected {_bounds(needed)}"


def command(packages: list[Requirement]) -> str:
    """That installs them. It names the packages, so that it works wherever fastdpop itself came from."""
    words = []
    for one in packages:
        extras = f"[{','.join(sorted(one.extras))}]" if one.extras else ""
        words.append(shlex.quote(one.name + extras + _bounds(one)))
    return f"pip install {' '.join(words)}"


def install(extra: str) -> str:
    """The command that installs what an extra names and this environment lacks; all of it where nothing
    is missing, for pip to find out what is broken.
    """
    wanted = required(extra)
    own = [one for one in wanted if one not in required()]
    return command([one for one in wanted if lack(one)] or own or wanted)


def needs(what: str, package: str, extra: str) -> str:
    """The message of a feature that misses a package."""
    return f"{what} needs {package}: {install(extra)}"


def message(error: BaseException) -> str:
    """What an error says; of a package that is missing, with the command that installs it and all that it is
    used with.
    """
    module = error.name if isinstance(error, ModuleNotFoundError) else None
    if module is None or "pip install" in str(error):
        return str(error)
    package = module.partition(".")[0]
    extra = next((e for e in _EXTRAS if package in (one.name for one in required(e))), "train")
    if not any(map(lack, required(extra))):
        return str(error)  # nothing of fastdpop's is missing
    return f"{error}: {install(extra)}"


def reinstall() -> str:
    """The command that builds or fetches this fastdpop again, from where it came, and nothing else."""
    # Without the cache: pip keeps there what it once built, a wheel without the C++ library too.
    return f"pip install --force-reinstall --no-deps --no-cache-dir {_source()}"


def _source() -> str:
    try:
        record = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    if record is None:
        return PACKAGE
    origin = json.loads(record)
    url = urlsplit(origin["url"])
    where = unquote(url.path) if url.scheme == "file" else origin["url"]
    if vcs := origin.get("vcs_info"):
        where = f"{vcs['vcs']}+{where}@{vcs['commit_id']}"
    editable = "--editable " if origin.get("dir_info", {}).get("editable") else ""
    return editable + shlex.quote(where)


def _bounds(needed: Requirement) -> str:
    """As pyproject.toml writes them: the lower one first."""
    return ",".join(sorted(map(str, needed.specifier), key=lambda bound: bound[0] != ">"))
