"""What is known so far, in files at all times."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastdpop
from bench import contenders, report
from bench.chip.setup import free
from bench.chip.timing import Row

SHARING = """A model of random weights in the sizes of Llama 3.2-1B (16 layers, 1.24 billion weights, bf16), \
transformers' default attention where padded. A step is a live reference, the policy, and its backward pass, DPOP, all \
weights trained, without an optimizer and without gradient checkpointing. Tokens per second are the real tokens of the \
padded batch. Model FLOPs are what the sequences need one by one: forward, 2 for each token and weight of the layers' \
matrices, 2 t (t + 1) for each number of a query and layer in a sequence of t tokens, and 2 V H for each scored token; \
four times that for a step. MFU is their rate over the card's dense bf16 peak, 989.4 TFLOP/s for H100 and H200 (SXM); \
of shared prefixes it counts what is not computed, and can exceed 100%."""
SHARING_COLUMNS = {
    "workload": "",
    "contender": "",
    "pairs": "pairs",
    "padded_tokens": "padded tokens",
    "real_tokens": "real",
    "tree_tokens": "in the tree",
    "seconds": "ms",
    "to_shared": "x shared",
    "tokens_per_second": "real tokens/s",
    "flops": "model TFLOP/s",
    "mfu": "MFU",
    "peak_extra_bytes": "peak MiB",
}


class Results:
    """What is known so far, in a file at all times; the form of `make bench`'s results, and more.

    Args:
        folder: where ``h100.json`` and ``h100.md`` are, to be continued if they are.
        device: where the measurements are made.
        seconds: after how many there is no time for another case.
    """

    def __init__(self, folder: Path, device: str, seconds: float = math.inf) -> None:
        self.folder, self.stop = folder, time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "h100.json"
        self.data: Row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.data |= machine(device)
        self.failed: list[str] = []
        for name in ("rows", "products", "settings", "launches", "sharing", "checks", "left_out"):
            self.data.setdefault(name, [])

    def add(self, table: str, row: Any) -> None:
        """Another line of a table, and the files anew."""
        self.data[table].append(report.rounded(row) if isinstance(row, dict) else row)
        write(self.data, self.folder)

    def case(self, name: str, measure: Callable[[], object]) -> bool:
        """Measure, if there is time, and whatever becomes of it go on; whether it went well.

        What is ours must work, unless memory does not suffice: its failures are remembered.
        """
        if time.monotonic() > self.stop:
            self.add("left_out", f"{name}: no time left")
            return False
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        try:
            measure()
        except Exception as error:  # one that fails must not take the others' results with it
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)
            self.add("left_out", f"{name}: {kind[:500]}")
            if not isinstance(error, torch.OutOfMemoryError) and (
                "fastdpop" in name or "bare" in name
            ):
                self.failed.append(f"{name}: {kind[:500]}")
            free()
            return False
        return True


def _triton() -> Any:
    import triton

    return triton


def _trl() -> Any:
    import trl

    return trl


def _liger_kernel() -> Any:
    import liger_kernel

    return liger_kernel


def versions_of_packages(device: str) -> dict[str, str]:
    """Of what is measured, and of what it needs; packages that are not installed are left out."""
    versions = {"fastdpop": fastdpop.__version__, "torch": torch.__version__}
    packages = {"triton": _triton, "trl": _trl, "liger_kernel": _liger_kernel}
    for package, imported in packages.items():
        try:
            imported()
            versions[package] = importlib.metadata.version(package)
        except Exception as error:  # a broken peer is no reason to measure nothing
            if not (isinstance(error, ModuleNotFoundError) and error.name == package):
                versions[package] = f"broken: {error!r}"[:200]
    if "triton" in versions and device == "cuda":
        versions["ptxas"] = ptxas_version()
    return versions


def ptxas_version() -> str:
    """Of the assembler that triton uses for the current GPU."""
    from fastdpop.engines import self_check

    return self_check.combination(torch.device("cuda", torch.cuda.current_device()))[1]


def machine(device: str) -> Row:
    """Where, with what and when."""
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,power.limit,clocks.max.sm",
        "--format=csv,noheader",
    ]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    facts = [part.strip() for part in said.splitlines()[0].split(",")] if said.strip() else []
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        **dict(zip(("driver", "power_limit", "most_sm_clock"), facts, strict=False)),
        "cpu": platform.processor() or platform.machine(),
        "capability": "host",
        "threads": torch.get_num_threads(),
        "versions": {
            **versions_of_packages(device),
            "CUDA": str(torch.version.cuda),
            "Python": platform.python_version(),
        },
        "malloc": "default",
        "date": datetime.date.today().isoformat(),
        "auto": contenders.ours(device)[0],
        "quick": False,
    }


def _table(rows: list[Row], names: dict[str, str]) -> str:
    def cell(value: Any, name: str) -> str:
        if value is None:
            return ""
        if name == "seconds":
            return f"{value * 1e3:.3f}"
        if name == "flops":
            return f"{value / 1e12:.0f}"
        if name == "mfu":
            return f"{value:.1%}"
        if name == "peak_extra_bytes":
            return f"{value / 2**20:,.0f}"
        if name.startswith("tokens") or name.endswith("tokens"):
            return f"{value:,.0f}"
        # Kernels of torch have names of a thousand letters; the JSON has them whole.
        return f"{value:.4g}" if isinstance(value, float) else f"{value!s:.80}"

    body = [[cell(row.get(name), name) for name in names] for row in rows]
    return report.table(list(names.values()), body)


def text(results: Row) -> str:
    """All of it in Markdown."""
    parts = [f"# Speed and memory on {results['device']}", report.machine_line(results)]
    facts = [
        f"{results[name]}" for name in ("driver", "power_limit", "most_sm_clock") if name in results
    ]
    if facts:
        parts.append(f"Driver, power limit and largest clock: {', '.join(facts)}.")
    if "copy_bytes_per_second" in results:
        parts.append(
            f"Copies: {results['copy_bytes_per_second'] / 1e12:.2f} TB/s, read and written."
        )
    parts.append("What the columns mean, and who the contenders are: docs/bench.md.")
    if results["checks"]:
        parts.append("\n".join(f"- {line}" for line in results["checks"]))
    parts.append(report.tables(results["rows"]).strip())
    for title, name, columns in (
        ("Bare products", "products", {"workload": "", "product": "product", "way": "way"}),
        ("Settings of the kernels", "settings", {"setting": "", "to_bare_logits": "x bare logits"}),
        (
            f"Launches of {results['auto']}",
            "launches",
            {"mode": "", "kernel": "kernel", "launches": "launches"},
        ),
    ):
        if results[name]:
            table = _table(results[name], {**columns, "seconds": "ms", "tflops": "TFLOP/s"})
            parts.append(f"### {title}\n\n{table}")
    if results["sharing"]:
        parts += ["### A training step with shared prefixes", SHARING]
        parts.append(_table(results["sharing"], SHARING_COLUMNS))
    if results["left_out"]:
        parts.append("### Left out\n\n" + "\n".join(f"- {line}" for line in results["left_out"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Row) -> str:
    """The few lines that must not be missed."""
    lines = [report.machine_line(results), *results["checks"]]
    for row in results["rows"]:
        if row["kind"] == "step":
            lines.append(
                f"{row['workload']:26} {row['mode']:15} {row['contender'][:32]:32} "
                f"{row['seconds'] * 1e3:8.2f} ms {row['to_floor']:6.3f} x floor "
                f"{row['tflops']:6.0f} TFLOP/s"
            )
    for row in results["settings"]:
        lines.append(
            f"{row['setting']:45} {row['seconds'] * 1e3:8.2f} ms {row['tflops']:6.0f} TFLOP/s"
        )
    for row in results["sharing"]:
        lines.append(
            f"{row['workload']:26} {row['contender']:48} {row['seconds'] * 1e3:8.2f} ms "
            f"{row.get('to_shared', 1.0):6.3f} x shared {row['tokens_per_second']:9.0f} tokens/s"
        )
    lines.append(f"{len(results['left_out'])} cases left out")
    return "\n".join(lines)


def write(results: Row, folder: Path) -> None:
    """The files, whole at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("h100.json", json.dumps(results, indent=1) + "\n"),
        ("h100.md", text(results)),
    ):
        new = folder / f".{name}"
        new.write_text(content, encoding="utf-8")
        new.replace(folder / name)


def merged(found: list[Row]) -> Row:
    """Parts of one run, in their order, as one."""
    whole = dict(found[0])
    for more in found[1:]:
        for name, value in more.items():
            whole[name] = whole[name] + value if isinstance(value, list) else value
    return whole
