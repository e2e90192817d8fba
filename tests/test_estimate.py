"""The estimate's arithmetic, on numbers that can be followed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import h100_estimate as est

pytest.importorskip("triton")

RATE = est.RATES["800"]
CLOCK = RATE / (132 * 4_096)


def entry(name: str = "forward", *, in_flight: int = 1, per_sm: int = 1, **more: Any) -> est.Entry:
    """A product of 128 x 256 x 64: 1,024 cycles of the tensor cores a step."""
    return {
        "name": f"{name}/sm_90a/bf16/128x256x64",
        "target": "sm_90a",
        "num_warps": 8,
        "programs_per_sm": per_sm,
        "constants": {"GROUP_N": 16, "BLOCK_V": 256},
        "products": [{"m": 128, "n": 256, "k": 64, "dtype": "bf16", "precision": "ieee"}],
        "main_loops": [{"mix": {"tensor": 4, "mufu": 10, "fma": 40}, "in_flight": in_flight}],
        "beside": {"mufu": 100, "alu": 500, "wait": 5},
        "beside_least": {"mufu": 100, "alu": 500, "wait": 5},
        "mix": {},
        **more,
    }


def test_issue() -> None:
    """Two warps a scheduler: the busiest kind, or all of them and every barrier."""
    assert est.issue({"mufu": 100, "alu": 500, "wait": 5}, 8) == (2_000, 2_000 + 1_600 + 100)
    assert est.issue({"mufu": 1, "fma": 90, "uniform": 30}, 4) == (121, 8 + 90 + 30)
    assert est.issue({"tensor": 4}, 8) == (0, 0)


def test_a_product_in_whole_waves() -> None:
    """132 tiles of 64 steps: a wave. One tile more: two."""
    work = est.Product(lines=12 * 128, columns=11 * 256, depth=4_096, group=16, result_bytes=0)
    time = est.product_time(entry(), work, RATE)
    assert time.low == pytest.approx(2e-6 + (64 * 1_024 + 2_000) / CLOCK)
    from_l2 = 384 * 64 * 2 * CLOCK * 132 / 8.1e12
    assert from_l2 > 1_024
    assert time.high == pytest.approx(5e-6 + (64 * from_l2 + 3_700 + 1_500) / CLOCK)
    more = est.Product(lines=12 * 128 + 1, columns=11 * 256, depth=4_096, group=16, result_bytes=0)
    assert est.product_time(entry(), more, RATE).low == pytest.approx(2 * time.low - 2e-6)


def test_the_low_end_takes_the_shortest_way() -> None:
    branchy = entry(beside_least={"alu": 10})
    assert est.once(branchy) == (40, 3_700)
    assert est.once(branchy, long_way=0.25) == (40, 0.25 * 3_700 + 0.75 * 40)


def test_nothing_in_flight_adds_up() -> None:
    work = est.Product(lines=128, columns=256, depth=64, group=16, result_bytes=0)
    flying = est.product_time(entry(in_flight=1), work, RATE)
    waiting = est.product_time(entry(in_flight=0), work, RATE)
    assert waiting.low == flying.low
    beside = 2 * (10 * 8 + 40)
    from_l2 = 384 * 64 * 2 * CLOCK * 132 / 8.1e12
    assert waiting.high - flying.high == pytest.approx((1_024 + beside - from_l2) / CLOCK)


def test_two_programs_cover_each_others_epilogue() -> None:
    work = est.Product(lines=12 * 128, columns=22 * 256, depth=640, group=16, result_bytes=0)
    time = est.product_time(entry(per_sm=2), work, RATE)
    assert time.low == pytest.approx(2e-6 + 2 * 10 * 1_024 / CLOCK)


def test_what_an_epilogue_adds_to_is_waited_for() -> None:
    work = est.Product(128, 256, 64, group=16, result_bytes=4)
    added = est.Product(128, 256, 64, group=16, result_bytes=4, added_bytes=4)
    (low, high), (more_low, more_high) = (est.product_time(entry(), w, RATE) for w in (work, added))
    assert more_low - low == pytest.approx(128 * 256 * 4 / 64 / CLOCK)
    assert more_high - high == pytest.approx(128 * 256 * 4 * 132 / est.HBM)


def test_traffic_binds_where_there_is_little_to_compute() -> None:
    work = est.Product(lines=128, columns=132 * 256, depth=64, group=16, result_bytes=100)
    moved = (128 + 132 * 256) * 64 * 2 + 128 * 132 * 256 * 100
    assert est.traffic(work, 128, 256, 1) == moved
    assert est.product_time(entry(), work, RATE).low == pytest.approx(2e-6 + moved / est.HBM)


def test_operands_are_read_again_where_l2_does_not_hold_them() -> None:
    """dHidden: 16 line tiles by 16 columns in two waves; each sums over the whole vocabulary."""
    work = est.Product(lines=2_048, columns=4_096, depth=128_256, group=16, result_bytes=0)
    assert est.traffic(work, 128, 256, 1) == (2 * 2_048 + 4_096) * 128_256 * 2


def test_the_engine_is_asked_for_its_plan() -> None:
    width, vocabulary = est.MODELS["Llama-3-8B"]
    rows = est.plan(8_192, vocabulary, width, 2**29)
    assert rows % 128 == 0
    assert 2**28 < rows * vocabulary * 2 < 2**29, "16-bit numbers fill most of the workspace"
    assert est.plan(8_192, vocabulary, width, 2**32) > 8_192


NAMES = (
    "forward",
    "forward_keep",
    "forward_keep_bias_softcap",
    "dhidden",
    "dlogp_dhidden",
    "dweight",
    "dweight_accumulate",
)


@pytest.fixture
def report() -> est.Entry:
    return {"triton": "0", "ptxas": {"sm_90a": "1"}, "variants": list(map(entry, NAMES))}


def test_more_work_takes_longer(report: est.Entry) -> None:
    kernels = est.Kernels(report)

    def step(mode: str, workspace: int = 2**32, products: str = "cublas") -> est.Range:
        return est.step_time(kernels, "Llama-3-8B", 8_192, mode, RATE, workspace, products)

    logps, frozen, trained = map(step, est.MODES)
    assert logps.low < frozen.low < trained.low
    assert all(time.low <= time.high for time in (logps, frozen, trained))
    # A pair beyond the workspace: the forward product twice.
    assert step("trained head", 2**28).low > trained.low + logps.low
    assert step("trained head", products="kernels") != trained
    floor = 6 * 8_192 * 128_256 * 4_096 / RATE
    assert 1.0 < trained.low / floor < 1.3


def test_missing_variants_are_named(report: est.Entry) -> None:
    report["variants"] = report["variants"][:3]
    with pytest.raises(ValueError, match=r"0 variants of 'dlogp_dhidden', of \['forward', "):
        est.Kernels(report)["dlogp_dhidden"]


def test_goals() -> None:
    def lines(*to_floor: float) -> list[est.Entry]:
        rates = {"800": {"to_floor": list(to_floor)}}
        return [
            {"model": "Qwen3-8B", "rows": 8_192, "mode": mode, "rates": rates} for mode in est.MODES
        ]

    for ends, forward, trained in (
        ((1.0, 1.1), "shown", "shown"),
        ((1.1, 1.22), "shown", "open"),
        ((1.26, 1.3), "missed", "missed"),
    ):
        said = est.goals(lines(*ends), "800")
        assert f"bare products: {forward}" in said[0]
        assert f"bare products: {trained}" in said[1]


def test_as_a_script(report: est.Entry, tmp_path: Path) -> None:
    source = tmp_path / "report.json"
    source.write_text(json.dumps(report))
    script = [sys.executable, est.__file__, str(source), "--output", str(tmp_path)]
    subprocess.run(script, check=True, capture_output=True)
    text = (tmp_path / "h100-estimate.md").read_text()
    assert "nothing was run on a GPU" in text
    assert text.count("| Gemma-2-2B, frozen head | 32,768 |") == len(est.WORKSPACES)
    found = json.loads((tmp_path / "h100-estimate.json").read_text())
    assert found["cycles"]["dhidden"]["tensor"] == 1_024
