"""What ``bench/h100.sh`` will do on a GPU, found out without one: launches, variants, seconds.

    bench/h100.sh --plan                      # prints it; fails if it takes too long
    python bench/plan.py --compile 14         # on the GPU's machine, before anything else

Kernels are recorded instead of launched (``tests/launches.py``), those of tests/gpu by running its
tests that way. How long each takes to compile is measured with the triton at hand, once, and kept
in ``build/``. What a GPU adds is assumed, at the top of this file.

On the GPU's machine, everything is compiled before it is needed, on all cores, into Triton's cache:
one by one, a compiler would take most of the time there is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Run as a script, Python looks for modules beside it only.
sys.path.insert(0, str(ROOT))

LIMIT = 570
"""Seconds for everything."""

BUDGETS = {
    "check": 12,
    "compile": 70,
    "smoke": 35,
    "main": 75,
    "tests": 125,
    "heads": 90,
    "sharing": 55,
    "memory": 40,
    "sanitizer": 63,
}
"""Seconds after which a part is stopped, in the order of the parts; ``h100.sh`` reads them here."""
FIRST = ("check", "compile", "smoke", "main", "tests")
"""The parts of ``h100.sh first``; the others are those of ``h100.sh rest``."""

CORES = 16
SHARDS = 8
START = 8.0
"""Seconds until a process has imported torch and triton and has a GPU's context, beside others."""
CONTENTION = 4.0
"""Compiling on all cores at once takes so many times as long as on one."""
SMOKE = 15.0
"""Seconds of a smoke test beside its start: small problems, and float64 on the GPU."""


def plan_of_compiling() -> list[Any]:
    """All that may be launched on an H100 (:class:`tests.launches.Compiled`)."""
    import torch

    from bench.chip.settings import settings
    from bench.chip.setup import Setup
    from tests import launches

    launches.settle_keys()
    found = dict.fromkeys(launches.everything("sm_90a").compiled)
    head, rows = Setup().main
    width, vocabulary = Setup().heads[head]
    operands = (
        torch.empty(rows, width, dtype=torch.bfloat16, device="meta"),
        torch.empty(vocabulary, width, dtype=torch.bfloat16, device="meta"),
        torch.empty(rows, dtype=torch.int64, device="meta"),
    )
    with launches.recorded("sm_90a") as recording:
        for _, launch in settings(*operands):
            launch()
    return list(found | dict.fromkeys(recording.compiled))


def compile_one(compiled: Any) -> float:
    """Compile what a launch would, into Triton's cache, with the key that it would look for."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, signature, constants, attrs, options = compiled.source
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    start = _cpu_seconds()
    compile_(
        source(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    return _cpu_seconds() - start


def _cpu_seconds() -> float:
    """Of this process and its assemblers: a busy machine does not make a compiler slower."""
    return math.fsum(os.times()[:4])


def key(compiled: Any) -> str:
    """Of a kernel in one configuration, as long as its source does not change."""
    parts = (repr(compiled), compiled.source[0].cache_key)
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:24]


def compile_share(task: tuple[int, int, list[str] | None]) -> dict[str, float]:
    """In a process of its own: every n-th, or of those with these keys; seconds of each."""
    number, count, wanted = task
    own = plan_of_compiling()
    if wanted is not None:
        own = [one for one in own if key(one) in wanted]
    # The heavy ones first, dealt out evenly.
    own.sort(key=lambda one: (one.kernel != "forward_kernel", repr(one)))
    done = {}
    for one in own[number::count]:
        try:
            done[key(one)] = compile_one(one)
        except Exception as error:
            print(f"cannot compile {one.kernel}: {error!r}"[:500], file=sys.stderr, flush=True)
    return done


def compile_all(jobs: int, wanted: list[str] | None = None) -> dict[str, float]:
    """In as many processes; seconds of each, by key."""
    from tools.kernels.compiler import processes

    tasks = [(i, jobs, wanted) for i in range(jobs)]
    done: dict[str, float] = {}
    with processes(jobs) as pool:
        for found in pool.map(compile_share, tasks):
            done |= found
    return done


def measured(jobs: int, cache: Path) -> list[tuple[str, float]]:
    """Kernel and seconds of everything that would be compiled; what `cache` does not have is
    compiled, in an empty cache of Triton's.
    """
    known: dict[str, float] = json.loads(cache.read_text()) if cache.exists() else {}
    own = plan_of_compiling()
    missing = [key(one) for one in own if key(one) not in known]
    if missing:
        print(f"compiling {len(missing)} of {len(own)} variants to see how long it takes")
        before = os.environ.get("TRITON_CACHE_DIR")
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            try:
                known |= compile_all(jobs, missing)
            finally:
                del os.environ["TRITON_CACHE_DIR"]
                if before is not None:
                    os.environ["TRITON_CACHE_DIR"] = before
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(known, indent=1) + "\n")
    return [(one.kernel, known[key(one)]) for one in own if key(one) in known]


def recorded_tests() -> list[dict[str, Any]]:
    """What tests/gpu would launch: its tests, run for that."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.json"
        options = ["--assert=plain", "-W", "ignore", "-q", "-p", "no:cacheprovider"]
        command = [sys.executable, "-O", "-m", "pytest", "tests/gpu", "--confcutdir=tests/gpu"]
        done = subprocess.run(
            [*command, *options],
            cwd=ROOT,
            env={**os.environ, "FASTDPOP_RECORD": str(path), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0 or not path.exists():
            raise RuntimeError(f"tests/gpu cannot be recorded:\n{done.stdout[-3_000:]}")
        found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def seconds_of(compiling: list[tuple[str, float]], tests: list[dict[str, Any]]) -> dict[str, float]:
    """What each part takes, at most its budget where it fills that."""
    expected = {
        "check": START,
        "compile": START + CONTENTION * sum(seconds for _, seconds in compiling) / CORES,
        "smoke": START + SMOKE,
        "tests": START + sum(test["seconds"] for test in tests) / SHARDS,
    }
    return {part: float(expected.get(part, BUDGETS[part])) for part in BUDGETS}


def text(compiling: list[tuple[str, float]], tests: list[dict[str, Any]]) -> tuple[str, bool]:
    """The plan for people, and whether it fits."""
    lines = [
        f"triton {importlib.metadata.version('triton')}; on {CORES} cores",
        "",
        f"{'kernel':24} {'variants':>8} {'seconds each':>13} {'in all':>7}",
    ]
    for kernel, count in Counter(kernel for kernel, _ in compiling).most_common():
        total = sum(seconds for name, seconds in compiling if name == kernel)
        lines.append(f"{kernel:24} {count:8} {total / count:13.2f} {total:7.1f}")
    total = sum(seconds for _, seconds in compiling)
    lines.append(f"{'all':24} {len(compiling):8} {'':13} {total:7.1f}")
    used = {name for test in tests for name in test["compiled"]}
    lines += [
        "",
        f"tests/gpu: {len(tests)} tests in {SHARDS} processes launch {len(used)} variants, of which "
        f"{sum(name.startswith(('forward', 'gluon', 'd', 'repair')) for name in used)} multiply matrices",
    ]
    lines += [f"  {t['name']} ends early: {t['ended'][:200]}" for t in tests if t["ended"]]
    lines += ["", f"{'part':12} {'expected':>8} {'stopped after':>14}"]
    expected = seconds_of(compiling, tests)
    fits = not any(test["ended"] for test in tests)
    for part, seconds in expected.items():
        over = seconds > BUDGETS[part]
        fits &= not over
        lines.append(f"{part:12} {seconds:8.0f} {BUDGETS[part]:14}{'  TOO LONG' if over else ''}")
    for name, parts in (
        ("h100.sh first", FIRST),
        ("h100.sh rest", [part for part in BUDGETS if part not in FIRST]),
    ):
        lines.append(f"{name:14} {math.fsum(expected[part] for part in parts):6.0f}")
    whole, most = sum(expected.values()), sum(BUDGETS.values())
    fits &= most <= LIMIT
    verdict = "fits" if fits else "DOES NOT FIT"
    lines.append(f"TOTAL {whole:.0f} s expected, {most} s at most, of {LIMIT} s: {verdict}")
    return "\n".join(lines), fits


def count(logs: list[Path], output: Path) -> str:
    """What became of the tests, from pytest's verbose logs, those of runs that were cut off too."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": [], "not finished": []}
    kinds = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
    for log in logs:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            # Names in brackets may hold blanks.
            match = re.match(
                r"(tests/\S+::\w+(?:\[.*?\])?)\s*(PASSED|FAILED|ERROR|SKIPPED|$)", line
            )
            if match:
                found[kinds.get(match[2], "not finished")].append(match[1])
    done = {name for names in list(found.values())[:3] for name in names}
    found["not finished"] = [name for name in found["not finished"] if name not in done]
    found["failed"] = list(dict.fromkeys(found["failed"]))
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = ["tests/gpu: " + ", ".join(f"{len(names)} {kind}" for kind, names in found.items())]
    lines += [f"  {kind}: {name}" for kind in ("failed", "not finished") for name in found[kind]]
    return "\n".join(lines[:60])


def require(*packages: str) -> None:
    """Stop with one sentence where one is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise SystemExit(f"{names} cannot be imported by {sys.executable}: install it there first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", type=int, metavar="JOBS", help="compile everything instead")
    parser.add_argument("--budgets", action="store_true", help="print them for a shell instead")
    parser.add_argument("--jobs", type=int, default=2, help="processes to measure compiling in")
    parser.add_argument(
        "--count", type=Path, nargs="+", help="count tests in pytest's logs instead"
    )
    parser.add_argument("--output", type=Path, default=Path("tests.json"), help="of --count")
    options = parser.parse_args()
    if options.count:
        print(count(options.count, options.output))
        found = json.loads(options.output.read_text(encoding="utf-8"))
        raise SystemExit(bool(found["failed"] or found["not finished"] or not found["passed"]))
    if options.budgets:
        print(" ".join(f"{part.upper()}={seconds}" for part, seconds in BUDGETS.items()))
        print(f"LIMIT={LIMIT} SHARDS={SHARDS}")
    elif options.compile:
        require("torch", "triton")
        start = time.perf_counter()
        done = compile_all(options.compile)
        print(f"{len(done)} variants compiled in {time.perf_counter() - start:.0f} s")
    else:
        require("torch", "triton", "pytest")
        version = importlib.metadata.version("triton")
        cache = ROOT / "build" / f"plan-triton-{version}.json"
        said, fits = text(measured(options.jobs, cache), recorded_tests())
        print(said)
        raise SystemExit(not fits)


if __name__ == "__main__":
    main()
