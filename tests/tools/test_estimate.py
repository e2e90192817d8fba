"""The estimate's arithmetic, on numbers that can be followed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tools.kernels import estimate, h100
from tools.kernels.report import Entry

ROOT = Path(__file__).parents[2]
RATE = h100.RATES["800"]
CLOCK = RATE / (132 * 4_096)


def entry(name: str = "forward", *, in_flight: int = 1, per_sm: int = 1, **more: Any) -> Entry:
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
    assert h100.issue({"mufu": 100, "alu": 500, "wait": 5}, 8) == (2_000, 2_000 + 1_600 + 100)
    assert h100.issue({"mufu": 1, "fma": 90, "uniform": 30}, 4) == (121, 8 + 90 + 30)
    assert h100.issue({"tensor": 4}, 8) == (0, 0)


def test_a_product_in_whole_waves() -> None:
    """132 tiles of 64 steps: a wave. One tile more: two."""
    work = h100.Product(lines=12 * 128, columns=11 * 256, depth=4_096, group=16, result_bytes=0)
    time = h100.product_time(entry(), work, RATE)
    assert time.low == pytest.approx(2e-6 + (64 * 1_024 + 2_000) / CLOCK)
    from_l2 = 384 * 64 * 2 * CLOCK * 132 / 8.1e12
    assert from_l2 > 1_024
    assert time.high == pytest.approx(5e-6 + (64 * from_l2 + 3_700 + 1_500) / CLOCK)
    more = h100.Product(lines=12 * 128 + 1, columns=11 * 256, depth=4_096, group=16, result_bytes=0)
    assert h100.product_time(entry(), more, RATE).low == pytest.approx(2 * time.low - 2e-6)


def test_the_low_end_takes_the_shortest_way() -> None:
    branchy = entry(beside_least={"alu": 10})
    assert h100.once(branchy) == (40, 3_700)
    assert h100.once(branchy, long_way=0.25) == (40, 0.25 * 3_700 + 0.75 * 40)


def test_nothing_in_flight_adds_up() -> None:
    work = h100.Product(lines=128, columns=256, depth=64, group=16, result_bytes=0)
    flying = h100.product_time(entry(in_flight=1), work, RATE)
    waiting = h100.product_time(entry(in_flight=0), work, RATE)
    assert waiting.low == flying.low
    beside = 2 * (10 * 8 + 40)
    from_l2 = 384 * 64 * 2 * CLOCK * 132 / 8.1e12
    assert waiting.high - flying.high == pytest.approx((1_024 + beside - from_l2) / CLOCK)


def test_two_programs_cover_each_others_epilogue() -> None:
    work = h100.Product(lines=12 * 128, columns=22 * 256, depth=640, group=16, result_bytes=0)
    time = h100.product_time(entry(per_sm=2), work, RATE)
    assert time.low == pytest.approx(2e-6 + 2 * 10 * 1_024 / CLOCK)


def test_what_an_epilogue_adds_to_is_waited_for() -> None:
    work = h100.Product(128, 256, 64, group=16, result_bytes=4)
    added = h100.Product(128, 256, 64, group=16, result_bytes=4, added_bytes=4)
    (low, high), (more_low, more_high) = (
        h100.product_time(entry(), w, RATE) for w in (work, added)
    )
    assert more_low - low == pytest.approx(128 * 256 * 4 / 64 / CLOCK)
    assert more_high - high == pytest.approx(128 * 256 * 4 * 132 / h100.HBM)


def test_traffic_binds_where_there_is_little_to_compute() -> None:
    work = h100.Product(lines=128, columns=132 * 256, depth=64, group=16, result_bytes=100)
    moved = (128 + 132 * 256) * 64 * 2 + 128 * 132 * 256 * 100
    assert h100.traffic(work, 128, 256, 1) == moved
    assert h100.product_time(entry(), work, RATE).low == pytest.approx(2e-6 + moved / h100.HBM)


def test_operands_are_read_again_where_l2_does_not_hold_them() -> None:
    """dHidden: 16 line tiles by 16 columns in two waves; each sums over the whole vocabulary."""
    work = h100.Product(lines=2_048, columns=4_096, depth=128_256, group=16, result_bytes=0)
    assert h100.traffic(work, 128, 256, 1) == (2 * 2_048 + 4_096) * 128_256 * 2


def test_the_engine_is_asked_for_its_plan() -> None:
    width, vocabulary = estimate.MODELS["Llama-3-8B"]
    rows = estimate.plan(8_192, vocabulary, width, 2**29)
    assert rows % 128 == 0
    assert 2**28 < rows * vocabulary * 2 < 2**29, "16-bit numbers fill most of the workspace"
    assert estimate.plan(8_192, vocabulary, width, 2**32) > 8_192


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
def report() -> Entry:
    return {"triton": "0", "ptxas": {"sm_90a": "1"}, "variants": list(map(entry, NAMES))}


def test_more_work_takes_longer(report: Entry) -> None:
    kernels = estimate.Kernels(report)

    def step(mode: str, workspace: int = 2**32, products: str = "cublas") -> h100.Range:
        return estimate.step_time(kernels, "Llama-3-8B", 8_192, mode, RATE, workspace, products)

    logps, frozen, trained = map(step, estimate.MODES)
    assert logps.low < frozen.low < trained.low
    assert all(time.low <= time.high for time in (logps, frozen, trained))
    # A pair beyond the workspace: the forward product twice.
    assert step("trained head", 2**28).low > trained.low + logps.low
    assert step("trained head", products="kernels") != trained
    floor = 6 * 8_192 * 128_256 * 4_096 / RATE
    assert 1.0 < trained.low / floor < 1.3


def test_missing_variants_are_named(report: Entry) -> None:
    report["variants"] = report["variants"][:3]
    with pytest.raises(ValueError, match=r"0 variants of 'dlogp_dhidden', of \['forward', "):
        estimate.Kernels(report)["dlogp_dhidden"]


def test_goals() -> None:
    def lines(*to_floor: float) -> list[Entry]:
        rates = {"800": {"to_floor": list(to_floor)}}
        return [
            {"model": "Qwen3-8B", "rows": 8_192, "mode": mode, "rates": rates}
            for mode in estimate.MODES
        ]

    for ends, forward, trained in (
        ((1.0, 1.1), "shown", "shown"),
        ((1.1, 1.22), "shown", "open"),
        ((1.26, 1.3), "missed", "missed"),
    ):
        said = estimate.goals(lines(*ends), "800")
        assert f"bare products: {forward}" in said[0]
        assert f"bare products: {trained}" in said[1]


def test_as_a_script(report: Entry, tmp_path: Path) -> None:
    source = tmp_path / "report.json"
    source.write_text(json.dumps(report))
    script = [sys.executable, "-m", "tools.kernels.estimate", str(source)]
    subprocess.run([*script, "--output", str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    text = (tmp_path / "h100-estimate.md").read_text()
    assert "nothing was run on a GPU" in text
    assert text.count("| Gemma-2-2B, frozen head | 32,768 |") == len(estimate.WORKSPACES)
    found = json.loads((tmp_path / "h100-estimate.json").read_text())
    assert found["cycles"]["dhidden"]["tensor"] == 1_024
