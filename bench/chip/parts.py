"""The parts of a run, each whatever becomes of the others."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

import torch

from bench.chip.results import Results
from bench.chip.settings import settings
from bench.chip.setup import FROZEN, LOGPS, TRAINED, Setup, contender, free, names_of_ours
from bench.chip.sharing import part_sharing
from bench.chip.timing import (
    Products,
    bandwidth,
    launches,
    measure_setting,
    measure_step,
    repeated,
)
from bench.contenders import FLOOR
from bench.memory import peak_extra_bytes
from bench.workloads import LOSSES, MODES, Batch, Shape


def _name(where: tuple[str, int]) -> str:
    head, rows = where
    return f"{head}, {rows:,} rows"


class Held:
    """The batch at hand, and its bare products once they are asked for, which take memory."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.of: tuple[str, int] | None = None
        self.batch: Batch | None = None
        self.floor: Products | None = None

    def batch_of(self, head: str, rows: int) -> Batch:
        if self.of != (head, rows):
            self.of = self.batch = self.floor = None
            free()
            of = self.setup.shape(head, rows)
            self.batch = self.setup.random_batch(of, torch.bfloat16)
            _ = self.batch.exact
            self.of = (head, rows)
        assert self.batch is not None
        return self.batch

    def __call__(self, head: str, rows: int) -> tuple[Batch, Products]:
        batch = self.batch_of(head, rows)
        if self.floor is None:
            self.floor = Products(batch)
            free()
        return batch, self.floor


def add_steps(
    results: Results,
    held: Held,
    where: tuple[str, int],
    modes: tuple[str, ...],
    names: list[str],
) -> None:
    """Measure these contenders in these modes, on a head and a number of rows."""
    head, rows = where
    workload = _name(where)
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
                results.add("rows", row | measure_step(held.setup, *held(head, rows), mode, name))

            results.case(case, one)


def part_main(setup: Setup, results: Results) -> None:
    """The main head, by everybody and in every way."""
    held, (auto, *others) = Held(setup), names_of_ours(setup.device)
    modes, peers = (LOGPS, FROZEN, TRAINED), list(setup.peers)
    results.case("bare products and copies", lambda: _bare_products(results, held))
    add_steps(results, held, setup.main, modes, [FLOOR, auto])
    _launches(results, held, modes, auto)
    add_steps(results, held, setup.main, modes, others)
    for name in [auto, *others[:2]]:
        results.case(
            f"{name}, {setup.repeated} times",
            lambda name=name: results.add(
                "checks", repeated(held.batch_of(*setup.main), name, setup.repeated)
            ),
        )
    add_steps(results, held, setup.main, (TRAINED,), peers[:4])
    results.case("settings", lambda: _settings(results, held))
    add_steps(results, held, setup.main, (TRAINED,), peers[4:])
    add_steps(results, held, setup.main, (FROZEN,), peers[:4])


def _bare_products(results: Results, held: Held) -> None:
    workload, (_, floor) = _name(held.setup.main), held(*held.setup.main)
    for product, ways in floor.seconds.items():
        for way, seconds in ways.items():
            row = {"workload": workload, "product": product, "way": way, "seconds": seconds}
            results.add("products", row | {"tflops": floor.flop / seconds / 1e12})
    results.data["copy_bytes_per_second"] = bandwidth(held.setup.device)


def _launches(results: Results, held: Held, modes: tuple[str, ...], name: str) -> None:
    for mode in modes:

        def profiled(mode: str = mode) -> None:
            for row in launches(*held(*held.setup.main), mode, name):
                results.add("launches", {"workload": _name(held.setup.main), "mode": mode} | row)

        results.case(f"launches, {mode}", profiled)


def _settings(results: Results, held: Held) -> None:
    batch, floor = held(*held.setup.main)
    for name, launch in settings(batch.rows, batch.weight.detach(), batch.targets):

        def one(name: str = name, launch: Callable[[], object] = launch) -> None:
            results.add("settings", measure_setting(held.setup, floor, name, launch))

        results.case(f"setting: {name}", one)


def part_heads(setup: Setup, results: Results) -> None:
    """Every head and number of rows but the main one, what matters most first."""
    held, (auto, *others) = Held(setup), names_of_ours(setup.device)
    for rows in setup.rows:
        for head in setup.heads:
            where = (head, rows)
            if where == setup.main:
                continue
            add_steps(results, held, where, (TRAINED, FROZEN, LOGPS), [FLOOR, auto])
            if rows == setup.rows[0]:
                add_steps(results, held, where, (TRAINED,), [*others, *setup.peers[:4]])


def part_memory(setup: Setup, results: Results) -> None:
    """Peaks over numbers of rows, of everybody's first call."""
    held, own, head = Held(setup), names_of_ours(setup.device), setup.main[0]
    for rows in sorted(setup.rows):
        for name in dict.fromkeys((own[0], own[-1], *setup.peers[:4])):
            package = contender(name).needs
            if package is not None and importlib.util.find_spec(package) is None:
                continue
            for mode in (TRAINED, FROZEN):

                def one(rows: int = rows, name: str = name, mode: str = mode) -> None:
                    batch = held.batch_of(head, rows)
                    who = contender(name)
                    loss = LOSSES[who.losses[0]]
                    try:
                        batch.start(mode)
                        who.run(batch, mode, loss)
                        batch.start(mode)
                        free()
                        peak, _ = peak_extra_bytes(lambda: who.run(batch, mode, loss), setup.device)
                    finally:
                        batch.start(mode)
                    row = {"kind": "memory", "series": "rows", "contender": name, "mode": mode}
                    sizes = {"scored_rows": rows, "vocabulary": setup.heads[head][1]}
                    results.add("rows", row | sizes | {"peak_extra_bytes": peak})

                results.case(f"memory, {rows:,} rows, {mode}: {name}", one)


class NothingWorks(AssertionError):
    """Most of a smoke test failed: what else would be measured means nothing."""


def part_smoke(setup: Setup, results: Results | None, tiny: bool = False) -> None:
    """Every engine and mode once, all of them, whatever fails.

    Raises:
        AssertionError: some are wrong; which, and how.
        NothingWorks: more than half are.
    """
    sizes = [Shape(2, 4, 60, hidden=136, vocabulary=1_003)]
    if not tiny:
        sizes.append(Shape(2, 16, setup.completion, hidden=1_024, vocabulary=32_003))
    dtypes = (
        (torch.bfloat16, torch.float32) if tiny else (torch.bfloat16, torch.float16, torch.float32)
    )
    names = names_of_ours(setup.device)[: 3 if tiny else None]
    failed, count = [], 0
    for of in sizes:
        for dtype in dtypes:
            batch = setup.random_batch(of, dtype)
            for name, mode in itertools.product(names, MODES[: 1 if tiny else None]):
                count += 1
                try:
                    said = _smoke(batch, name, mode)
                except Exception as error:  # what the others do tells where to look
                    said = f"FAILED: {error!r}"[:600]
                    failed.append(f"{name}, {dtype}, {mode}, V {of.vocabulary}: {said}")
                print(name, dtype, mode, said, flush=True)
    if failed:
        lines = "\n".join([f"{len(failed)} of {count} failed", *failed])
        raise (NothingWorks if len(failed) > count / 2 else AssertionError)(lines)
    if results is not None:
        results.add("checks", "smoke: every engine, dtype and mode agrees with float64")


def _smoke(batch: Batch, name: str, mode: str) -> dict[str, float]:
    batch.start(mode)
    logps = contender(name).run(batch, mode, LOSSES["dpop"])
    errors = batch.errors(logps, LOSSES["dpop"])
    if not (errors["logp_error_relative"] < 2e-5 and errors.get("dweight_error", 0.0) < 2e-2):
        raise AssertionError(errors)
    return errors


PARTS = {
    "main": part_main,
    "heads": part_heads,
    "sharing": part_sharing,
    "memory": part_memory,
    "smoke": part_smoke,
}
"""By name, as the command line takes them."""
