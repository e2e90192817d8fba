"""The GPUs that can be compiled for, and what one of their multiprocessors has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor of a target has, and what one program may take of it (CUDA C++
    Programming Guide, technical specifications per compute capability). Shared memory in bytes.
    """

    capability: int
    shared: int
    shared_of_a_program: int
    warps: int
    programs: int = 32
    registers: int = 65_536
    shared_reserved: int = 1_024

    def programs_per_sm(self, registers: int, shared: int, warps: int) -> int:
        """How many programs fit a multiprocessor at once; registers of a thread are granted by 8,
        shared memory by 128 bytes.
        """
        of_a_warp = 32 * (-(-registers // 8) * 8)
        of_a_program = -(-(shared + self.shared_reserved) // 128) * 128
        by_registers = self.registers // of_a_warp // warps
        return min(by_registers, self.shared // of_a_program, self.warps // warps, self.programs)


CHIPS = {
    "sm_80": Chip(80, shared=164 * 1024, shared_of_a_program=163 * 1024, warps=64),
    "sm_90a": Chip(90, shared=228 * 1024, shared_of_a_program=227 * 1024, warps=64),
    "sm_100": Chip(100, shared=228 * 1024, shared_of_a_program=227 * 1024, warps=64),
}
"""Targets that can be compiled for."""


def chip(target: str) -> Chip:
    """What is known of a target.

    Raises:
        ValueError: nothing.
    """
    if target not in CHIPS:
        raise ValueError(f"target is {target!r}, expected one of {sorted(CHIPS)}")
    return CHIPS[target]
