"""Reading disassembly: what occupies, what executes, and what runs how often."""

from __future__ import annotations

import pytest

from tools.kernels import disassembly, sass

USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function other:
  REG:24 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function pipelined:
  REG:255 STACK:160 SHARED:1024 LOCAL:8 CONSTANT[0]:1184 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def disassembled(*lines: str, kernel: str = "pipelined") -> str:
    """As nvdisasm prints: labels at the margin, an address before each instruction."""
    body = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    ]
    head = ["\t.target\tsm_90a", f'\t.section\t.text.{kernel},"ax",@progbits', f"{kernel}:"]
    tail = ['\t.section\t.text.other,"ax",@progbits', ".text.other:", "\t/*0000*/  LDL R0, [R1] ;"]
    return "\n".join([*head, f".text.{kernel}:", *body, *tail])


PIPELINED = disassembled(
    "LDC R1, c[0x0][0x28]",
    "@UP0 UTMALDG.2D [UR4], [UR38]",
    ".L_x_0:",  # of every tile
    "CS2R R24, SRZ",
    "@!P3 BRA `(.L_x_3)",
    ".L_x_1:",  # of every step
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10+0x30000], R5",
    "@!P0 BRA `(.L_x_4)",
    ".L_x_2:",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24",
    "UIADD3 UR22, UR7, 0x2, URZ",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "@UP1 UTMALDG.2D [UR8], [UR14]",
    "@!P0 BRA `(.L_x_1)",
    ".L_x_3:",
    "FMUL R5, R24, 1.4426950216293334961",
    "FMNMX R5, R5, R6, !PT",
    "MUFU.EX2 R6, R5",
    "F2FP.BF16.F32.PACK_AB R4, R188, R175",
    "SHFL.BFLY PT, R7, R6, 0x1, 0x1f",
    "STL [R1+0x4], R7",
    "STG.E desc[UR4][R2.64], R6",
    "@!P1 BRA `(.L_x_0)",
    "EXIT",
    ".L_x_4:",  # out of line: spins, and goes back into the loop
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10+0x30000], R5",
    "@!P0 BRA `(.L_x_4)",
    "BRA `(.L_x_2)",
    ".L_x_5:",  # padding that nothing reaches
    "BRA `(.L_x_5)",
)


def test_resources() -> None:
    assert disassembly.resources(USAGE, "pipelined") == (255, 160, 8)
    assert disassembly.resources(USAGE, "other") == disassembly.Resources(
        registers=24, stack=0, local=0
    )
    with pytest.raises(ValueError, match="nothing of kernel 'third'"):
        disassembly.resources(USAGE, "third")


def test_the_main_loop_is_the_innermost_with_products() -> None:
    code = disassembly.read(PIPELINED, "pipelined")
    assert len(code.loops) == 3, "tiles, steps and the wait; going back is not a loop"
    (loop,) = code.main_loops()
    steps = code.once_an_iteration(loop)
    assert [step.name for step in steps if step.kind == "tensor"] == [
        "HGMMA.64x256x16.F32.BF16"
    ] * 2
    assert sass.mix(steps) == {"tensor": 2, "tma load": 1, "wait": 2, "branch": 2, "uniform": 1}


def test_the_rest_is_prologue_and_epilogue() -> None:
    code = disassembly.read(PIPELINED, "pipelined")
    rest = sass.mix(code.beside_the_main_loops())
    assert rest == {
        "tma load": 1,
        "spill": 1,
        "global": 1,
        "shuffle": 1,
        "mufu": 1,
        "convert": 1,
        "fma": 1,
        "branch": 4,  # the last goes back from the wait
        "alu": 3,
    }
    everything = code.instructions()
    assert sass.count(everything, "HGMMA") == 2
    assert sass.count(everything, "UTMALDG.2D") == 2
    assert sass.count(everything, "UTMA") == 0
    assert sass.count(everything, "BRA") == 6, "what nothing reaches is not counted"


def test_an_epilogue_inside_the_only_loop_is_not_part_of_every_step() -> None:
    """As the compiler leaves it where it flattened tiles and steps into one loop."""
    code = disassembly.read(
        disassembled(
            ".L_x_0:",
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0",
            "@P0 BRA `(.L_x_1)",
            "MUFU.EX2 R6, R5",
            ".L_x_1:",
            "@P1 BRA `(.L_x_0)",
            "EXIT",
        ),
        "pipelined",
    )
    (loop,) = code.main_loops()
    assert sass.mix(code.once_an_iteration(loop)) == {"tensor": 1, "branch": 2}
    assert sass.mix(code.beside_the_main_loops()) == {"mufu": 1, "branch": 1}


def test_products_outside_of_loops() -> None:
    code = disassembly.read(disassembled("HMMA.16816.F32.BF16 R4, R8, R2, R4", "EXIT"), "pipelined")
    assert code.main_loops() == []
    assert sass.mix(code.beside_the_main_loops()) == {"tensor": 1, "branch": 1}


def test_the_longest_and_the_shortest_way_past_a_branch() -> None:
    """One of two sides, and an exit before the main loop is no way to be counted."""
    code = disassembly.read(
        disassembled(
            "@P2 EXIT",
            ".L_x_0:",
            "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0",
            "@P1 BRA `(.L_x_0)",
            "@P0 BRA `(.L_x_1)",
            "MUFU.EX2 R6, R5",
            "MUFU.EX2 R7, R5",
            "BRA `(.L_x_2)",
            ".L_x_1:",
            "FADD R6, R5, R5",
            ".L_x_2:",
            "STG.E desc[UR4][R2.64], R6",
            "EXIT",
        ),
        "pipelined",
    )
    longest = sass.mix(code.beside_the_main_loops())
    assert longest == {"global": 1, "mufu": 2, "branch": 4}
    shortest = sass.mix(code.beside_the_main_loops(longest=False))
    assert shortest == {"global": 1, "fma": 1, "branch": 3}


def test_threads_that_part_meet_again() -> None:
    """`BSYNC` out of line goes to where its `BSSY` says."""
    code = disassembly.read(
        disassembled(
            "BSSY B0, `(.L_x_1)",
            "@P0 BRA `(.L_x_2)",
            "BSYNC B0",
            ".L_x_1:",
            "MUFU.EX2 R6, R5",
            "EXIT",
            ".L_x_2:",
            "FADD R6, R5, R5",
            "BSYNC B0",
        ),
        "pipelined",
    )
    assert [step.opcode for step in code.instructions()].count("MUFU") == 1
    assert not code.loops
    everything = sass.mix(code.instructions())
    assert everything == {"mufu": 1, "fma": 1, "branch": 5}


def test_branches_with_a_condition_among_their_operands() -> None:
    code = disassembly.read(
        disassembled("BRA.DIV UR4, `(.L_x_0)", "MUFU.EX2 R6, R5", ".L_x_0:", "@P0 EXIT", "EXIT"),
        "pipelined",
    )
    assert sass.count(code.instructions(), "MUFU") == 1
    assert sass.count(code.instructions(), "EXIT") == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HGMMA.64x256x16.F32.BF16", "tensor"),
        ("UTCHMMA", "tensor"),
        ("HMMA.16816.F32", "tensor"),
        ("DMMA.884", "float64"),
        ("DFMA", "float64"),
        ("DEPBAR.LE", "wait"),
        ("F2F.F64.F32", "float64"),
        ("F2F.F32.F64", "float64"),
        ("F2F.BF16.F32", "convert"),
        ("I2F.F64.U32", "float64"),
        ("F2I.F64.TRUNC", "float64"),
        ("F2I.S64.TRUNC", "convert"),
        ("MUFU.RCP64H", "float64"),
        ("MUFU.RCP", "mufu"),
        ("RED.E.ADD.F64.RN.STRONG.GPU", "float64"),
        ("BRXU", "branch"),
        ("HADD2.BF16_V2", "fma"),
        ("IMAD.MOV.U32", "fma"),
        ("UIMAD", "uniform"),
        ("R2UR", "uniform"),
        ("LDSM.16.MT88.4", "shared"),
        ("LDGSTS.E", "global"),
        ("LDC.64", "alu"),
        ("LDL", "spill"),
        ("LDGDEPBAR", "wait"),
        ("UTMACMDFLUSH", "uniform"),
        ("UTMALDG.2D", "tma load"),
        ("VIADD", "alu"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert sass.Instruction(name, "", "").kind == kind


def products(*steps: str) -> tuple[sass.Code, sass.Loop]:
    """A loop of these, 128 rows by 128 columns."""
    lines = [
        step.replace("HGMMA", "HGMMA.64x128x16.F32.BF16").replace(
            "WAIT", "WARPGROUP.DEPBAR.LE gsb0,"
        )
        for step in steps
    ]
    code = disassembly.read(
        disassembled(".L_x_0:", *lines, "@P1 BRA `(.L_x_0)", "EXIT"), "pipelined"
    )
    return code, code.main_loops()[0]


LAST = "HGMMA R24, gdesc[UR20], R24, gsb0"
GIVEN = "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x8], RZ"


def test_products_in_flight() -> None:
    code = disassembly.read(PIPELINED, "pipelined")
    assert code.in_flight(code.main_loops()[0]) == 1
    for waits, most in ((("WAIT 0x0",), 0), (("WAIT 0x0", "WAIT 0x2"), 2), (("WAIT 0x0",) * 2, 0)):
        code, loop = products(LAST, *waits)
        assert code.in_flight(loop) == most
        assert not code.never_waits(loop)
    code, loop = products("HMMA.16816.F32.BF16 R4, R8, R2, R4")
    assert code.in_flight(loop) is None
    assert not code.never_waits(loop)


def test_loops_that_never_wait() -> None:
    """They may pile up products, unless these lose what they read."""
    code, loop = products(LAST, LAST, "SYNCS.ARRIVE.TRANS64 RZ, [UR4+0x8], R3")
    assert code.in_flight(loop) == 2
    assert not code.never_waits(loop)
    for gives in (GIVEN, "UTMALDG.2D [UR4], [UR38]", "STS.128 [R3], R4", "LDGSTS.E [R3], [R4]"):
        code, loop = products(LAST, gives)
        assert code.never_waits(loop)


def test_shared_memory_that_is_handed_on_early() -> None:
    fence = "BAR.SYNC.DEFER_BLOCKING 0x0"
    code, _ = products(LAST, "WAIT 0x1", fence, GIVEN)
    assert code.handed_on_early() == []
    code, _ = products(LAST, "WAIT 0x1", "@P0 BRA `(.L_x_1)", fence, ".L_x_1:", GIVEN)
    assert [step.name for step in code.handed_on_early()] == ["SYNCS.ARRIVE.TRANS64.A1T0"]
    # Around the loop, to what stands before the wait.
    code, _ = products("UTMALDG.2D [UR4], [UR38]", LAST, "WAIT 0x0")
    assert [step.name for step in code.handed_on_early()] == ["UTMALDG.2D"]
    # An announcement of bytes, and stores by the warps, which may be to any other place.
    code, _ = products(LAST, "WAIT 0x1", "SYNCS.ARRIVE.TRANS64 RZ, [UR4], R3", "STS [R3], R4")
    assert code.handed_on_early() == []


@pytest.mark.parametrize(
    ("steps", "rewritten"),
    [
        # The next step writes what the last one reads.
        (("LDSM.16.MT88.4 R152, [R3]", "HGMMA R24, R152, gdesc[UR20], R24, gsb0", "WAIT 0x1"), 4),
        (("LDSM.16.MT88.4 R152, [R3]", "HGMMA R24, R152, gdesc[UR20], R24, gsb0", "WAIT 0x0"), 0),
        # Two batches that take turns.
        (
            (
                "LDS.64 R152, [R3]",
                "HGMMA R24, R152, gdesc[UR20], R24, gsb0",
                "WAIT 0x1",
                "LDS.64 R156, [R3]",
                "HGMMA R24, R156, gdesc[UR20], R24, gsb0",
                "WAIT 0x1",
            ),
            0,
        ),
        # A batch is under way as soon as it begins.
        (
            (
                "HGMMA R24, R152, gdesc[UR20], R24",
                "SHFL.BFLY PT, R155, R3, 0x1, 0x1f",
                "STS [R153], R154",
                "HGMMA R24, R156, gdesc[UR20], R24, gsb0",
                "WAIT 0x0",
                "IMAD.WIDE R152, R3, R4, R5",
            ),
            1,
        ),
        (("HGMMA R24, gdesc[UR20], R24, gsb0", "WAIT 0x1", "FADD R152, R3, R4"), 0),
    ],
)
def test_operands_that_change_under_a_product(steps: tuple[str, ...], rewritten: int) -> None:
    code, loop = products(*steps)
    assert len(code.rewritten_in_flight(loop)) == rewritten


ROLES = (
    "@P0 BRA `(.L_x_1)",
    "EXIT",
    ".L_x_1:",  # warps come back here for another role
    "LDS.U8 R4, [UR4+0x1]",
    'BRX R4 -0x190                            (*"BRANCH_TARGETS .L_x_2,.L_x_4"*)',
    ".L_x_2:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "@P1 BRA `(.L_x_2)",
    "BRA `(.L_x_1)",
    ".L_x_4:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P1 BRA `(.L_x_4)",
    "BRA `(.L_x_1)",
)


@pytest.mark.parametrize("listed", [True, False])
def test_roles_behind_an_indirect_branch(listed: bool) -> None:
    """Without a list of them, they are the labels that no other branch names."""
    lines = [line if listed else line.split("   ")[0] for line in ROLES]
    if not listed:
        lines = [line.replace("@P1 BRA `(.L_x_2)", "NOP") for line in lines]
        lines = [line.replace("@P1 BRA `(.L_x_4)", "NOP") for line in lines]
    code = disassembly.read(disassembled(*lines), "pipelined")
    assert sass.count(code.instructions(), "HGMMA") == 2
    if listed:
        assert [code.in_flight(loop) for loop in code.main_loops()] == [1, 0]
        assert sass.mix(code.beside_the_main_loops(longest=False))["branch"] == 3


def test_subroutines_are_counted_and_are_no_loops() -> None:
    code = disassembly.read(
        disassembled(
            "CALL.REL.NOINC `($pipelined$__internal_0_$__cuda_sm20_div_rn_f64_full)",
            "MUFU.EX2 R6, R5",
            "CALL.REL.NOINC `($pipelined$__internal_0_$__cuda_sm20_div_rn_f64_full)",
            "EXIT",
            "$pipelined$__internal_0_$__cuda_sm20_div_rn_f64_full:",
            "DFMA R4, R4, R6, R8",
            "CALL.REL.NOINC `($pipelined$__internal_1_$another)",
            "RET.REL.NODEC R4 `(pipelined)",
            "$pipelined$__internal_1_$another:",
            "DADD R4, R4, R6",
            "RET.REL.NODEC R4 `(pipelined)",
        ),
        "pipelined",
    )
    assert sass.mix(code.instructions()) == {"float64": 2, "mufu": 1, "branch": 6}
    assert not code.loops
    assert sass.mix(code.beside_the_main_loops()) == {"mufu": 1, "branch": 3}


LOG = """
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to X
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'pipelined' for 'sm_90a'
ptxas info    : Function properties for pipelined
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
ptxas info    : Function properties for another
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""


def test_messages_of_ptxas() -> None:
    found = disassembly.messages(LOG)
    assert (found.spill_stores, found.spill_loads) == (24, 24)
    assert found.losses == (
        "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to X",
    )
    assert disassembly.messages(LOG.replace("Potential", "No")).losses == ()
    with pytest.raises(ValueError, match="ptxas says nothing of spills: 'gone'"):
        disassembly.messages("gone")


def test_what_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="no code of kernel 'third'"):
        disassembly.read(PIPELINED, "third")
    with pytest.raises(ValueError, match="BRX R2 -0x40 jumps to a place known at run time only"):
        disassembly.read(disassembled("BRX R2 -0x40"), "pipelined")
