"""What the instructions of a compiled kernel say: their kinds, its loops, and how products wait.

The *main loop* of a kernel is the innermost one around its matrix instructions; a kernel whose
warps have several roles has several. :mod:`.disassembly` reads the code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

TENSOR = re.compile(r"(?:HGMMA|QGMMA|IGMMA|BGMMA|HMMA|IMMA|DMMA|UTC[A-Z]+MMA)\b")
"""Matrix instructions: of warpgroups (sm_90), of warps (sm_80), of tensor memory (sm_100)."""
WARPGROUP = re.compile(r"(?:HGMMA|QGMMA|IGMMA|BGMMA)\b")
"""Those of warpgroups. They run on by themselves, in batches, until a wait for their batch."""
_WAIT = "WARPGROUP.DEPBAR"

# What gives shared memory away: a load by the memory accelerator, an arrival at a barrier that one
# waits for (those that announce bytes are no A1T0).
_HANDS_ON = re.compile(r"UTMALDG|UBLKCP|SYNCS\.ARRIVE\S*\.A1T0$")
_ALL_WAIT = ("BAR.SYNC", "BAR.RED", "UCGABAR_WAIT")
_FILLS = re.compile(rf"{_HANDS_ON.pattern}|LDGSTS|STS")

_FLOAT64 = re.compile(r"D(?:ADD|MUL|FMA|SETP|MNMX|MMA)\b|\w.*\.F64\b|MUFU\.\w+64H\b")
# By opcode, the first that fits; float64 comes before, as it shows in modifiers too.
_KINDS: tuple[tuple[str, str], ...] = (
    ("tensor", TENSOR.pattern),
    ("tma load", r"UTMALDG|UBLKCP"),
    ("tma store", r"UTMASTG|UTMAREDG|UBLKRED"),
    ("spill", r"LDL|STL"),
    ("shared", r"LDS|LDSM|STS|STSM|ATOMS"),
    ("global", r"LDG|STG|LDGSTS|LD|ST|RED|REDG|ATOM|ATOMG"),
    ("shuffle", r"SHFL|REDUX|MATCH"),
    ("mufu", r"MUFU"),
    ("convert", r"F2FP|F2F|F2I|I2F|I2FP|F2IP|FRND"),
    ("fma", r"FFMA|FADD|FMUL|FFMA2|FADD2|FMUL2|HFMA2|HADD2|HMUL2|IMAD|IMUL"),
    ("wait", r"BAR|SYNCS|WARPGROUP|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|WARPSYNC|ERRBAR|CCTL|NANOSLEEP"),
    ("branch", r"BRA|BRXU?|JMP|JMXU?|EXIT|RET|CALL|BSSY|BSYNC|BREAK|BMOV|YIELD|NOP"),
    ("uniform", r"U[A-Z0-9]+|R2UR|VOTEU|S2UR|REDUX"),
)
_OF_KIND = [(kind, re.compile(rf"(?:{names})$")) for kind, names in _KINDS]
KINDS = ("float64", *(kind for kind, _ in _KINDS), "alu")
"""Kinds of instructions; ``alu`` is what is left: integers, comparisons, selections, moves."""


# HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR20], R24, gsb0: after the accumulator
_LEFT = re.compile(r"R\d+, *R(\d+)\b")
_RESULT = re.compile(r"(?:PT, *)?R(\d+)\b")


class Instruction(NamedTuple):
    """One line of SASS: ``@P0 BRA `(.L_x_1)`` has predicate ``@P0``, name ``BRA``."""

    name: str
    predicate: str
    operands: str

    @property
    def opcode(self) -> str:
        """The name without its modifiers."""
        return self.name.split(".", 1)[0]

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        if _FLOAT64.match(self.name):
            return "float64"
        opcode = self.opcode
        return next((kind for kind, names in _OF_KIND if names.match(opcode)), "alu")

    @property
    def waits_for(self) -> int | None:
        """Of a wait for products: how many batches may be under way when it is over."""
        if not self.name.startswith(_WAIT):
            return None
        return int(self.operands.split(",")[-1], 0)

    @property
    def multiplied(self) -> frozenset[int]:
        """The registers from which a product of warpgroups reads its left operand: none if that is
        in shared memory, otherwise four (64 rows by 32 bytes, shared by 128 threads).
        """
        found = _LEFT.match(self.operands) if WARPGROUP.match(self.name) else None
        return frozenset(range(int(found[1]), int(found[1]) + 4)) if found else frozenset()

    @property
    def written(self) -> frozenset[int]:
        """The registers that get a result, products excepted."""
        found = _RESULT.match(self.operands)
        if found is None or self.kind in ("tensor", "wait", "branch"):
            return frozenset()
        modifiers = self.name.split(".")
        wide = 4 if {"128", "4"} & {*modifiers} else 2 if {"64", "2", "WIDE"} & {*modifiers} else 1
        return frozenset(range(int(found[1]), int(found[1]) + wide))


@dataclass(frozen=True)
class Loop:
    """A natural loop.

    Attributes:
        header: its first block.
        blocks: all of its blocks, those of loops inside it included.
        always: the blocks that every iteration goes through.
    """

    header: int
    blocks: frozenset[int]
    always: frozenset[int]


@dataclass(frozen=True)
class Code:
    """A kernel's reachable blocks, subroutines included, in order of address; where each may go on;
    and its loops.
    """

    blocks: tuple[tuple[Instruction, ...], ...]
    edges: tuple[tuple[int, ...], ...]
    loops: tuple[Loop, ...]

    def instructions(self, blocks: Iterable[int] | None = None) -> list[Instruction]:
        """Those of some blocks, or of all."""
        chosen = range(len(self.blocks)) if blocks is None else sorted(blocks)
        return [instruction for i in chosen for instruction in self.blocks[i]]

    def main_loops(self) -> list[Loop]:
        """The innermost loops around matrix instructions."""
        found: list[Loop] = []
        for i, block in enumerate(self.blocks):
            around = [loop for loop in self.loops if i in loop.blocks]
            if around and any(TENSOR.match(step.name) for step in block):
                innermost = min(around, key=lambda loop: len(loop.blocks))
                if innermost not in found:
                    found.append(innermost)
        return found

    def once_an_iteration(self, loop: Loop) -> list[Instruction]:
        """What every iteration executes, once: neither branches that may be skipped (a persistent
        kernel's epilogue, where the compiler flattened its loops) nor loops inside it (spinning on
        a barrier).
        """
        return self.instructions(loop.always - self._inner(loop))

    def in_flight(self, loop: Loop) -> int | None:
        """How many batches of warpgroup products are still under way after the most patient wait
        of a loop; 0 if all waits are for everything. Of a loop that waits for none: those that an
        iteration starts, or None if it has no such products.
        """
        steps = self.instructions(loop.blocks)
        products = [i for i in steps if WARPGROUP.match(i.name)]
        if not products:
            return None
        waits = [i.waits_for for i in steps if i.waits_for is not None]
        return max(waits) if waits else max(1, sum("gsb" in i.operands for i in products))

    def never_waits(self, loop: Loop) -> bool:
        """Whether a loop hands on shared memory, by filling it or telling another warp to, with
        products under way for which it never waits: nothing keeps these from reading the new.
        """
        steps = self.instructions(loop.blocks)
        return (
            any(WARPGROUP.match(i.name) for i in steps)
            and all(i.waits_for is None for i in steps)
            and any(_FILLS.match(i.name) for i in steps)
        )

    def handed_on_early(self) -> list[Instruction]:
        """What gives shared memory away, by the memory accelerator or a barrier in memory, where
        some way leads to it from a wait for products without a barrier of the warps: the others may
        not have waited yet, and their products still read it.

        Stores to shared memory by the warps themselves are left out: which buffer they write to
        does not show, and it often is none that products read.
        """
        found: dict[tuple[int, int], Instruction] = {}
        for i, block in enumerate(self.blocks):
            waits = [k for k, step in enumerate(block) if step.waits_for is not None]
            left = [(i, k + 1) for k in waits]
            seen: set[int] = set()
            while left:
                j, begin = left.pop()
                for k in range(begin, len(self.blocks[j])):
                    step = self.blocks[j][k]
                    if step.name.startswith(_ALL_WAIT):
                        break
                    if _HANDS_ON.match(step.name):
                        found[j, k] = step
                else:
                    onward = set(self.edges[j]) - seen
                    seen |= onward
                    left += [(o, 0) for o in onward]
        return [found[place] for place in sorted(found)]

    def rewritten_in_flight(self, loop: Loop) -> frozenset[int]:
        """The registers that a loop writes while products that read them may be under way."""
        found: set[int] = set()
        # Batches that are not known to be over; the last is not complete yet.
        batches: list[set[int]] = [set()]
        once = self.instructions(loop.blocks - self._inner(loop))
        for step in (*once, *once):  # again: what is in flight at the end meets the next beginning
            if WARPGROUP.match(step.name):
                batches[-1] |= step.multiplied
                if "gsb" in step.operands:
                    batches.append(set())
            elif (left := step.waits_for) is not None:
                batches = batches[-left - 1 :]
            else:
                found |= step.written.intersection(set().union(*batches))
        return frozenset(found)

    def beside_the_main_loops(self, *, longest: bool = True) -> list[Instruction]:
        """Prologue and epilogue of a tile: everything else, once, on the longest or the shortest
        way from the entry through a main loop (if there is one) to an exit. Waiting loops are left
        out.
        """
        main = {i for loop in self.main_loops() for i in loop.always}
        left_out = set(main)
        for loop in self.loops:
            steps = self.instructions(loop.blocks)
            if all(step.kind in ("wait", "branch", "uniform") for step in steps):
                left_out |= loop.blocks
        way = self._way(main, left_out, longest)
        return self.instructions(set(way) - left_out)

    def _way(self, through: set[int], free: set[int], longest: bool) -> list[int]:
        """The blocks of the longest or shortest way from the entry to an exit that takes no edge
        back, and passes one of `through`; those in `free` count nothing.
        """
        back = {(i, loop.header) for loop in self.loops for i in loop.blocks}
        onward = [[j for j in js if (i, j) not in back] for i, js in enumerate(self.edges)]
        better = max if longest else min
        # best[i, passed]: length and blocks of the best way on from i, its followers known before.
        best: dict[tuple[int, bool], tuple[int, tuple[int, ...]]] = {}
        for i in _followers_first(onward):
            own = 0 if i in free else len(self.blocks[i])
            for passed in (False, True):
                here = passed or not through or i in through
                ways = [best[j, here] for j in onward[i] if (j, here) in best]
                if not onward[i] and here:  # an exit, or the end of a tile
                    ways = [(0, ())]
                if ways:
                    length, rest = better(ways)
                    best[i, passed] = own + length, (i, *rest)
        return list(best[0, False][1]) if (0, False) in best else []

    def _inner(self, loop: Loop) -> frozenset[int]:
        inside = [other.blocks for other in self.loops if other.blocks < loop.blocks]
        return frozenset().union(*inside)


def mix(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many there are of each kind, of those that occur."""
    counts = Counter(instruction.kind for instruction in instructions)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def count(instructions: Iterable[Instruction], name: str) -> int:
    """How many have this opcode, or begin with this name and modifiers."""
    return sum(i.name == name or i.name.startswith(f"{name}.") for i in instructions)


def _followers_first(edges: list[list[int]]) -> list[int]:
    """The blocks that the entry reaches, each after all that can follow it."""
    order: list[int] = []
    seen = {0}
    path = [(0, iter(edges[0]))]
    while path:
        block, rest = path[-1]
        following = next((j for j in rest if j not in seen), None)
        if following is None:
            order.append(block)
            path.pop()
        else:
            seen.add(following)
            path.append((following, iter(edges[following])))
    return order
