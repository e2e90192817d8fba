"""The output of NVIDIA's tools: what a program occupies, what ptxas thinks of it, what it executes.

``cuobjdump -res-usage`` says what a program occupies, ``nvdisasm -c`` what it executes, ``ptxas -v``
what it thinks of it. From the disassembly's branches come the blocks, from dominators the loops (A.
V. Aho, M. S. Lam, R. Sethi, J. D. Ullman, *Compilers*, 2nd edition, section 9.6): an edge to a block
that dominates its source closes one.

Nothing here needs a GPU, CUDA or triton: it reads text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tools.kernels.sass import Code, Instruction, Loop


class Resources(NamedTuple):
    """What a program occupies: registers of a thread, and bytes of stack and local memory of a
    thread; stack or local memory mean that registers were spilled.
    """

    registers: int
    stack: int
    local: int


def resources(text: str, kernel: str) -> Resources:
    """Of ``cuobjdump -res-usage``.

    Raises:
        ValueError: it does not speak of this kernel.
    """
    found = re.search(
        rf"Function {re.escape(kernel)}:\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text, re.S
    )
    if found is None:
        raise ValueError(f"cuobjdump says nothing of kernel {kernel!r}: {text.strip()[:200]!r}")
    return Resources(*map(int, found.groups()))


class Messages(NamedTuple):
    """What ptxas says of a kernel: bytes of a thread that it spills and loads again, and what it
    calls a potential loss of performance, such as serialised products, in its own words.
    """

    spill_stores: int
    spill_loads: int
    losses: tuple[str, ...]


_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_LOSS = re.compile(r"^.*?((?:\(C\d+\) *)?Potential Performance Loss: .*?)\s*$", re.M)


def messages(log: str) -> Messages:
    """Of ``ptxas -v``; of all functions together.

    Raises:
        ValueError: it does not speak of spills.
    """
    spilled = _SPILLED.findall(log)
    if not spilled:
        raise ValueError(f"ptxas says nothing of spills: {log.strip()[:200]!r}")
    stores, loads = (sum(map(int, each)) for each in zip(*spilled, strict=True))
    return Messages(stores, loads, tuple(dict.fromkeys(_LOSS.findall(log))))


_SECTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L_\w+|\$[\w$.]+):$")
_STEP = re.compile(r"^/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*[\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+|\$[\w$.]+)\)")
# BRX R4 -0x190 (*"BRANCH_TARGETS .L_x_2,.L_x_29"*): a table of the roles of a specialised kernel
_TABLE = re.compile(r"\.L_\w+")


def read(text: str, kernel: str) -> Code:
    """Of ``nvdisasm -c``.

    Raises:
        ValueError: there is no code of this kernel, or it jumps where only a GPU knows.
    """
    steps: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for raw in text.splitlines():
        line = raw.strip()
        section = _SECTION.match(line)
        if section or line.startswith(".section"):
            inside = section is not None and section[1] == kernel
        elif inside:
            label, step = _LABEL.match(line), _STEP.match(line)
            if label:
                labels[label[1]] = len(steps)
            elif step:
                predicate = (step[1] or "").strip()
                steps.append(Instruction(step[2], "" if predicate == "@PT" else predicate, step[3]))
    if not steps:
        raise ValueError(f"nvdisasm shows no code of kernel {kernel!r}: {text.strip()[:200]!r}")
    return _code(steps, labels)


def _code(steps: list[Instruction], labels: dict[str, int]) -> Code:
    nexts = [_next(steps, labels, i) for i in range(len(steps))]
    starts = {0}
    for i, after in enumerate(nexts):
        if after != [i + 1]:
            starts.update([*after, i + 1])
    starts.update(labels.values())
    begins = sorted(s for s in starts if s < len(steps))
    ends = [*begins[1:], len(steps)]
    number = {begin: i for i, begin in enumerate(begins)}
    edges = [[number[s] for s in nexts[end - 1] if s in number] for end in ends]

    # Subroutines (divisions that leave the fast path) are kept, but stand apart: a call goes on
    # behind itself, so that one that is called twice does not look like a loop.
    called = [
        [
            number[labels[name]]
            for step in steps[begin:end]
            if step.opcode == "CALL"
            for name in _TARGET.findall(step.operands)
            if name in labels
        ]
        for begin, end in zip(begins, ends, strict=True)
    ]
    order = sorted(_reachable([[*on, *away] for on, away in zip(edges, called, strict=True)]))
    place = {old: new for new, old in enumerate(order)}
    blocks = tuple(tuple(steps[begins[old] : ends[old]]) for old in order)
    followers = [[place[e] for e in edges[old]] for old in order]
    return Code(blocks, tuple(map(tuple, followers)), _loops(followers))


def _next(steps: list[Instruction], labels: dict[str, int], i: int) -> list[int]:
    """Where execution may go on after instruction `i`."""
    step = steps[i]
    targets = [labels[name] for name in _TARGET.findall(step.operands) if name in labels]
    # A branch may carry its condition among its operands instead: BRA.DIV UR4, `(.L_x_1)
    always = not step.predicate and step.operands.startswith("`(")
    if step.opcode == "BRA" or (step.opcode == "JMP" and targets):
        return targets if always else [*targets, i + 1]
    if step.opcode in ("BRX", "BRXU", "JMX", "JMXU", "JMP"):
        table = _table(steps, labels, step)
        return [*table, i + 1] if step.predicate else table
    if step.opcode in ("EXIT", "RET"):
        return [i + 1] if step.predicate else []
    if step.opcode == "BSYNC":
        return _joins(steps, labels, i)
    return [i + 1]


def _table(steps: list[Instruction], labels: dict[str, int], step: Instruction) -> list[int]:
    """Where an indirect branch may go: to the labels that the disassembler lists with it, or else
    to those that nothing else names.
    """
    listed = {name for name in _TABLE.findall(step.operands) if name in labels}
    if not listed:
        named = {name for other in steps for name in _TARGET.findall(other.operands)}
        listed = {name for name in labels if name.startswith(".L") and name not in named}
    if not listed:
        raise ValueError(f"{step.name} {step.operands} jumps to a place known at run time only")
    return sorted({labels[name] for name in listed})


def _joins(steps: list[Instruction], labels: dict[str, int], i: int) -> list[int]:
    """Where threads that part at a ``BSSY`` of this register go on together."""
    register = steps[i].operands.split(",")[0]
    targets = [
        labels[name]
        for step in steps
        if step.opcode == "BSSY" and step.operands.split(",")[0] == register
        for name in _TARGET.findall(step.operands)
        if name in labels
    ]
    return [i + 1] if i + 1 in targets or not targets else sorted(set(targets))


def _reachable(edges: list[list[int]]) -> set[int]:
    seen: set[int] = set()
    left = [0]
    while left:
        block = left.pop()
        if block not in seen:
            seen.add(block)
            left.extend(edges[block])
    return seen


def _loops(edges: list[list[int]]) -> tuple[Loop, ...]:
    count = len(edges)
    befores: list[list[int]] = [[] for _ in range(count)]
    for i, after in enumerate(edges):
        for j in after:
            befores[j].append(i)

    # dominators[i]: the blocks that every way to i passes
    dominators = [set(range(count)) for _ in range(count)]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in range(1, count):
            new = {i}
            if befores[i]:  # not the beginning of a subroutine
                new |= set.intersection(*(dominators[j] for j in befores[i]))
            changed |= new != dominators[i]
            dominators[i] = new

    bodies: dict[int, set[int]] = {}
    latches: dict[int, list[int]] = {}
    for i, after in enumerate(edges):
        for header in after:
            if header in dominators[i]:
                body = bodies.setdefault(header, {header})
                latches.setdefault(header, []).append(i)
                left = [i]
                while left:
                    block = left.pop()
                    if block not in body:
                        body.add(block)
                        left.extend(befores[block])
    return tuple(
        Loop(
            header,
            frozenset(body),
            frozenset(i for i in body if all(i in dominators[end] for end in latches[header])),
        )
        for header, body in sorted(bodies.items())
    )
