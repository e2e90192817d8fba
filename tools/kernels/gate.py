"""The strict gate: what must not be shipped, in any configuration."""

from __future__ import annotations

from collections.abc import Iterator

from tools.kernels.chips import chip
from tools.kernels.report import Entry, listed


def _on_tensor_cores(product: Entry) -> bool:
    if product["dtype"] == "f32":
        return bool(product["precision"] != "ieee")
    return product["dtype"] in ("bf16", "f16")


def judge(entry: Entry) -> Entry:
    """Add what is wrong with an entry: `errors`, for any of which it must not be shipped."""
    hopper = entry["target"] == "sm_90a"
    errors = [*_of_any_target(entry), *(_of_warpgroups(entry) if hopper else ())]
    return {**entry, "errors": errors}


def _of_any_target(entry: Entry) -> Iterator[str]:
    known = chip(entry["target"])
    if entry["shared"] > known.shared_of_a_program:
        yield (
            f"needs {entry['shared']:,} bytes of shared memory, a program may have "
            f"{known.shared_of_a_program:,}"
        )
    instructions = entry["mix"].get("spill", 0)
    spilled = ("stack", "local", "spill_stores", "spill_loads")
    if instructions or any(entry[kind] for kind in spilled):
        yield (
            f"spills: {entry['stack']} bytes of stack, {entry['local']} of local memory, "
            f"{entry['spill_stores']} stored and {entry['spill_loads']} loaded by "
            f"{instructions} instructions, at {entry['registers']} registers"
        )
    for loss in entry["losses"]:
        yield f"ptxas says {loss}"
    if entry["float64_names"] and not entry["float64"]:
        yield f"computes in float64, which it does not mean to: {listed(entry['float64_names'])}"


def _of_warpgroups(entry: Entry) -> Iterator[str]:
    loops = entry["main_loops"]
    for loop in loops:
        if loop["never_waits"]:
            yield (
                "a main loop hands on shared memory and never waits for the products that read it "
                f"({loop['hgmma']} HGMMA)"
            )
        elif loop["hgmma"] and not loop["in_flight"]:
            yield (
                "keeps nothing in flight: every wait of a main loop is for all of its products "
                f"({loop['hgmma']} HGMMA)"
            )
    if entry["handed_on_early"]:
        yield (
            "hands on shared memory after a wait for products, before a barrier of the warps that "
            f"may not have waited yet: {listed(entry['handed_on_early'])}"
        )
    if entry["from_registers"]:
        rewritten = max((loop["rewritten"] for loop in loops), default=0)
        yield (
            f"{entry['from_registers']} of {entry['hgmma']} HGMMA take their left operand from "
            + (
                f"registers, {rewritten} of which are written again while the products that read "
                "them may be in flight"
                if rewritten
                else "registers (none is seen to be written while products are in flight)"
            )
        )
    # Those of Gluon need not show in the source as this reads it: the declaration counts.
    meant = entry["gluon"] or any(map(_on_tensor_cores, entry["products"]))
    if entry["warpgroup"] and meant:
        others = {name for loop in loops for name in loop["tensor"] if not name.startswith("HGMMA")}
        if not sum(loop["hgmma"] for loop in loops):
            yield f"multiplies matrices without HGMMA in its main loop ({entry['hgmma']} elsewhere)"
        elif others:
            yield f"multiplies matrices in a main loop with {', '.join(sorted(others))} too"
