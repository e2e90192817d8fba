"""The benchmarks' own arithmetic: contenders compute what they claim to, and results are read right."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bars, chip, report
from bench.cases import Case, loss_cases
from bench.contenders import FLOOR, FP32_THROUGHOUT, PEERS, Floor, contender, ours
from bench.memory import peak_extra_bytes
from bench.workloads import LOSSES, MODES, SHAPES, Batch, small

NAMES = [FP32_THROUGHOUT, *(n for n, c in PEERS.items() if not c.compiles), *ours("cpu")]


@pytest.fixture(scope="module", params=["gsm8k-like", "edited pairs"])
def batch(request: pytest.FixtureRequest) -> Batch:
    return Batch.random(small(SHAPES[request.param]), torch.float32, "cpu")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NAMES)
def test_contenders_agree_with_float64(name: str, batch: Batch) -> None:
    who = contender(name)
    if who.needs and importlib.util.find_spec(who.needs) is None:
        pytest.skip(f"needs {who.needs}")
    for mode in MODES:
        for loss in map(LOSSES.__getitem__, who.losses):
            batch.start(mode)
            errors = batch.errors(who.run(batch, mode, loss), loss)
            assert (batch.hidden.grad is not None) == (mode != MODES[2])
            assert ("dweight_error" in errors) == (mode == MODES[0])
            assert errors["logp_error_relative"] < 1e-5
            assert errors.get("dweight_error", 0.0) < 1e-4


def test_edited_pairs_share_their_first_rows(batch: Batch) -> None:
    seen = {(*hidden.tolist(), int(y)) for hidden, y in zip(batch.rows, batch.targets, strict=True)}
    assert len(seen) == len(batch.rows) - batch.repeated
    shares = batch.repeated / len(batch.rows)
    assert shares == 0 or 0.25 < shares < 0.35


def test_the_floor_computes_the_products(batch: Batch) -> None:
    floor = Floor(batch)
    floor.run(MODES[0])
    logits = batch.rows @ batch.weight.detach().T
    torch.testing.assert_close(floor.logits.T, logits)
    torch.testing.assert_close(floor.hidden_gradient, logits @ batch.weight.detach())
    torch.testing.assert_close(floor.weight_gradient, logits.T @ batch.rows, atol=1e-3, rtol=1e-4)


def test_peak_memory_counts_temporaries_and_results() -> None:
    mebi = 2**20

    def call() -> torch.Tensor:
        return torch.zeros(4 * mebi).add(1.0)[:1].clone()

    peak, _ = peak_extra_bytes(call, "cpu")
    assert 32 * mebi <= peak < 33 * mebi


def test_every_case_names_its_floor_first() -> None:
    floors = set()
    for case in loss_cases("cpu"):
        group = (case.workload, case.dtype, case.mode)
        if case.contender == FLOOR:
            floors.add(group)
        assert group in floors


@pytest.fixture
def results() -> dict[str, Any]:
    def step(case: Case, to_floor: float) -> dict[str, Any]:
        rows = {"scored_rows": 90, "distinct_rows": 60 if case.workload == "edited pairs" else 90}
        numbers = {"seconds": to_floor, "to_floor": to_floor, "peak_extra_bytes": 150 * 2**20}
        errors = {"logp_error_nat": 1e-3, "logp_error_relative": 2e-5, "dweight_error": 1e-3}
        return {"kind": "step", **case._asdict(), **rows, **numbers, **errors}

    speed = {"fastdpop cpu": 0.9, "gather, fp32 upcast": 1.2}
    machine = {"device": "cpu", "cpu": "A CPU", "capability": "AVX2", "threads": 2, "date": "2026"}
    facts = {"malloc": "default", "quick": False, "versions": {"torch": "2.13"}}
    rows = [step(case, speed.get(case.contender, 2.0)) for case in loss_cases("cpu")]
    return {**machine, **facts, "auto": "fastdpop cpu", "rows": rows}


def test_bars(results: dict[str, Any]) -> None:
    found = {bar.name: bar for bar in bars.bars(results)}
    trained = "bf16, trained head"
    assert found[f"bare products, {trained}"].value == 0.9
    assert found[f"gather, fp32 upcast, {trained}"].value == pytest.approx(0.75)
    assert "NOT MET" in str(found[f"gather, fp32 upcast, {trained}"])
    assert str(found[f"peak extra memory, {trained}"]).endswith(" met")
    assert found["relative error of sequence log-probs, bf16, worst of all"].value == 2e-5
    of_edited = found[f"edited pairs, {trained}, DPO, against disjoint pairs"]
    assert of_edited.value == 1.0
    assert of_edited.limit == pytest.approx(1.1 * (4 * 2 / 3 + 2 * 1 / 3) / 6)
    after_128 = "error of dWeight after 128 pairs, bf16, against fp32 throughout"
    assert str(found[after_128]).endswith("not measured")


def test_report_as_a_script(results: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results))
    script = [sys.executable, report.__file__, str(source)]
    printed = subprocess.run([*script, "--bars"], check=True, capture_output=True, text=True)
    assert "A CPU (AVX2), 2 threads, default malloc; torch 2.13; 2026" in printed.stdout
    pytest.importorskip("matplotlib")
    subprocess.run([*script, "--output", str(tmp_path)], check=True)
    kept = json.loads((tmp_path / "cpu-default-malloc.json").read_text())
    assert kept == results
    assert "### gsm8k-like, bf16, trained head" in (tmp_path / "cpu-default-malloc.md").read_text()
    assert (tmp_path / "cpu-default-malloc-time.png").stat().st_size > 10_000


def test_a_workspace_in_a_name(batch: Batch) -> None:
    batch.start(MODES[0])
    logps = contender("fastdpop eager in 1024 MiB").run(batch, MODES[0], LOSSES["dpop"])
    assert batch.errors(logps, LOSSES["dpop"])["logp_error_relative"] < 1e-5
    with pytest.raises(ValueError, match="engine is 'warp'"):
        contender("fastdpop warp").run(batch, MODES[0], LOSSES["dpop"])


@pytest.mark.filterwarnings("default")
def test_the_chips_bench_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cases, order and tables, tiny: an error of one contender is named, the others go on."""
    monkeypatch.setattr(chip, "DEVICE", "cpu")
    monkeypatch.setattr(chip, "HEADS", {"a tiny head": (16, 300)})
    monkeypatch.setattr(chip, "ROWS", (64, 32_768))
    monkeypatch.setattr(chip, "COMPLETION", 16)
    monkeypatch.setattr(chip, "SECONDS_A_CASE", 0.0)
    monkeypatch.setattr(chip, "PEERS", ("gather, 16-bit logits", "nobody"))
    names = [FLOOR, "fastdpop eager"]
    monkeypatch.setattr(chip, "names_of_ours", lambda: names[1:])
    monkeypatch.setattr(
        chip, "launches", lambda *_: [{"kernel": "one", "launches": 2, "seconds": 1e-3}]
    )
    everything = list(chip.cases())
    assert [case[1] for case in everything] == sorted(case[1] for case in everything)
    monkeypatch.setattr(chip, "cases", lambda: [c for c in everything if c[3] != "nobody"][:8])
    results = chip.run(60.0)
    measured = {(row["mode"], row["contender"]) for row in results["rows"]}
    assert measured == {
        *((mode, name) for mode in MODES for name in names),
        *((mode, "gather, 16-bit logits") for mode in MODES[:2]),
    }
    assert all(row["seconds"] > 0 and row["scored_rows"] == 64 for row in results["rows"])
    assert not results["left_out"]
    text = chip.text(results)
    assert "### a tiny head, 64 rows, bf16, trained head" in text
    assert "| one | 2 | 1.000 |" in text

    def fail(*_: object) -> Any:
        raise torch.OutOfMemoryError("all of it")

    monkeypatch.setattr(chip, "measure", fail)
    assert all("out of memory" in line for line in chip.run(60.0)["left_out"])
    assert all("no time left" in line for line in chip.run(-1.0)["left_out"])
