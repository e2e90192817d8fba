"""Time, memory and exactness on a GPU, in a given time and with nothing but torch and triton.

    python bench/chip.py --output DIR --seconds 240     # bench/h100.sh calls it
    python bench/chip.py --smoke                        # every kernel once: for compute-sanitizer

The contenders are those of `make bench`, the sizes those of models that are trained on such chips:
a head of Llama 3 8B, Qwen3 8B or Gemma 2 2B, and 2,048, 8,192 or 32,768 scored tokens. Each round
of a contender follows one of the bare products, so that both see the same clocks. What time is left
decides how far down the list of cases it comes; what was left out is named in the results.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# Run as a script, Python looks for modules beside it only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastdpop
from bench import report
from bench.contenders import FLOOR, Floor, contender, ours
from bench.memory import peak_extra_bytes
from bench.workloads import LOSSES, MODES, Batch, Shape
from fastdpop import engines

Row = dict[str, Any]

DEVICE = "cuda"
HEADS = {
    "Llama-3-8B": (4_096, 128_256),
    "Qwen3-8B": (4_096, 151_936),
    "Gemma-2-2B": (2_304, 256_000),
}
"""Width and vocabulary. Gemma's softcap is left out: of the peers, few take one."""
ROWS = (8_192, 2_048, 32_768)
COMPLETION = 512
TRAINED, FROZEN, LOGPS = MODES
PEERS = ("Liger", "TRL, scored rows", "gather, 16-bit logits", "F.linear_cross_entropy")
ROUNDS = range(3, 16)
SECONDS_A_CASE = 2.0


def shape(head: str, rows: int) -> Shape:
    """Pairs of completions of 512 tokens, `rows` in all."""
    width, vocabulary = HEADS[head]
    return Shape(rows // (2 * COMPLETION), 16, COMPLETION, hidden=width, vocabulary=vocabulary)


def names_of_ours() -> list[str]:
    """The default choice, and what it chooses from: its own kernels or cuBLAS for the gradients,
    chunks as the default workspace allows or smaller ones.
    """
    auto = ours(DEVICE)[0]
    names = [auto, f"{auto} in 512 MiB"]
    if auto == "fastdpop triton":
        from fastdpop.engines.triton import TritonEngine

        for products in ("kernels", "cublas"):
            name = f"triton-{products}"
            if name not in engines.available(DEVICE, torch.bfloat16):
                engines.register(TritonEngine(products=products, name=name), first=False)
            names.append(f"fastdpop {name}")
    return names


def cases() -> Iterator[tuple[str, int, str, str]]:
    """Head, rows, mode and contender, what matters most first; those of one batch together."""
    own = names_of_ours()
    for rows in ROWS:
        for head in HEADS:
            for mode in MODES:
                yield from ((head, rows, mode, name) for name in (FLOOR, *own))
            if rows < 32_768:
                for mode in (TRAINED, FROZEN):
                    yield from ((head, rows, mode, name) for name in PEERS)


def timed(call: Callable[[], object]) -> float:
    """Seconds on the device between what was queued before and the end of `call`."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(batch: Batch, floor: Floor, mode: str, name: str) -> Row:
    """One contender: rounds beside the floor, peak memory, errors against float64."""
    who = None if name == FLOOR else contender(name)
    loss = LOSSES["dpop" if who is None else who.losses[0]]

    def step() -> torch.Tensor | None:
        if who is None:
            floor.run(mode)
            return None
        return who.run(batch, mode, loss)

    batch.start(mode)
    step()  # compiles
    batch.start(mode)
    gc.collect()
    peak, logps = peak_extra_bytes(step, DEVICE)
    errors = {} if logps is None else batch.errors(logps, loss)
    batch.start(mode)
    estimate = timed(step)
    rounds = max(ROUNDS[0], min(math.ceil(SECONDS_A_CASE / 2 / estimate), ROUNDS[-1]))
    times, floors = [], []
    for _ in range(rounds):
        batch.start(mode)
        floors.append(timed(lambda: floor.run(mode)))
        times.append(timed(step))
    batch.start(mode)
    return {
        "loss": "" if who is None else loss.name,
        "rounds": rounds,
        "seconds": statistics.median(times),
        "floor_seconds": statistics.median(floors),
        "to_floor": statistics.median(t / f for t, f in zip(times, floors, strict=True)),
        "peak_extra_bytes": peak,
        **errors,
    }


def launches(batch: Batch, mode: str, name: str) -> list[Row]:
    """The kernels of one step and their time on the device, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    who, loss = contender(name), LOSSES["dpop"]
    batch.start(mode)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        who.run(batch, mode, loss)
        torch.cuda.synchronize()
    batch.start(mode)
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_device_time_total)
    return [
        {"kernel": e.key, "launches": e.count, "seconds": e.self_device_time_total / 1e6}
        for e in events[:12]
        if e.self_device_time_total > 0
    ]


def run(seconds: float) -> dict[str, Any]:
    """Everything that fits the time, in the form of `make bench`'s results and a little more."""
    stop = time.monotonic() + seconds
    rows: list[Row] = []
    left_out: list[str] = []
    profiles: dict[str, list[Row]] = {}
    batch: Batch | None = None
    floor: Floor | None = None
    held: tuple[str, int] | None = None
    for head, count, mode, name in cases():
        workload = f"{head}, {count:,} rows"
        case = f"{workload}, {mode}: {name}"
        package = None if name == FLOOR else contender(name).needs
        if package is not None and importlib.util.find_spec(package) is None:
            left_out.append(f"{case}: {package} is not installed")
            continue
        if time.monotonic() > stop:
            left_out.append(f"{case}: no time left")
            continue
        print(case, flush=True)
        try:
            if held != (head, count):
                batch = floor = None
                gc.collect()
                torch.cuda.empty_cache()
                batch = Batch.random(shape(head, count), torch.bfloat16, DEVICE)
                _ = batch.exact
                floor, held = Floor(batch), (head, count)
            assert batch is not None
            assert floor is not None
            found = measure(batch, floor, mode, name)
            if name == names_of_ours()[0] and count == ROWS[0]:
                profiles[f"{workload}, {mode}"] = launches(batch, mode, name)
        except Exception as error:  # one that fails must not take the others' results with it
            kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)
            left_out.append(f"{case}: {kind[:500]}")
            if batch is not None:
                batch.start(mode)
            torch.cuda.empty_cache()
            continue
        facts = {"scored_rows": count, "distinct_rows": count}
        rows.append(
            {"kind": "step", "workload": workload, "dtype": "bf16", "mode": mode}
            | {"contender": name, **facts, **found}
        )
    return {**machine(), "rows": rows, "left_out": left_out, "launches": profiles}


def machine() -> dict[str, Any]:
    """Where, with what and when."""
    versions = {"fastdpop": fastdpop.__version__, "torch": torch.__version__}
    for package in ("triton", "trl", "liger_kernel"):
        if importlib.util.find_spec(package) is not None:
            found = importlib.import_module(package)
            versions[package] = getattr(found, "__version__", "unknown")
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        "cpu": platform.processor() or platform.machine(),
        "capability": "host",
        "threads": torch.get_num_threads(),
        "versions": {**versions, "Python": platform.python_version()},
        "malloc": "default",
        "date": datetime.date.today().isoformat(),
        "auto": ours(DEVICE)[0],
        "quick": False,
    }


def text(results: dict[str, Any]) -> str:
    """All of it in Markdown."""
    parts = [f"# Speed and memory on {results['device']}", report.machine_line(results)]
    parts.append("What the columns mean, and who the contenders are: docs/bench.md.")
    parts.append(report.tables(results["rows"]).strip())
    for case, kernels in results["launches"].items():
        lines = [f"| {k['kernel']} | {k['launches']} | {k['seconds'] * 1e3:.3f} |" for k in kernels]
        table = "\n".join(["| kernel | launches | ms |", "|---|---:|---:|", *lines])
        parts.append(f"### Launches of {results['auto']}: {case}\n\n{table}")
    if results["left_out"]:
        parts.append("### Left out\n\n" + "\n".join(f"- {line}" for line in results["left_out"]))
    return "\n\n".join(parts) + "\n"


def smoke() -> None:
    """Every engine and mode once, small enough for a checker that slows a kernel a hundredfold."""
    for dtype in (torch.bfloat16, torch.float32):
        batch = Batch.random(Shape(2, 4, 60, hidden=136, vocabulary=1_003), dtype, DEVICE)
        for name in names_of_ours():
            for mode in MODES:
                batch.start(mode)
                logps = contender(name).run(batch, mode, LOSSES["dpop"])
                errors = batch.errors(logps, LOSSES["dpop"])
                assert errors["logp_error_relative"] < 1e-4, (name, dtype, mode, errors)
                assert errors.get("dweight_error", 0.0) < 2e-2, (name, dtype, mode, errors)
                print(name, dtype, mode, errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/chip"))
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after as many")
    parser.add_argument("--smoke", action="store_true", help="run every kernel once, small")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA GPU")
    if options.smoke:
        smoke()
        return
    results = run(options.seconds)
    results["rows"] = [report.rounded(row) for row in results["rows"]]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "chip.json").write_text(
        json.dumps(results, indent=1) + "\n", encoding="utf-8"
    )
    (options.output / "chip.md").write_text(text(results), encoding="utf-8")
    print(text(results))


if __name__ == "__main__":
    main()
