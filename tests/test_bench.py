"""The benchmarks' own arithmetic: contenders compute what they claim to, and results are read right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bars, plan, report
from bench.cases import Case, loss_cases
from bench.chip import timing
from bench.contenders import FLOOR, FP32_THROUGHOUT, PEERS, Floor, contender, ours
from bench.memory import peak_extra_bytes
from bench.workloads import LOSSES, MODES, SHAPES, Batch, small
from fastdpop import engines

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


def test_a_chart_of_a_gpus_results(tmp_path: Path) -> None:
    """What bench/h100.sh measured; and nothing is drawn, nor said to be, where there are no times."""
    pytest.importorskip("matplotlib")
    source, picture = Path(report.__file__).parent / "results" / "h200.json", tmp_path / "time.png"
    script = [sys.executable, report.__file__, "--chart", str(picture)]
    subprocess.run([*script, str(source)], check=True)
    assert picture.stat().st_size > 10_000
    picture.unlink()
    nothing = tmp_path / "nothing.json"
    nothing.write_text(json.dumps(json.loads(source.read_text()) | {"rows": []}))
    done = subprocess.run([*script, str(nothing)], capture_output=True, text=True)
    expected = f"{nothing} has no times of a workload that everybody gets\n"
    assert (done.returncode, done.stderr) == (1, expected)
    assert not picture.exists()


def test_a_workspace_in_a_name(batch: Batch) -> None:
    batch.start(MODES[0])
    logps = contender("fastdpop eager in 1024 MiB").run(batch, MODES[0], LOSSES["dpop"])
    assert batch.errors(logps, LOSSES["dpop"])["logp_error_relative"] < 1e-5
    with pytest.raises(ValueError, match="engine is 'warp'"):
        contender("fastdpop warp").run(batch, MODES[0], LOSSES["dpop"])


def test_the_bare_products_of_a_chip(batch: Batch) -> None:
    """Each way forms its product, and the floor takes the fastest."""
    floor = timing.Products(batch)
    assert {name: len(ways) for name, ways in floor.seconds.items()} == {
        "logits": 2,
        "dHidden": 2,
        "dWeight": 2,
    }
    assert floor.flop == 2 * len(batch.rows) * batch.weight.numel()
    floor.run(MODES[0])


KERNELS = [("forward_kernel", 2.0)] * 40 + [("combine_kernel", 0.5)] * 10


def test_the_plan_fits() -> None:
    tests = [
        {"name": "a", "seconds": 8.0, "ended": "", "compiled": ["forward/x", "combine/x"]}
    ] * 20
    said, fits = plan.text(KERNELS, tests)
    assert fits, said
    assert sum(plan.BUDGETS.values()) <= plan.LIMIT < 9.6 * 60
    assert set(plan.FIRST) | {"heads", "sharing", "memory", "sanitizer"} == set(plan.BUDGETS)
    assert "forward_kernel                 40          2.00    80.0" in said
    assert said.splitlines()[-1].endswith("of 570 s: fits")
    # Each of what may be too long is.
    for compiling, own in (
        ([("forward_kernel", 60.0)] * 20, tests),
        (KERNELS, tests * 20),
        (KERNELS, [{**tests[0], "ended": "NameError()"}]),
    ):
        said, fits = plan.text(compiling, own)
        assert not fits
        assert said.splitlines()[-1].endswith("DOES NOT FIT")


def test_the_script_reads_its_budgets_from_the_plan() -> None:
    script = Path(plan.__file__).with_name("h100.sh").read_text()
    told = subprocess.run(
        [sys.executable, plan.__file__, "--budgets"], check=True, capture_output=True, text=True
    ).stdout
    names = dict(pair.split("=") for pair in told.split())
    assert int(names["LIMIT"]) == plan.LIMIT
    for name in names:
        assert f"${name}" in script.replace("${", "$").replace("$(", "$") or f"({name}" in script
    assert (
        subprocess.run(["bash", "-n", str(Path(plan.__file__).with_name("h100.sh"))]).returncode
        == 0
    )


def script(*arguments: str, python: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(Path(plan.__file__).with_name("h100.sh")), *arguments],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )


def test_the_plan_without_its_packages(tmp_path: Path) -> None:
    python = tmp_path / "python"
    hidden = "import runpy, sys; sys.modules.update(triton=None, pytest=None); del sys.argv[0]"
    run = 'runpy.run_path(sys.argv[0], run_name="__main__")'
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{hidden}; {run}' \"$@\"\n")
    python.chmod(0o755)
    done = script("--plan", python=python)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("triton and pytest cannot be imported by ")


def test_the_script_says_what_it_takes() -> None:
    done = script("all", python=sys.executable)
    assert done.returncode == 2
    assert done.stderr == "usage: bench/h100.sh [both | first | rest | --plan]\n"
    done = script("--plan", python="/no/such/python")
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.endswith("PYTHON is '/no/such/python', expected a Python that is there")


def test_tests_are_counted_in_logs_that_are_cut_off(tmp_path: Path) -> None:
    one, two = tmp_path / "1.log", tmp_path / "2.log"
    one.write_text(
        "tests/gpu/test_a.py::test_x[a b-c] PASSED   [ 10%]\n"
        "tests/gpu/test_a.py::test_y FAILED          [ 20%]\n"
        "FAILED tests/gpu/test_a.py::test_y - assert 0\n"
    )
    two.write_text("tests/gpu/test_a.py::test_z SKIPPED (no)\ntests/gpu/test_a.py::test_w ")
    said = plan.count([one, two], tmp_path / "tests.json")
    assert said.splitlines()[0] == "tests/gpu: 1 passed, 1 failed, 1 skipped, 1 not finished"
    found = json.loads((tmp_path / "tests.json").read_text())
    assert found["passed"] == ["tests/gpu/test_a.py::test_x[a b-c]"]
    assert found["not finished"] == ["tests/gpu/test_a.py::test_w"]


def test_what_is_compiled_beforehand_is_what_launches_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the key of Triton's cache."""
    pytest.importorskip("triton")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from tests import launches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_, engine = JITFunction._do_compile, engines.get("triton")
    with launches.recorded() as recording:
        engine.logps(launches.problem(torch.bfloat16, rows=4, groups=[0, 4]), ())
    (own,) = (one for one in recording.compiled if one.kernel == "target_logit_kernel")
    assert plan.compile_one(own) > 0
    before = {path.name for path in tmp_path.iterdir()}
    assert before
    kernel, signature, constants, attrs, options = own.source
    with launches.recorded():
        device = driver.active.get_current_device()
        backend = kernel.device_caches[device][3]
        compile_(
            kernel, "key", signature, device, constants, backend.parse_options(options), attrs, True
        )
    assert {path.name for path in tmp_path.iterdir()} == before
