"""``fastdpop doctor``: what this machine has, and which engine would run on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

import fastdpop
from fastdpop import engines

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "flash-attn")
_NO_COMPILER = (ImportError, OSError, RuntimeError)
"""What triton raises where it comes without NVIDIA's tools."""

_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def report() -> str:
    """Versions, processor, GPUs and engines, as text."""
    versions = [f"python {platform.python_version()}"]
    versions += [f"{name} {_version(name)}" for name in _PACKAGES]
    name, flags = cpu()
    features = " ".join(flag for flag in _CPU_FEATURES if flag in flags) or "none that matter here"
    lines = [
        f"fastdpop {fastdpop.__version__}",
        "  " + ", ".join(versions),
        f"CPU: {name}",
        f"  {torch.get_num_threads()} threads; {features}",
        f"CUDA: {torch.version.cuda or 'none'} in torch, driver {driver() or 'none'}",
    ]
    devices = ["cpu"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {gpu.name}")
        lines.append(f"  {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}")
        lines.append(f"  {_trust(torch.device('cuda', i))}")
        devices = ["cpu", "cuda"]
    if len(devices) == 1:
        lines.append("GPU: none that this torch can use")
        lines.append(f"  {_assemblers()}")
    for device in devices:
        lines.append(f"Engines on {device}, best first:")
        for engine in engines.explain(device):
            mark = "->" if engine.chosen else "  "
            verdict = "" if engine.available else "not available: "
            lines.append(f"  {mark} {engine.name}: {verdict}{engine.reason}")
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


def _trust(device: torch.device) -> str:
    """With what triton compiles for a GPU, and what follows for its results."""
    if importlib.util.find_spec("triton") is None:
        return "without triton, no kernels are compiled for it"
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


def _assemblers() -> str:
    """With what triton would compile, without a GPU to ask for."""
    if importlib.util.find_spec("triton") is None:
        return "without triton, there are no kernels for one"
    try:
        from fastdpop.engines import self_check

        by_version: dict[str, list[str]] = {}
        for target, capability in (("sm_80", 80), ("sm_90a", 90), ("sm_100", 100)):
            by_version.setdefault(self_check.ptxas_version(capability), []).append(target)
    except _NO_COMPILER as error:
        return f"triton cannot compile for one: {error}"
    said = "; ".join(f"ptxas {v} for {', '.join(found)}" for v, found in by_version.items())
    return f"triton {_version('triton')} would compile with {said}"


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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
