"""The benchmarks for a GPU, tiny, on a CPU: parts, tables and files, and what fails."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import contenders
from bench.chip import parts, timing
from bench.chip import results as results_of_a_chip
from bench.chip import sharing as sharing_on_a_chip
from bench.chip.command import main as chip_command
from bench.chip.results import Results
from bench.chip.setup import Setup
from bench.contenders import FLOOR
from bench.pairs import Pair
from bench.workloads import MODES, Batch

pytest.importorskip("transformers")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Setup:
    """The chip's bench on a CPU."""
    monkeypatch.setattr(parts, "names_of_ours", lambda _: ["fastdpop eager"])
    monkeypatch.setattr(
        parts, "launches", lambda *_: [{"kernel": "one", "launches": 2, "seconds": 1e-3}]
    )
    monkeypatch.setattr(parts, "settings", lambda *_: iter([("as shipped", lambda: None)]))
    return Setup(
        device="cpu",
        heads={"a tiny head": (16, 300), "another": (8, 200)},
        main=("a tiny head", 64),
        rows=(64, 128),
        completion=16,
        peers=("gather, 16-bit logits", "checkpointed chunks"),
        model={
            "vocab_size": 97,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
        },
        copies={"GSM8K, zero-shot": 1, "ARC-Challenge": 2},
        seconds=0.0,
        repeated=2,
    )


def measured(results: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {(r["workload"], r["mode"], r["contender"]) for r in results["rows"] if "workload" in r}


@pytest.mark.filterwarnings("default")
def test_the_chips_bench_on_a_cpu(tiny: Setup, tmp_path: Path) -> None:
    """Its parts, tables and files, tiny."""
    for part in ("smoke", "main", "heads", "sharing", "memory"):
        parts.PARTS[part](tiny, Results(tmp_path, "cpu"))
    assert {path.name for path in tmp_path.iterdir()} == {"h100.json", "h100.md"}
    results = json.loads((tmp_path / "h100.json").read_text())
    assert not results["left_out"]
    own = (FLOOR, "fastdpop eager")
    peers = ("gather, 16-bit logits", "checkpointed chunks")
    main = "a tiny head, 64 rows"
    assert {case[1:] for case in measured(results) if case[0] == main} == {
        *((mode, name) for mode in MODES for name in own),
        *((mode, name) for mode in MODES[:2] for name in peers),
    }
    others = {"another, 64 rows", "another, 128 rows", "a tiny head, 128 rows"}
    assert {case[0] for case in measured(results)} == {main, *others}
    steps = [row for row in results["rows"] if row["kind"] == "step"]
    assert all(row["seconds"] > 0 and row["tflops"] > 0 for row in steps)
    errors = [r["logp_error_relative"] for r in steps if r["contender"] == own[1]]
    assert max(errors) < 1e-5
    check_sharing(results["sharing"])
    text = (tmp_path / "h100.md").read_text()
    for part in (
        "### a tiny head, 64 rows, bf16, trained head",
        "|    one |        2 | 1.000 |",
        "### Peak extra memory, MiB, over scored rows, bf16",
        "logits.T, contiguous, @ rows",
        "as shipped",
        "smoke: every engine, dtype and mode agrees with float64",
        "fastdpop eager: the same gradients in 2 runs, bit for bit",
        "### A training step with shared prefixes",
        "| ARC-Challenge    | fastdpop, shared |    24 |         3,504 | 2,254 |         602 |",
    ):
        assert part in text, part
    said = results_of_a_chip.summary(results)
    assert "x floor" in said
    assert "x shared" in said


def check_sharing(rows: list[dict[str, Any]]) -> None:
    assert [(row["workload"], row["contender"], row["pairs"]) for row in rows] == [
        ("GSM8K, zero-shot", "fastdpop, shared", 4),
        ("GSM8K, zero-shot", "fastdpop, padded", 4),
        ("ARC-Challenge", "fastdpop, shared", 24),
        ("ARC-Challenge", "fastdpop, padded", 24),
    ]
    for row in rows:
        assert row["rounds"] >= 3
        assert row["tokens_per_second"] == pytest.approx(row["real_tokens"] / row["seconds"], 1e-2)
        assert row["peak_extra_bytes"] > 0
        assert ("to_shared" in row) == row["contender"].endswith("padded")
        assert "mfu" not in row, "a CPU's peak is not known"


def test_sharing_that_does_not_share_fails(tiny: Setup, tmp_path: Path) -> None:
    """A model that falls back on the padded batch, for every workload anew."""
    dropped = dataclasses.replace(tiny, model={**tiny.model, "attention_dropout": 0.1})
    results = Results(tmp_path, "cpu")
    parts.PARTS["sharing"](dropped, results)
    assert not results.data["sharing"]
    assert [line.split(":")[0] for line in results.failed] == list(tiny.copies)
    assert all("drops out attention weights" in line for line in results.failed)


def test_sharing_that_computes_something_else_fails(
    tiny: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = sharing_on_a_chip.Models.step

    def wrong(self: Any, batch: Any, contender: str) -> torch.Tensor:
        return step(self, batch, contender) * (1.01 if contender == "shared" else 1.0)

    monkeypatch.setattr(sharing_on_a_chip.Models, "step", wrong)
    results = Results(tmp_path, "cpu")
    parts.PARTS["sharing"](tiny, results)
    assert [row["contender"] for row in results.data["sharing"]] == ["fastdpop, shared"] * 2
    assert len(results.failed) == 2
    assert all("log-probs of sequences differ by 1.0e-02" in line for line in results.failed)


def test_flop_of_a_step(tiny: Setup) -> None:
    """Those of its matrix products, against what torch counts; those of attention, by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    model = sharing_on_a_chip.Models(tiny).reference
    ids = list(range(3, 33))
    pairs = [Pair([], ids, ids[:1])]
    with FlopCounterMode(display=False) as counted:
        for each in (ids, ids[:1]):
            model(torch.tensor([each]), attention_mask=torch.ones(1, len(each)).long())
    forward = counted.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 2 * 2 * 16 * (30 * 31 + 1 * 2)
    assert sharing_on_a_chip.step_flop(model.config, pairs) == 4 * (forward + attention)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_peak_of_a_card(name: str, peak: float | None) -> None:
    assert sharing_on_a_chip.peak_of(name) == peak


@pytest.mark.filterwarnings("default")
def test_the_chips_bench_keeps_what_it_has(
    tiny: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of one contender is named, the others go on; so is what there was no time for."""
    real = parts.measure_step

    def fail(setup: Setup, batch: Batch, floor: Any, mode: str, name: str) -> Any:
        if name == "fastdpop eager":
            raise torch.OutOfMemoryError("all of it")
        return real(setup, batch, floor, mode, name)

    monkeypatch.setattr(parts, "measure_step", fail)
    results = Results(tmp_path, "cpu")
    parts.part_main(tiny, results)
    first = json.loads((tmp_path / "h100.json").read_text())
    assert len(first["left_out"]) == len(MODES)
    assert all(line.endswith("fastdpop eager: out of memory") for line in first["left_out"])
    assert not results.failed, "where memory does not suffice, nothing is wrong"
    assert (main := measured(first)) >= {("a tiny head, 64 rows", mode, FLOOR) for mode in MODES}
    parts.part_heads(tiny, Results(tmp_path / "rest", "cpu", seconds=-1.0))
    rest = json.loads((tmp_path / "rest" / "h100.json").read_text())
    assert all(line.endswith("no time left") for line in rest["left_out"])
    whole = results_of_a_chip.merged([first, rest])
    assert measured(whole) == main
    assert whole["left_out"] == first["left_out"] + rest["left_out"]


@pytest.mark.filterwarnings("default")
def test_the_smoke_test_can_fail(tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Batch.errors
    monkeypatch.setattr(
        Batch, "errors", lambda *args: right(*args) | {"logp_error_relative": math.nan}
    )
    with pytest.raises(parts.NothingWorks, match=r"2 of 2 failed\nfastdpop eager, torch.bfloat16"):
        parts.part_smoke(tiny, None, tiny=True)


def test_launches_by_kernel() -> None:
    assert timing.product_of("forward_kernel_0d1d") == "forward_kernel"
    assert timing.product_of("nvjet_tst_256x128") is None
    assert timing.is_cublas("nvjet_tst_256x128_64x4_2x1_v_bz_TNT")
    assert timing.is_cublas("sm90_xmma_gemm_bf16f32_bf16f32_f32_nt_n")
    assert not timing.is_cublas("combine_kernel")


@pytest.mark.filterwarnings("default")
def test_what_is_wrong_with_us_fails(
    tiny: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in one of our own cases, or gradients that differ, end in an exit code; a peer's
    error does not.
    """
    real, runs, contender = parts.measure_step, [], timing.contender

    def fail(setup: Setup, batch: Batch, floor: Any, mode: str, name: str) -> Any:
        if name != FLOOR:
            raise RuntimeError("an illegal memory access")
        return real(setup, batch, floor, mode, name)

    def vary(name: str) -> Any:
        who = contender(name)

        def run(batch: Batch, mode: str, loss: Any) -> Any:
            logps = who.run(batch, mode, loss)
            runs.append(name)
            batch.weight.grad.mul_(len(runs))
            return logps

        return dataclasses.replace(who, run=run)

    monkeypatch.setattr(parts, "measure_step", fail)
    monkeypatch.setattr(timing, "contender", vary)
    results = Results(tmp_path, "cpu")
    parts.part_main(tiny, results)
    assert sum("illegal memory access" in line for line in results.failed) == len(MODES)
    assert sum("gradients DIFFER in run 2 of 2" in line for line in results.failed) == 1
    assert all("fastdpop eager" in line for line in results.failed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(contenders, "ours", lambda _: ["fastdpop eager"])
    with pytest.raises(SystemExit, match="failed:"):
        chip_command(["main", "--output", str(tmp_path)], tiny)


def test_the_chips_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, ptxas's among them, as on a GPU; a peer that cannot be imported is no obstacle."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a chip")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    (tmp_path / "liger_kernel.py").write_text("raise OSError('built for something else')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "liger_kernel", raising=False)
    found = results_of_a_chip.machine("cuda")
    assert found["device"] == "a chip"
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["versions"]["ptxas"])
    assert found["versions"]["liger_kernel"].startswith("broken: ")
