"""``fastdpop doctor``: what can be done with fastdpop here, what is missing, and which engine would run.

``report`` says what ``facts`` found.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastdpop
from fastdpop import capabilities, engines
from fastdpop.engines.triton import unusable

_PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "peft", "trl", "datasets", "flash-attn"),
    "axolotl",
)
_NO_COMPILER = (ImportError, OSError, RuntimeError)
"""What triton raises where it comes without NVIDIA's tools."""

_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def facts() -> dict[str, Any]:
    """What ``fastdpop doctor --json`` prints; docs/versions.md says what each key holds."""
    name, flags = cpu()
    gpus = [_gpu(i) for i in range(torch.cuda.device_count())]
    uses = capabilities.capabilities(None if gpus else _no_gpu())
    return {
        "fastdpop": fastdpop.__version__,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "uses": {use: _as_json(what) for use, what in uses.items()},
        "cpu": {
            "name": name,
            "threads": torch.get_num_threads(),
            "features": [flag for flag in _CPU_FEATURES if flag in flags],
            "library": _as_json(capabilities.library()),
        },
        "cuda": {"torch": torch.version.cuda, "driver": driver(), "compilers": _assemblers()},
        "gpus": gpus,
        "engines": {
            device: [line._asdict() for line in engines.explain(device)]
            for device in ("cpu", *(["cuda"] if gpus else []))
        },
    }


def report(found: dict[str, Any] | None = None) -> str:
    """What was found (by :func:`facts` unless it is given), as text."""
    found = facts() if found is None else found
    there = [f"{name} {version}" for name, version in found["packages"].items() if version]
    lines = [f"fastdpop {found['fastdpop']}, python {found['python']}, {', '.join(there)}"]
    lines.append("What can be used here:")
    for use in found["uses"].values():
        lines += _verdict("yes " if use["ready"] else "no  ", use)
    processor = found["cpu"]
    lines.append(f"CPU: {processor['name']}")
    features = " ".join(processor["features"]) or "no instructions that matter here"
    lines.append(f"  {processor['threads']} threads; {features}")
    if not processor["library"]["ready"]:
        lines += _verdict("without", processor["library"])
    cuda = found["cuda"]
    lines.append(f"CUDA: {cuda['torch'] or 'none'} in torch, driver {cuda['driver'] or 'none'}")
    for gpu in found["gpus"]:
        lines.append(f"GPU {gpu['index']}: {gpu['name']}")
        lines.append(f"  {gpu['memory_gib']:.0f} GiB, compute {gpu['compute']}")
        lines.append(f"  {gpu['kernels']}")
    for device, answers in found["engines"].items():
        lines.append(f"Engines on {device}, best first:")
        for engine in answers:
            mark = "->" if engine["chosen"] else "  "
            verdict = "" if engine["available"] else "not available: "
            lines.append(f"  {mark} {engine['name']}: {verdict}{engine['reason']}")
    return "\n".join(lines)


def driver() -> str | None:
    """The version of NVIDIA's driver, where there is one."""
    module = Path("/proc/driver/nvidia/version")
    if module.exists():
        # As in "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  <date>".
        found = re.search(r"\s(\d+\.\d[\d.]*)\s", module.read_text())
        return found[1] if found else None
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.split()), None)


def _as_json(what: capabilities.Capability) -> dict[str, Any]:
    return {"ready": what.ready, **what._asdict()}


def _verdict(mark: str, use: dict[str, Any]) -> list[str]:
    """A line of what is missing, and a line for each command that gets it."""
    because = f": {', '.join(use['missing'])}" if use["missing"] else ""
    return [
        f"  {mark} {use['about']}{because}",
        *(f"        $ {command}" for command in use["commands"]),
    ]


def _no_gpu() -> str:
    """Why this torch can use no GPU, where it sees none."""
    if torch.version.cuda is None and torch.version.hip is None:
        builds = "; https://pytorch.org/get-started/locally has others" if driver() else ""
        return f"torch {torch.__version__} is built for CPUs alone{builds}"
    if torch.version.hip is None and driver() is None:
        return "there is no NVIDIA driver"
    return "torch sees none"


def _gpu(index: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": gpu.name,
        "memory_gib": gpu.total_memory / 2**30,
        "compute": f"{gpu.major}.{gpu.minor}",
        "kernels": _trust(torch.device("cuda", index)),
    }


def _trust(device: torch.device) -> str:
    """With what triton compiles for a GPU, and what follows for its results."""
    reason = unusable()
    if reason is not None:
        return f"no kernels are compiled for it: {reason}"
    try:
        from fastdpop.engines import self_check

        target, ptxas = self_check.combination(device)
    except _NO_COMPILER as error:
        return f"triton cannot compile for it: {error}"
    compiler = f"triton {_version('triton')} compiles for {target} with ptxas {ptxas}"
    if (target, ptxas) in self_check.VERIFIED:
        return f"{compiler}: verified"
    if not self_check.enabled():
        return f"{compiler}: not verified, and {self_check.VARIABLE}=0 turns the check off"
    return f"{compiler}: not verified, so kernels are checked when they are first used"


def _assemblers() -> dict[str, str]:
    """The version of the ptxas that triton would call for each chip; none where it cannot compile."""
    if unusable() is not None:
        return {}
    try:
        from fastdpop.engines import self_check

        chips = {"sm_80": 80, "sm_90a": 90, "sm_100": 100}
        return {chip: self_check.ptxas_version(number) for chip, number in chips.items()}
    except _NO_COMPILER:
        return {}


def cpu() -> tuple[str, frozenset[str]]:
    """The processor's name and its instruction set flags, as far as Linux tells; no flags elsewhere."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", ""))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(flags.split())


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; without, float32 is the faster choice."""
    return not cpu()[1].isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
