"""How fastdpop was installed, and what to tell pip: from the package's own metadata, so that commands in
messages are those that pyproject.toml stands for.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

PACKAGE = "fastdpop"
_EXTRAS = ("hf", "trl", "train", "analyze", "demo")
"""Each needs what the one before it needs."""
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[(.*?)\])?")


def requirements(extra: str) -> list[str]:
    """What ``fastdpop[extra]`` asks for beyond fastdpop, such as ``"peft>=0.18"``, in pip's words."""
    try:
        return list(dict.fromkeys(_requirements(extra)))
    except importlib.metadata.PackageNotFoundError:  # a folder that pip knows nothing of
        return [f"{PACKAGE}[{extra}]"]


def _requirements(extra: str) -> Iterator[str]:
    for line in importlib.metadata.requires(PACKAGE) or []:
        requirement, _, marker = line.partition(";")
        found = re.search(r"extra == ['\"](.+?)['\"]", marker)
        if found is None or found[1] != extra:
            continue
        named = _REQUIREMENT.match(requirement)
        if named is not None and named[1] == PACKAGE:
            for other in named[2].split(","):
                yield from _requirements(other)
        else:
            yield requirement.strip()


def install(extra: str) -> str:
    """The command that installs what an extra names and this environment lacks; all of it where nothing
    is missing. It names the packages, so that it works wherever fastdpop itself came from.
    """
    wanted = requirements(extra)
    absent = [one for one in wanted if not _there(one)]
    return "pip install " + " ".join(map(shlex.quote, absent or wanted))


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
    extra = next(
        (extra for extra in _EXTRAS if package in map(_name, requirements(extra))), "train"
    )
    if all(map(_there, requirements(extra))):
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


def _name(requirement: str) -> str:
    named = _REQUIREMENT.match(requirement)
    assert named is not None, requirement
    return named[1]


def _there(requirement: str) -> bool:
    try:
        importlib.metadata.version(_name(requirement))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
