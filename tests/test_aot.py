"""``fastdpop kernels``: small kernels, good and bad, compiled for targets that are not here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdpop import aot
from fastdpop.cli import main

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache: a variant that several tests compile is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "REGISTRY", "tests.aot_kernels")


def report(out: Path, only: str, *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main(["kernels", "--out", str(out), "--only", only, "--jobs", "1", *more])
    written = json.loads((out / "report.json").read_text())
    assert written["triton"]
    return code, {entry["name"]: entry for entry in written["variants"]}


@pytest.mark.usefixtures("toys")
def test_good_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, entries = report(tmp_path, "[gc]o[op]*")
    assert code == 0
    good = entries["good/128x128"]
    assert good["products"] == [
        {
            "m": 128,
            "n": 128,
            "k": 64,
            "dtype": "bf16",
            "precision": good["products"][0]["precision"],
        }
    ]
    assert (good["stack"], good["local"], good["errors"], good["notes"]) == (0, 0, [], [])
    assert 0 < good["registers"] <= 255
    # Three stages of 128 + 128 rows of 64 bf16, and their barriers.
    assert 0 <= good["shared"] - 3 * (128 + 128) * 64 * 2 < 1024
    assert good["programs_per_sm"] == 2
    (loop,) = good["main_loops"]
    # Two warpgroups share 128 x 128 x 64: four products of 64 x 128 x 16 each.
    assert loop["hgmma"] == 4
    assert loop["tensor"] == ["HGMMA.64x128x16.F32.BF16"]
    assert loop["mix"]["tma load"] == 2
    assert "mufu" not in loop["mix"]
    assert 64 <= good["beside"]["mufu"] < 80, "128 x 128 exponentials, 256 threads"
    assert (tmp_path / good["cubin"]).read_bytes().startswith(b"\x7fELF")
    assert entries["copy"]["main_loops"] == entries["copy"]["products"] == []
    said = capsys.readouterr().out
    assert "2 variants, 0 with errors" in said
    line = next(line for line in said.splitlines() if line.startswith("good/128x128"))
    assert line.split()[1] == "default"
    assert line.endswith("ok")


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("spills/128x256", "bytes of stack"),
        ("thin*", "without HGMMA in its main loop"),
        ("greedy*", "of shared memory, a program may have 232,448"),
    ],
)
def test_bad_variants_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], only: str, message: str
) -> None:
    code, entries = report(tmp_path, only)
    assert code == 1
    (entry,) = entries.values()
    assert message in entry["errors"][0]
    said = capsys.readouterr()
    assert f"error: {entry['name']} (sm_90a): {entry['errors'][0]}" in said.err
    assert "1 variants, 1 with errors" in said.out


@pytest.mark.usefixtures("toys")
def test_what_is_no_default_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, entries = report(tmp_path, "*[/]*[yx]*64*", "--target", "sm_80")
    assert code == 0
    (ampere,) = entries.values()
    assert ampere["hgmma"] == 0
    assert ampere["mix"]["tensor"] > 0
    code, entries = report(tmp_path, "spills/by choice")
    assert code == 0
    assert "bytes of stack" in entries["spills/by choice"]["notes"][0]
    assert "note: spills/by choice" in capsys.readouterr().out


def test_programs_per_sm() -> None:
    h100 = aot.chip("sm_90a")
    assert h100.programs_per_sm(registers=255, shared=0, warps=8) == 1
    assert h100.programs_per_sm(registers=128, shared=0, warps=8) == 2
    assert h100.programs_per_sm(registers=129, shared=0, warps=8) == 1, "granted by eight"
    assert h100.programs_per_sm(registers=32, shared=115_000, warps=4) == 2
    assert h100.programs_per_sm(registers=32, shared=116_000, warps=4) == 1
    assert h100.programs_per_sm(registers=16, shared=0, warps=1) == 32
    assert h100.programs_per_sm(registers=24, shared=0, warps=4) == 16
    assert h100.programs_per_sm(registers=24, shared=240_000, warps=4) == 0


def test_products() -> None:
    ttir = """
    %a = tt.dot %x, %y#1, %z, inputPrecision = tf32x3 : tensor<64x32xf32> * tensor<32x16xf32> -> ...
    %b = tt.dot %x, %y, %z : tensor<128x64xbf16> * tensor<64x256xbf16> -> tensor<128x256xf32>
    """
    assert aot.products(ttir) == [
        {"m": 64, "n": 16, "k": 32, "dtype": "f32", "precision": "tf32x3"},
        {"m": 128, "n": 256, "k": 64, "dtype": "bf16", "precision": "ieee"},
    ]


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--target", "sm_75"), "target is 'sm_75', expected one of ['sm_100', 'sm_80', 'sm_90a']"),
        (("--only", "nothing"), "no kernel variant for target 'sm_90a' matches 'nothing'"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(["kernels", "--out", str(tmp_path), *more]) == 1
    assert f"fastdpop: error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("toys")
def test_the_interpreter_compiles_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--out", str(tmp_path)]) == 1
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_without_triton(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["kernels", "--out", str(tmp_path)]) == 1
    assert "needs triton: pip install 'fastdpop[triton]'" in capsys.readouterr().err


def test_without_the_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(OSError, match="cuobjdump is missing: this triton was built without"):
        aot._tool("cuobjdump", "-res-usage", "nothing")
    fails = tmp_path / "backends" / "nvidia" / "bin" / "cuobjdump"
    fails.parent.mkdir(parents=True)
    shutil.copy(shutil.which("false") or "/bin/false", fails)
    with pytest.raises(OSError, match="cuobjdump failed with 1"):
        aot._tool("cuobjdump", "-res-usage", "nothing")
