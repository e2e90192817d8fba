"""``python -m tools.kernels``: small kernels, good and bad, compiled for targets that are not here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tools.test_sass import disassembled
from tools.kernels import compiler, disassembly, gate, report, sass
from tools.kernels.chips import chip
from tools.kernels.command import main

pytest.importorskip("triton")

from tests.tools import toy_kernels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache: a variant that several tests compile is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def run(out: Path, *arguments: str) -> int:
    return main(["--out", str(out), *arguments], toy_kernels.variants)


def compiled(
    out: Path, only: str, *more: str, jobs: int = 1
) -> tuple[int, dict[str, dict[str, Any]]]:
    code = run(out, "--only", only, "--jobs", str(jobs), *more)
    written = json.loads((out / "report.json").read_text())
    assert written["triton"]
    assert all(version[0].isdigit() for version in written["ptxas"].values())
    return code, {entry["name"]: entry for entry in written["variants"]}


@pytest.mark.usefixtures("toys")
def test_good_variants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, entries = compiled(tmp_path, "[gc]o[op]*[8y]")
    assert code == 0
    for entry in entries.values():
        assert entry["errors"] == entry["losses"] == []
        assert entry["spill_stores"] == entry["spill_loads"] == entry["from_registers"] == 0
        assert "float64" not in entry["mix"]
        assert all(loop["in_flight"] == 1 for loop in entry["main_loops"])
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
    assert (good["stack"], good["local"]) == (0, 0)
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
    assert said.splitlines()[0].endswith(f", ptxas {good['ptxas']} for sm_90a")
    line = next(line for line in said.splitlines() if line.startswith("good/128x128"))
    assert line.split()[1] == "default"
    assert line.endswith("ok")


FLIGHT = "keeps nothing in flight: every wait of a main loop is for all of its products"
REGISTERS = "4 of 4 HGMMA take their left operand from registers"


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("only", "messages"),
    [
        ("spills/*", ["bytes of stack", "insufficient register resources", FLIGHT]),
        ("thin*", ["without HGMMA in its main loop"]),
        ("greedy*", ["of shared memory, a program may have 232,448"]),
        ("decaying*", [FLIGHT]),
        ("scaled*", ["wgmma.mma_async instructions are serialized", FLIGHT, REGISTERS]),
        ("turned*", [REGISTERS]),
        ("precise", ["computes in float64, which it does not mean to: "]),
    ],
)
def test_bad_variants_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], only: str, messages: list[str]
) -> None:
    code, entries = compiled(tmp_path, only)
    assert code == 1
    (entry,) = entries.values()
    said = capsys.readouterr()
    for error, message in zip(entry["errors"], messages, strict=True):
        assert message in error
        assert f"error: {entry['name']} (sm_90a): {error}" in said.err
    assert "1 variants, 1 with errors" in said.out


@pytest.mark.usefixtures("toys")
def test_warps_in_roles(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A Gluon kernel: its roles are reached by an indirect branch, and each has a main loop."""
    code, entries = compiled(tmp_path, "*roles*", jobs=2)
    assert code == 1
    assert "leaked" not in capfd.readouterr().err, "triton reports what Gluon leaves behind"
    good, bad = entries["good/roles"], entries["roles/in step"]
    half = {"m": 64, "n": 128, "k": 64, "dtype": "bf16", "precision": "ieee"}
    assert good["products"] == [half, half]
    assert good["errors"] == good["losses"] == []
    assert [loop["in_flight"] for loop in good["main_loops"]] == [1, 1]
    assert [loop["hgmma"] for loop in good["main_loops"]] == [4, 4]
    assert good["utmaldg"] == 2
    assert good["programs_per_sm"] == 1, "12 warps of 128 registers"
    assert sorted(loop["in_flight"] for loop in bad["main_loops"]) == [0, 1]
    (error,) = bad["errors"]
    assert FLIGHT in error


@pytest.mark.usefixtures("toys")
def test_what_a_variant_declares(tmp_path: Path) -> None:
    code, entries = compiled(tmp_path, "allowed*")
    assert code == 0, {name: entry["errors"] for name, entry in entries.items()}
    rare, precise = entries["allowed/16x64"], entries["allowed/float64"]
    assert rare["hgmma"] == 0
    assert rare["mix"]["tensor"] > 0
    assert precise["mix"]["float64"] > 50
    assert precise["float64_names"]["DFMA"] > 8, "with those of its subroutine"


@pytest.mark.usefixtures("toys")
def test_other_targets(tmp_path: Path) -> None:
    code, entries = compiled(tmp_path, "ampere*", "--target", "sm_80")
    assert code == 1
    fine, spills = entries["ampere/64x64"], entries["ampere spills/64x64"]
    assert fine["errors"] == []
    assert fine["hgmma"] == 0
    assert fine["mix"]["tensor"] > 0
    (error,) = spills["errors"]
    assert f"{spills['spill_stores']} stored" in error
    assert spills["spill_stores"] > 0, "what is no default must not spill either"


@pytest.mark.usefixtures("toys")
def test_barriers_and_waits_that_are_missing(tmp_path: Path) -> None:
    """Taken out of good code, they are missed."""
    _, entries = compiled(tmp_path, "good*")
    for entry in entries.values():
        text = compiler.tool("nvdisasm", "-c", str(tmp_path / entry["cubin"]))

        def judged(without: str, text: str = text, entry: dict[str, Any] = entry) -> list[str]:
            kept = "\n".join(line for line in text.splitlines() if without not in line)
            return errors(entry, disassembly.read(kept, entry["kernel"]))

        assert judged("nothing") == []
        (early,) = judged(" BAR.SYNC")
        assert "before a barrier of the warps that may not have waited yet: " in early
        endless = judged("WARPGROUP.DEPBAR")
        assert all("never waits for the products that read it (4 HGMMA)" in e for e in endless)
        assert len(endless) == len(entry["main_loops"])


def errors(entry: dict[str, Any], code: sass.Code) -> list[str]:
    """Of a variant, if this were its code."""
    found: list[str] = gate.judge({**entry, **report.read_code(code)})["errors"]
    return found


FINE = {
    "target": "sm_90a",
    "gluon": False,
    "float64": False,
    "warpgroup": True,
    "products": [{"m": 128, "n": 128, "k": 64, "dtype": "bf16", "precision": "ieee"}],
    "losses": [],
    "registers": 128,
    "shared": 1_024,
    **dict.fromkeys(("stack", "local", "spill_stores", "spill_loads"), 0),
}


def loop(*steps: str) -> sass.Code:
    lines = (".L_x_0:", *steps, "@P0 BRA `(.L_x_0)", "EXIT")
    return disassembly.read(disassembled(*lines), "pipelined")


SHARED = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0"
HELD = "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR20], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@pytest.mark.parametrize(
    ("steps", "messages"),
    [
        ((SHARED, WAIT), []),
        ((SHARED, WAIT, SHARED, "WARPGROUP.DEPBAR.LE gsb0, 0x0"), []),
        ((SHARED, SHARED), []),
        (
            (HELD, WAIT, "F2FP.BF16.F32.PACK_AB R153, R5, R6"),
            ["1 of 1 HGMMA take their left operand from registers, 1 of which are written again"],
        ),
        (
            (HELD, WAIT, "F2FP.BF16.F32.PACK_AB R156, R5, R6"),
            ["1 of 1 HGMMA take their left operand from registers (none is seen to be written"],
        ),
        (
            (SHARED, WAIT, "HMMA.16816.F32.BF16 R4, R8, R2, R4"),
            ["multiplies matrices in a main loop with HMMA.16816.F32.BF16 too"],
        ),
        (("HMMA.16816.F32.BF16 R4, R8, R2, R4",), ["without HGMMA in its main loop"]),
        ((SHARED, WAIT, "DMUL R4, R4, R6"), ["computes in float64, which it does not mean to"]),
        ((SHARED, WAIT, "STL [R1], R7"), ["1 instructions, at 128 registers"]),
    ],
)
def test_verdicts(steps: tuple[str, ...], messages: list[str]) -> None:
    found = errors(FINE, loop(*steps))
    for error, message in zip(found, messages, strict=True):
        assert message in error
    ampere = errors({**FINE, "target": "sm_80"}, loop(*steps))
    assert ampere == [e for e in found if "float64" in e or "spills" in e]


def test_what_ptxas_says_is_judged() -> None:
    loss = "(C7508) Potential Performance Loss: 'setmaxnreg' ignored"
    spills = {**FINE, "losses": [loss], "spill_loads": 4}
    assert errors(spills, loop(SHARED, WAIT)) == [
        "spills: 0 bytes of stack, 0 of local memory, 0 stored and 4 loaded by 0 instructions, at "
        "128 registers",
        f"ptxas says {loss}",
    ]


def test_programs_per_sm() -> None:
    h100 = chip("sm_90a")
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
    assert report.products(ttir) == [
        {"m": 64, "n": 16, "k": 32, "dtype": "f32", "precision": "tf32x3"},
        {"m": 128, "n": 256, "k": 64, "dtype": "bf16", "precision": "ieee"},
    ]
    ttgir = """
    %c = ttng.warp_group_dot %a, %b, %z, %p {inputPrecision = 0 : i32, isAsync = true} : \\
!ttg.memdesc<64x32xbf16, #shared, #smem, mutable> * !ttg.memdesc<32x256xbf16, #shared2, #smem> -> ...
    %d = ttng.warp_group_dot %x, %y, %z : tensor<64x8xf32, #dot> * !ttg.memdesc<8x16xf32, #s> -> ...
    %e = ttng.warp_group_dot_wait %d {pendings = 1 : i32} : tensor<64x16xf32, #mma>
    """
    assert report.products(ttgir.replace("\\\n", "")) == [
        {"m": 64, "n": 256, "k": 32, "dtype": "bf16", "precision": "ieee"},
        {"m": 64, "n": 16, "k": 8, "dtype": "f32", "precision": "tf32"},
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
    assert run(tmp_path, *more) == 1
    assert f"tools.kernels: error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("toys")
def test_as_a_module() -> None:
    """Of a checkout, with the registry's variants."""
    command = [sys.executable, "-m", "tools.kernels", "--out", "/dev/null", "--only", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: no kernel variant for target 'sm_90a' matches 'nothing'" in done.stderr


@pytest.mark.usefixtures("toys")
def test_the_interpreter_compiles_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(tmp_path) == 1
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_without_triton(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert run(tmp_path) == 1
    assert "needs triton: pip install 'triton>=3.6' (Linux)" in capsys.readouterr().err


def test_without_the_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(OSError, match="cuobjdump is missing: this triton was built without"):
        compiler.tool("cuobjdump", "-res-usage", "nothing")
    fails = tmp_path / "backends" / "nvidia" / "bin" / "cuobjdump"
    fails.parent.mkdir(parents=True)
    shutil.copy(shutil.which("false") or "/bin/false", fails)
    with pytest.raises(OSError, match="cuobjdump failed with 1"):
        compiler.tool("cuobjdump", "-res-usage", "nothing")
