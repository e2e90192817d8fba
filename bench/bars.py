"""What fastdpop set out to reach, and whether it did.

The bars in units of the floor were set against products as one writes them. The same limits against
products into memory kept between calls are asked of nobody else, and are printed beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.contenders import FLOOR, FLOOR_AS_WRITTEN, FP32_THROUGHOUT
from bench.workloads import MODES

Row = dict[str, Any]
TRAINED, FROZEN, LOGPS = MODES
GATHER = "gather, fp32 upcast"
MIB = 2**20


class Bar(NamedTuple):
    """`value` must not exceed `limit`; None: not measured."""

    name: str
    value: float | None
    limit: float
    unit: str = "x"

    def __str__(self) -> str:
        verdict, number = "not measured", "-"
        if self.value is not None:
            verdict = "met" if self.value <= self.limit else "NOT MET"
            number = _number(self.value)
        return f"{self.name:<76}{number:>9} <= {_number(self.limit):<7} {self.unit:<4} {verdict}"


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:,.2f}"


def text(results: dict[str, Any]) -> str:
    """One line a bar."""
    return "\n".join(map(str, bars(results)))


def bars(results: dict[str, Any]) -> Iterator[Bar]:
    """All bars, from the results of one run."""
    found = _Results(results)
    ours = results["auto"]
    home = ("gsm8k-like", "bf16")

    for mode, limit in ((TRAINED, 1.0), (FROZEN, 1.0), (LOGPS, 0.8)):
        value = found.ratio(*home, mode, "dpop", ours, FLOOR_AS_WRITTEN, their_loss="")
        yield Bar(f"{FLOOR_AS_WRITTEN}, bf16, {mode}", value, limit)
        yield Bar(f"{FLOOR}, bf16, {mode}", found.step(*home, mode, ours), limit)
    for mode in (TRAINED, FROZEN):
        value = found.ratio(*home, mode, "dpop", ours, GATHER)
        yield Bar(f"{GATHER}, bf16, {mode}", value, 0.7)
    peers = (("Liger", 0.35), ("Liger, compiled", 0.35), ("TRL, as called", 0.2))
    for name, limit in peers:
        value = found.ratio(*home, TRAINED, "dpo", ours, name)
        yield Bar(f"{name}, bf16, {TRAINED}, DPO", value, limit)

    for mode, limit in ((TRAINED, 200.0), (FROZEN, 40.0)):
        value = found.step(*home, mode, ours, what="peak_extra_bytes")
        scaled = None if value is None else value / MIB
        yield Bar(f"peak extra memory, bf16, {mode}", scaled, limit, "MiB")
    for mode in (TRAINED, FROZEN):
        name = f"peak memory beside the gradients over rows, {mode}, against fp32 logits"
        yield Bar(name, found.growth(mode, ours), 0.01)

    yield from _edited(found, ours)
    for trained in ("all weights", "LoRA"):
        fast, stock = (found.trainer(trained, name) for name in ("fastdpop", "TRL"))
        value = None if fast is None else fast["to_trl"]
        yield Bar(f"a training step of TRL's DPOTrainer, {trained}", value, 0.5)
        value = fast["peak_extra_bytes"] / stock["peak_extra_bytes"] if fast and stock else None
        yield Bar(f"its peak extra memory, {trained}", value, 1.0)
    yield Bar("a step through FastDPOTrainer, against a bare loop", found.loop(), 1.03)
    yield from _shared(found)

    for mode, limit in ((TRAINED, 1.0), (FROZEN, 1.0), (LOGPS, 1.0)):
        value = found.step("gsm8k-like", "fp32", mode, ours)
        yield Bar(f"{FLOOR}, fp32, {mode}", value, limit)
    for dtype, limit in (("fp32", 1e-5), ("bf16", 1e-4)):
        value = found.worst(dtype, ours, "logp_error_relative")
        yield Bar(f"relative error of sequence log-probs, {dtype}, worst of all", value, limit, "")
    value = found.gradient(ours, FP32_THROUGHOUT)
    yield Bar("error of dWeight after 128 pairs, bf16, against fp32 throughout", value, 1.5)


def _edited(found: _Results, ours: str) -> Iterator[Bar]:
    """Time on edited pairs against pairs with nothing in common, row for row; at most the share of
    the work that is left, and a tenth for everything else.

    DPOP needs every product on each distinct row once. DPO's derivatives cancel on the rows that a
    pair shares, so that dWeight is left for the others alone; the hidden states of both completions
    still get a gradient.
    """
    for mode, of_weight, products in ((TRAINED, 1, 3), (FROZEN, 0, 2), (LOGPS, 0, 1)):
        for loss in ("dpop", "dpo") if mode != LOGPS else ("dpop",):
            edited = found.row("edited pairs", "bf16", mode, loss, ours)
            value = None
            limit = 1.0
            before = found.row("gsm8k-like", "bf16", mode, loss, ours)
            if edited and before:
                # Floors on the same machine at other times: they take out its mood.
                value = edited["to_floor"] / before["to_floor"]
                distinct = edited["distinct_rows"] / edited["scored_rows"]
                alone = 2 * distinct - 1
                rest = alone if loss == "dpo" else distinct
                limit = 1.1 * ((products - of_weight) * distinct + of_weight * rest) / products
            name = f"edited pairs, bf16, {mode}, {loss.upper()}, against disjoint pairs"
            yield Bar(name, value, limit)


def _shared(found: _Results) -> Iterator[Bar]:
    """A training step with prefixes shared over one without, and over TRL's."""
    limits = {
        "GSM8K, zero-shot": (1.7, 2.5),
        "GSM8K, four-shot": (2.1, 3.5),
        "ARC-Challenge": (4.0, 6.0),
    }
    for workload, (over_padded, over_trl) in limits.items():
        row = found.sharing(workload)
        name = f"shared prefixes, {workload}, against"
        yield Bar(f"{name} padded", row and 1 / row["over_padded"], 1 / over_padded)
        yield Bar(f"{name} TRL's DPOTrainer", row and 1 / row["over_trl"], 1 / over_trl)
        peaks = row and row["peak_extra_bytes"]
        yield Bar(f"{name} TRL's peak extra memory", peaks and peaks["shared"] / peaks["TRL"], 1.0)


class _Results:
    """Look-ups in the rows of a run."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.rows: list[Row] = results["rows"]

    def _all(self, kind: str, **values: str) -> list[Row]:
        of_kind = [row for row in self.rows if row["kind"] == kind]
        return [row for row in of_kind if all(row[k] == v for k, v in values.items())]

    def row(self, workload: str, dtype: str, mode: str, loss: str, contender: str) -> Row | None:
        found = self._all(
            "step", workload=workload, dtype=dtype, mode=mode, loss=loss, contender=contender
        )
        return found[0] if found else None

    def step(
        self, workload: str, dtype: str, mode: str, contender: str, what: str = "to_floor"
    ) -> float | None:
        row = self.row(workload, dtype, mode, "dpop", contender)
        return None if row is None else row[what]

    def ratio(
        self,
        workload: str,
        dtype: str,
        mode: str,
        loss: str,
        ours: str,
        theirs: str,
        their_loss: str | None = None,
    ) -> float | None:
        """Time over time, each in units of the floor as it ran beside."""
        a = self.row(workload, dtype, mode, loss, ours)
        b = self.row(workload, dtype, mode, loss if their_loss is None else their_loss, theirs)
        return a["to_floor"] / b["to_floor"] if a and b else None

    def worst(self, dtype: str, contender: str, what: str) -> float | None:
        rows = self._all("step", dtype=dtype, contender=contender)
        return max((row[what] for row in rows), default=None)

    def growth(self, mode: str, contender: str) -> float | None:
        """How steeply the peak grew over the rows, gradients aside, as a share of how steeply fp32
        logits would have: flat is next to nothing.
        """
        rows = self._all("memory", series="rows", mode=mode, contender=contender)
        if len(rows) < 2:
            return None
        rows.sort(key=lambda row: row["scored_rows"])
        first, last = rows[0], rows[-1]
        beside = [row["peak_extra_bytes"] - row["gradient_bytes"] for row in (first, last)]
        logits = 4 * first["vocabulary"] * (last["scored_rows"] - first["scored_rows"])
        return (beside[1] - beside[0]) / logits

    def trainer(self, trained: str, contender: str) -> Row | None:
        rows = self._all("trainer", trained=trained, contender=contender)
        return rows[0] if rows else None

    def loop(self) -> float | None:
        rows = self._all("loop")
        return rows[0]["to_bare"] if rows else None

    def sharing(self, workload: str) -> Any:
        rows = self._all("sharing", workload=workload)
        return rows[0] if rows else None

    def gradient(self, ours: str, theirs: str) -> float | None:
        a = self._all("gradient", contender=ours)
        b = self._all("gradient", contender=theirs)
        return a[0]["dweight_error"] / b[0]["dweight_error"] if a and b else None
