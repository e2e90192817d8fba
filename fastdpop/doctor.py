"""``fastdpop doctor``: what this machine has, and which engine would run on it."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

import fastdpop
from fastdpop import engines

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "flash-attn")
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
    ]
    devices = ["cpu"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {gpu.name}")
        lines.append(f"  {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}")
        devices = ["cpu", "cuda"]
    if len(devices) == 1:
        lines.append("GPU: none that this torch can use")
    for device in devices:
        lines.append(f"Engines on {device}, best first:")
        for engine in engines.explain(device):
            mark = "->" if engine.chosen else "  "
            verdict = "" if engine.available else "not available: "
            lines.append(f"  {mark} {engine.name}: {verdict}{engine.reason}")
    return "\n".join(lines)


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
