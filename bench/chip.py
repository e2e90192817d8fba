"""Time, memory and exactness on a GPU, in a given time and with nothing but torch and triton.

    python bench/chip.py smoke main --output DIR --seconds 120    # bench/h100.sh calls it
    python bench/chip.py --report A.json B.json --output bench/results

Parts, in their order:

- smoke: every kernel once, small, with asserts on the results; ``--tiny`` for compute-sanitizer.
- main: Llama 3 8B's head with 8,192 rows: bare products and copies, a step of every mode, the time
  of each launch, dWeight 20 times bit for bit, other settings of the kernels, baselines.
- heads: other heads and numbers of rows, and peers.
- memory: peaks, over numbers of rows.

The contenders are those of `make bench`. Each round of a contender follows one of the bare
products, so that both see the same clocks; the bare products are the fastest of several ways to
form each, in 16 bits or float32, measured in the same run. ``h100.json`` and ``h100.md`` are
written after every case, so a run that is cut off keeps what it has. What was left out is named.
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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Run as a script, Python looks for modules beside it only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastdpop
from bench import contenders, report
from bench.contenders import FLOOR, Contender
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
MAIN = ("Llama-3-8B", 8_192)
ROWS = (8_192, 2_048, 32_768)
COMPLETION = 512
TRAINED, FROZEN, LOGPS = MODES
UNITS = {LOGPS: 1, FROZEN: 2, TRAINED: 3}
"""Products of 2 * N * V * H operations."""
PEERS = (
    "gather, fp32 upcast",
    "checkpointed chunks",
    "Liger",
    "TRL, scored rows",
    "F.linear_cross_entropy",
    "gather, fp32 upcast, compiled",
)
ROUNDS = range(3, 16)
SECONDS_A_CASE = 1.5
REPEATED = 20


# Baselines that `make bench` does not have.


def _checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    parts = zip(hidden.split(1_024), targets.split(1_024), strict=True)
    return torch.cat(
        [checkpoint(contenders._upcast, h, weight, y, use_reentrant=False) for h, y in parts]
    )


def _compiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.compile(contenders._upcast, dynamic=False)(hidden, weight, targets)


EXTRA = {
    "checkpointed chunks": Contender(contenders._of_rows(_checkpointed)),
    "gather, fp32 upcast, compiled": Contender(contenders._of_rows(_compiled), compiles=True),
}


def contender(name: str) -> Contender:
    return EXTRA.get(name) or contenders.contender(name)


class Results:
    """What is known so far, in a file at all times; the form of `make bench`'s results, and more.

    Args:
        folder: where ``h100.json`` and ``h100.md`` are, to be continued if they are.
        seconds: after how many there is no time for another case.
    """

    def __init__(self, folder: Path, seconds: float = math.inf) -> None:
        self.folder, self.stop = folder, time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "h100.json"
        self.data: Row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.data |= machine()
        self.failed: list[str] = []
        for name in ("rows", "products", "settings", "launches", "checks", "left_out"):
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
            _free()
            return False
        return True


def _free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def shape(head: str, rows: int) -> Shape:
    """Pairs of completions of 512 tokens, `rows` in all."""
    width, vocabulary = HEADS[head]
    return Shape(rows // (2 * COMPLETION), 16, COMPLETION, hidden=width, vocabulary=vocabulary)


def random_batch(of: Shape, dtype: torch.dtype) -> Batch:
    """A batch of `make bench`'s kind, made where it is used: on the CPU, a head takes seconds."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    count, length = 2 * of.pairs, of.prompt + of.completion
    options = {"generator": generator, "device": DEVICE}
    hidden = torch.randn(count, length, of.hidden, **options).to(dtype)
    weight = torch.randn(of.vocabulary, of.hidden, **options).mul_(4.0 * of.hidden**-0.5)
    labels = torch.randint(of.vocabulary, (count, length), **options)
    labels[:, : of.prompt] = -100
    sequences, at = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return Batch(
        hidden.requires_grad_(),
        weight.to(dtype).requires_grad_(),
        labels,
        hidden.detach()[sequences, at],
        labels[sequences, at + 1],
        sequences,
        0,
    )


def names_of_ours() -> list[str]:
    """The default choice, and what it chooses from: its own kernels for all products, the other
    forward product, smaller chunks.
    """
    auto = contenders.ours(DEVICE)[0]
    names = [auto]
    if auto == "fastdpop triton":
        from fastdpop.engines.triton import TritonEngine

        for name, options in (
            ("triton-kernels", {"products": "kernels"}),
            ("triton-gluon", {"forward": "gluon"}),
        ):
            if name not in engines.available(DEVICE, torch.bfloat16):
                engines.register(TritonEngine(name=name, **options), first=False)
            names.append(f"fastdpop {name}")
    return [*names, f"{auto} in 512 MiB"]


def timed(call: Callable[[], object]) -> float:
    """Seconds on the device between what was queued before and the end of `call`."""
    if DEVICE != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rounds_of(estimate: float) -> int:
    return max(ROUNDS[0], min(math.ceil(SECONDS_A_CASE / 2 / max(estimate, 1e-6)), ROUNDS[-1]))


class Products:
    """The bare products of a batch, each in the way that is fastest here.

    Attributes:
        best: the fastest way to each of logits, dHidden and dWeight.
        seconds: of every way.
    """

    def __init__(self, batch: Batch) -> None:
        rows, weight = batch.rows, batch.weight.detach()
        (n, width), vocabulary = rows.shape, len(weight)
        self.flop = 2.0 * n * width * vocabulary
        memory = rows.new_empty(n * vocabulary)
        by_row, by_token = memory.view(n, vocabulary), memory.view(vocabulary, n)
        torch.mm(rows, weight.T, out=by_row)
        hidden, whole = torch.empty_like(rows), torch.empty_like(weight)
        mm = torch.mm
        ways: dict[str, dict[str, Callable[[], object]]] = {
            "logits": {
                "rows @ weight.T": lambda: mm(rows, weight.T, out=by_row),
                "weight @ rows.T": lambda: mm(weight, rows.T, out=by_token),
            },
            "dHidden": {
                "logits @ weight": lambda: mm(by_row, weight, out=hidden),
                "logits.T.T @ weight": lambda: mm(by_token.T, weight, out=hidden),
            },
            "dWeight": {
                "logits.T @ rows": lambda: mm(by_row.T, rows, out=whole),
                "logits.T, contiguous, @ rows": lambda: mm(by_token, rows, out=whole),
            },
        }
        if DEVICE == "cuda":  # torch on the CPU forms none in another dtype
            wide = torch.float32
            wide_hidden, wide_weight = (torch.empty_like(m, dtype=wide) for m in (rows, weight))
            wide_logits = torch.empty_like(by_row, dtype=wide)
            ways["logits"]["rows @ weight.T, fp32"] = lambda: mm(
                rows, weight.T, out_dtype=wide, out=wide_logits
            )
            ways["dHidden"]["logits @ weight, fp32"] = lambda: mm(
                by_row, weight, out_dtype=wide, out=wide_hidden
            )
            ways["dWeight"]["logits.T @ rows, fp32"] = lambda: mm(
                by_row.T, rows, out_dtype=wide, out=wide_weight
            )
            ways["dWeight"]["logits.T @ rows, fp32, added"] = lambda: torch.addmm(
                wide_weight, by_row.T, rows, out_dtype=wide, out=wide_weight
            )
        self.seconds: dict[str, dict[str, float]] = {}
        self.best: list[Callable[[], object]] = []
        for product, of_product in ways.items():
            for way in of_product.values():
                way()
            # Round by round, so that none has the cool chip to itself.
            times = [[timed(way) for way in of_product.values()] for _ in range(5)]
            medians = [statistics.median(each) for each in zip(*times, strict=True)]
            self.seconds[product] = dict(zip(of_product, medians, strict=True))
            self.best.append(list(of_product.values())[medians.index(min(medians))])

    def run(self, mode: str) -> None:
        """2, 4 or 6 units, with nothing between them."""
        for way in self.best[: UNITS[mode]]:
            way()


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31 if DEVICE == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return (
        2 * len(source) / statistics.median(timed(lambda: target.copy_(source)) for _ in range(5))
    )


def measure(batch: Batch, floor: Products, mode: str, name: str) -> Row:
    """One contender: rounds beside the floor, peak memory, errors against float64."""
    who = None if name == FLOOR else contender(name)
    loss = LOSSES["dpop" if who is None else who.losses[0]]

    def step() -> Tensor | None:
        if who is None:
            floor.run(mode)
            return None
        return who.run(batch, mode, loss)

    try:
        batch.start(mode)
        step()  # compiles
        batch.start(mode)
        gc.collect()
        peak, logps = peak_extra_bytes(step, DEVICE)
        errors = {} if logps is None else batch.errors(logps, loss)
        batch.start(mode)
        rounds = rounds_of(timed(step))
        times, floors = [], []
        for _ in range(rounds):
            batch.start(mode)
            floors.append(timed(lambda: floor.run(mode)))
            times.append(timed(step))
    finally:
        batch.start(mode)
    seconds = statistics.median(times)
    return {
        "loss": "" if who is None else loss.name,
        "rounds": rounds,
        "seconds": seconds,
        "floor_seconds": statistics.median(floors),
        "to_floor": statistics.median(t / f for t, f in zip(times, floors, strict=True)),
        "tflops": UNITS[mode] * floor.flop / seconds / 1e12,
        "peak_extra_bytes": peak,
        **errors,
    }


def launches(batch: Batch, floor: Products, mode: str, name: str) -> list[Row]:
    """The kernels of one step, their time on the device and TFLOP/s, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    who, loss = contender(name), LOSSES["dpop"]
    batch.start(mode)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        who.run(batch, mode, loss)
        torch.cuda.synchronize()
    batch.start(mode)
    events = [e for e in recorded.key_averages() if e.self_device_time_total > 0]
    rows = [
        {"kernel": e.key, "launches": e.count, "seconds": e.self_device_time_total / 1e6}
        for e in sorted(events, key=lambda e: -e.self_device_time_total)[:16]
    ]
    # Each of our products is one kernel, in one launch or in many; what remains is cuBLAS's.
    ours = [row for row in rows if _product_of(row["kernel"])]
    for row in ours:
        row["tflops"] = floor.flop / row["seconds"] / 1e12
    by_cublas = [row for row in rows if _is_cublas(row["kernel"])]
    missing = UNITS[mode] - len({_product_of(row["kernel"]) for row in ours})
    if by_cublas and missing > 0:
        seconds = sum(row["seconds"] for row in by_cublas)
        for row in by_cublas:
            row["tflops"] = missing * floor.flop / seconds / 1e12
    return rows


def _product_of(kernel: str) -> str | None:
    names = ("forward_kernel", "dhidden_kernel", "dweight_kernel")
    return next((name for name in names if name in kernel), None)


def _is_cublas(kernel: str) -> bool:
    return any(part in kernel.lower() for part in ("gemm", "nvjet", "cutlass", "xmma"))


def repeated(batch: Batch, name: str) -> str:
    """dWeight and dHidden of a step with `name`, 20 times, bit for bit."""
    who, loss, first = contender(name), LOSSES["dpop"], None
    for i in range(REPEATED):
        batch.start(TRAINED)
        who.run(batch, TRAINED, loss)
        found = [batch.weight.grad, batch.hidden.grad]
        assert all(one is not None for one in found)
        if first is None:
            first = found
        for one, two in zip(first, found, strict=True):
            if not torch.equal(one, two):
                raise AssertionError(f"gradients DIFFER in run {i + 1} of {REPEATED}")
    batch.start(TRAINED)
    return f"{name}: the same gradients in {REPEATED} runs, bit for bit"


def settings(hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[str, Callable]]:
    """Other settings of the kernels than those that are shipped: a name, and a launch of the
    forward product, or of dWeight.
    """
    from fastdpop.kernels import config, forward, gluon_forward, gradients

    base = config.of("sm_90a" if DEVICE != "cpu" else "interpreter", hidden.dtype)
    rows, vocabulary = len(hidden), len(weight)
    new = hidden.new_empty
    plain = forward.Transform(scale=1.4427, cap=1.0, softcap=False, slope=1.0)
    capped = forward.Transform(scale=43.28, cap=1 / 30, softcap=True, slope=1.0)
    reference = forward.target_logit(hidden, weight, None, targets, plain)
    kept = new((rows, forward.kept_width(vocabulary, base)))
    one_tile = targets % base.forward.v
    every_tile = torch.arange(rows, device=hidden.device) * (4 * base.forward.v) % vocabulary

    def launch(
        module: Any = forward, of: Any = base, to: Any = plain, keep: bool = True,
        statistics: bool = False, y: Tensor = targets,
    ) -> Callable[[], object]:  # fmt: skip
        return lambda: module.forward(
            hidden, weight, None, y, reference, to, of,
            exp_logits=kept if keep else None, statistics=statistics,
        )  # fmt: skip

    def blocks(**changes: int) -> Any:
        return replace(base, forward=replace(base.forward, **changes))

    yield "forward, as shipped", launch()
    yield "forward, nothing kept", launch(keep=False)
    yield "forward, 3 stages", launch(of=blocks(stages=3))
    for group in (8, 24, 32):
        yield f"forward, group {group}", launch(of=replace(base, group_n=group))
    # E is stored in quarters of a tile, and half as wide ones fill the same memory.
    yield "forward, 128 x 128, 4 warps, 4 stages", launch(of=blocks(v=128, warps=4))
    yield "forward, 128 x 128, 4 warps, 3 stages", launch(of=blocks(v=128, warps=4, stages=3))
    yield "forward, softcap", launch(to=capped)
    yield "forward, statistics", launch(keep=False, statistics=True)
    yield "forward, targets in one tile", launch(y=one_tile)
    yield "forward, targets in every tile", launch(y=every_tile)
    if gluon_forward.supported(hidden, weight, kept, base) is None:
        gluon = gluon_forward
        yield "gluon", launch(gluon)
        yield "gluon, nothing kept", launch(gluon, keep=False)
        for group in (8, 24, 32):
            yield f"gluon, group {group}", launch(gluon, of=replace(base, group_n=group))
        yield "gluon, softcap", launch(gluon, to=capped)
        yield "gluon, statistics", launch(gluon, keep=False, statistics=True)
        yield "gluon, targets in every tile", launch(gluon, y=every_tile)
    factor = torch.ones(rows, device=hidden.device)
    out = new((vocabulary, hidden.shape[1]), dtype=torch.float32)
    out_hidden = new(hidden.shape, dtype=torch.float32)
    for cublas in (True, False):
        by = "cuBLAS" if cublas else "kernel"
        yield (
            f"dHidden, {by}",
            lambda cublas=cublas: gradients.hidden_gradient(
                kept, weight, factor, out_hidden, base, cublas=cublas
            ),
        )
        for added in (False, True):
            yield (
                f"dWeight, {by}{', added' if added else ''}",
                lambda cublas=cublas, added=added: gradients.weight_gradient(
                    kept, hidden, factor, out, base, accumulate=added, cublas=cublas
                ),
            )
    others = {"3 stages": replace(base, dweight=replace(base.dweight, stages=3))}
    others |= {f"group {group}": replace(base, group_n=group) for group in (8, 32)}
    for name, of in others.items():
        yield (
            f"dWeight, kernel, {name}",
            lambda of=of: gradients.weight_gradient(
                kept, hidden, factor, out, of, accumulate=False, cublas=False
            ),
        )


def measure_setting(name: str, launch: Callable[[], object], floor: Products) -> Row:
    """Rounds beside the bare logits."""
    bare = floor.best[0]
    launch()
    rounds = max(3, rounds_of(timed(launch)) // 2)
    times = [(timed(bare), timed(launch)) for _ in range(rounds)]
    seconds = statistics.median(t for _, t in times)
    return {
        "setting": name,
        "seconds": seconds,
        "tflops": floor.flop / seconds / 1e12,
        "to_bare_logits": statistics.median(t / b for b, t in times),
    }


class Held:
    """The batch at hand, and its bare products once they are asked for, which take memory."""

    def __init__(self) -> None:
        self.of: tuple[str, int] | None = None
        self.batch: Batch | None = None
        self.floor: Products | None = None

    def batch_of(self, head: str, rows: int) -> Batch:
        if self.of != (head, rows):
            self.of = self.batch = self.floor = None
            _free()
            self.batch = random_batch(shape(head, rows), torch.bfloat16)
            _ = self.batch.exact
            self.of = (head, rows)
        assert self.batch is not None
        return self.batch

    def __call__(self, head: str, rows: int) -> tuple[Batch, Products]:
        batch = self.batch_of(head, rows)
        if self.floor is None:
            self.floor = Products(batch)
            _free()
        return batch, self.floor


def add_steps(
    results: Results, held: Held, head: str, rows: int, modes: tuple[str, ...], names: list[str]
) -> None:
    """Measure these contenders in these modes."""
    workload = f"{head}, {rows:,} rows"
    for mode in modes:
        for name in names:
            case = f"{workload}, {mode}: {name}"
            package = None if name == FLOOR else contender(name).needs
            if package is not None and importlib.util.find_spec(package) is None:
                results.add("left_out", f"{case}: {package} is not installed")
                continue

            def one(mode: str = mode, name: str = name) -> None:
                row = {
                    "kind": "step",
                    "workload": workload,
                    "dtype": "bf16",
                    "mode": mode,
                    "contender": name,
                    "scored_rows": rows,
                    "distinct_rows": rows,
                }
                results.add("rows", row | measure(*held(head, rows), mode, name))

            results.case(case, one)


def part_main(results: Results) -> None:
    """See the module."""
    head, rows = MAIN
    workload, held, auto = f"{head}, {rows:,} rows", Held(), names_of_ours()[0]

    def products() -> None:
        _, floor = held(head, rows)
        for product, ways in floor.seconds.items():
            for way, seconds in ways.items():
                row = {"workload": workload, "product": product, "way": way, "seconds": seconds}
                results.add("products", row | {"tflops": floor.flop / seconds / 1e12})
        results.data["copy_bytes_a_second"] = bandwidth()

    results.case("bare products and copies", products)
    modes = (LOGPS, FROZEN, TRAINED)
    add_steps(results, held, head, rows, modes, [FLOOR, auto])
    for mode in modes:

        def profiled(mode: str = mode) -> None:
            batch, floor = held(head, rows)
            for row in launches(batch, floor, mode, auto):
                results.add("launches", {"workload": workload, "mode": mode} | row)

        results.case(f"launches, {mode}", profiled)
    others = names_of_ours()[1:]
    add_steps(results, held, head, rows, modes, others)
    for name in [auto, *others[:2]]:
        results.case(
            f"{name}, {REPEATED} times",
            lambda name=name: results.add("checks", repeated(held.batch_of(head, rows), name)),
        )
    add_steps(results, held, head, rows, (TRAINED,), list(PEERS[:4]))

    def others_settings() -> None:
        batch, floor = held(head, rows)
        operands = batch.rows, batch.weight.detach(), batch.targets
        for name, launch in settings(*operands):
            results.case(
                f"setting: {name}",
                lambda name=name, launch=launch: results.add(
                    "settings", measure_setting(name, launch, floor)
                ),
            )

    results.case("settings", others_settings)
    add_steps(results, held, head, rows, (TRAINED,), list(PEERS[4:]))
    add_steps(results, held, head, rows, (FROZEN,), list(PEERS[:4]))


def part_heads(results: Results) -> None:
    """Every head and number of rows but the main one, what matters most first."""
    held, (auto, *others) = Held(), names_of_ours()
    for rows in ROWS:
        for head in HEADS:
            if (head, rows) == MAIN:
                continue
            modes = (TRAINED, FROZEN, LOGPS)
            add_steps(results, held, head, rows, modes, [FLOOR, auto])
            if rows == ROWS[0]:
                add_steps(results, held, head, rows, (TRAINED,), [*others, *PEERS[:4]])


def part_memory(results: Results) -> None:
    """Peaks over numbers of rows, of everybody's first call."""
    held, own = Held(), names_of_ours()
    for rows in sorted(ROWS):
        for name in dict.fromkeys((own[0], own[-1], *PEERS[:4])):
            package = contender(name).needs
            if package is not None and importlib.util.find_spec(package) is None:
                continue
            for mode in (TRAINED, FROZEN):

                def one(rows: int = rows, name: str = name, mode: str = mode) -> None:
                    batch = held.batch_of(MAIN[0], rows)
                    who = contender(name)
                    loss = LOSSES[who.losses[0]]
                    try:
                        batch.start(mode)
                        who.run(batch, mode, loss)
                        batch.start(mode)
                        _free()
                        peak, _ = peak_extra_bytes(lambda: who.run(batch, mode, loss), DEVICE)
                    finally:
                        batch.start(mode)
                    row = {"kind": "memory", "series": "rows", "contender": name, "mode": mode}
                    sizes = {"scored_rows": rows, "vocabulary": HEADS[MAIN[0]][1]}
                    results.add("rows", row | sizes | {"peak_extra_bytes": peak})

                results.case(f"memory, {rows:,} rows, {mode}: {name}", one)


def part_smoke(results: Results | None, tiny: bool = False) -> None:
    """Every engine and mode once. Raises an error where one is wrong."""
    sizes = [Shape(2, 4, 60, hidden=136, vocabulary=1_003)]
    if not tiny:
        sizes.append(Shape(2, 16, COMPLETION, hidden=1_024, vocabulary=32_003))
    dtypes = (
        (torch.bfloat16, torch.float32) if tiny else (torch.bfloat16, torch.float16, torch.float32)
    )
    for of in sizes:
        for dtype in dtypes:
            batch = random_batch(of, dtype)
            for name in names_of_ours()[: 3 if tiny else None]:
                for mode in MODES[: 1 if tiny else None]:
                    batch.start(mode)
                    logps = contender(name).run(batch, mode, LOSSES["dpop"])
                    errors = batch.errors(logps, LOSSES["dpop"])
                    print(name, dtype, mode, errors, flush=True)
                    where = (name, dtype, mode, errors)
                    if not errors["logp_error_relative"] < 2e-5:
                        raise AssertionError(where)
                    if not errors.get("dweight_error", 0.0) < 2e-2:
                        raise AssertionError(where)
    if results is not None:
        results.add("checks", "smoke: every engine, dtype and mode agrees with float64")


PARTS = {"main": part_main, "heads": part_heads, "memory": part_memory, "smoke": part_smoke}


def ptxas_version() -> str:
    """Of the assembler that triton uses for this chip."""
    from fastdpop.engines import self_check

    return self_check.combination(torch.device(DEVICE, torch.cuda.current_device()))[1]


def machine() -> Row:
    """Where, with what and when."""
    versions = {"fastdpop": fastdpop.__version__, "torch": torch.__version__}
    for package in ("triton", "trl", "liger_kernel"):
        if importlib.util.find_spec(package) is not None:
            try:
                found = importlib.import_module(package)
            except Exception as error:  # a broken peer is no reason to measure nothing
                versions[package] = f"broken: {error!r}"[:200]
            else:
                versions[package] = getattr(found, "__version__", "unknown")
    if "triton" in versions and DEVICE == "cuda":
        versions["ptxas"] = ptxas_version()
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
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        **dict(zip(("driver", "power_limit", "most_sm_clock"), facts, strict=False)),
        "cpu": platform.processor() or platform.machine(),
        "capability": "host",
        "threads": torch.get_num_threads(),
        "versions": {
            **versions,
            "CUDA": str(torch.version.cuda),
            "Python": platform.python_version(),
        },
        "malloc": "default",
        "date": datetime.date.today().isoformat(),
        "auto": contenders.ours(DEVICE)[0],
        "quick": False,
    }


def _table(rows: list[Row], names: dict[str, str]) -> str:
    def cell(value: Any, name: str) -> str:
        if value is None:
            return ""
        if name == "seconds":
            return f"{value * 1e3:.3f}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    body = [[cell(row.get(name), name) for name in names] for row in rows]
    return report._table(list(names.values()), body)


def text(results: Row) -> str:
    """All of it in Markdown."""
    parts = [f"# Speed and memory on {results['device']}", report.machine_line(results)]
    facts = [
        f"{results[name]}" for name in ("driver", "power_limit", "most_sm_clock") if name in results
    ]
    if facts:
        parts.append(f"Driver, power limit and largest clock: {', '.join(facts)}.")
    if "copy_bytes_a_second" in results:
        parts.append(f"Copies: {results['copy_bytes_a_second'] / 1e12:.2f} TB/s, read and written.")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path("build/h100"))
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after as many")
    parser.add_argument("--tiny", action="store_true", help="the smoke test for a slow checker")
    parser.add_argument("--report", type=Path, nargs="+", help="put results together instead")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown or not (options.parts or options.report):
        parser.error(f"parts are {', '.join(PARTS)}")
    if options.report:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in options.report]
        write(merged(found), options.output)
        print(summary(merged(found)))
        return
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA GPU")
    if "fastdpop triton" in contenders.ours(DEVICE):
        from tests import launches

        launches.settle_keys()  # what was compiled beforehand is found
    if options.tiny:
        part_smoke(None, tiny=True)
        return
    results = Results(options.output, options.seconds)
    for part in options.parts:
        PARTS[part](results)
    if results.failed:
        raise SystemExit("\n".join(["failed:", *results.failed]))


if __name__ == "__main__":
    main()
