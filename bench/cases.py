"""Which contender is measured on what: not the full cross product, but what fits 15 minutes on two
cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.contenders import FLOOR, FLOOR_AS_WRITTEN, FP32_THROUGHOUT, PEERS, contender, ours
from bench.workloads import MODES


class Case(NamedTuple):
    """One row of the results. Cases of one batch follow each other, its floor first in each mode."""

    workload: str
    dtype: str
    mode: str
    loss: str
    contender: str

    def __str__(self) -> str:
        return ", ".join(filter(None, self))


def loss_cases(device: str) -> Iterator[Case]:
    """Time, memory and error of a step."""
    trained, frozen = MODES[:2]
    auto, *slower = ours(device)
    gather = "gather, fp32 upcast"
    everybody = [*PEERS, auto, *slower]
    few = [gather, auto]

    for mode in MODES:
        peers = [name for name in everybody if mode == trained or not contender(name).compiles]
        yield from _cases("gsm8k-like", "bf16", mode, peers, ("dpop", "dpo"))
    for mode in MODES:
        yield from _cases("edited pairs", "bf16", mode, few, ("dpop", "dpo"))
    for mode in MODES:
        yield from _cases("gsm8k-like", "fp32", mode, few)
    for mode in MODES:
        yield from _cases("one pair", "bf16", mode, few)
    yield from _cases("one pair", "fp32", trained, few)
    for workload in ("long prompt", "long completion", "V 128,256", "V 262,144"):
        for mode in (trained, frozen):
            yield from _cases(workload, "bf16", mode, few)


def _cases(
    workload: str, dtype: str, mode: str, names: list[str], losses: tuple[str, ...] = ("dpop",)
) -> Iterator[Case]:
    yield Case(workload, dtype, mode, "", FLOOR)
    if len(names) > 2:
        yield Case(workload, dtype, mode, "", FLOOR_AS_WRITTEN)
    for name in names:
        # Log-probs are the same for every loss.
        own = contender(name).losses[: 1 if mode == MODES[-1] else None]
        for loss in own:
            if loss in losses and not (loss == "dpo" and "eager" in name):
                yield Case(workload, dtype, mode, loss, name)


def gradient_cases(device: str) -> list[str]:
    """Contenders whose dWeight is looked at after many pairs."""
    trl_and_liger = ["TRL, scored rows", "Liger"]
    return [FP32_THROUGHOUT, "gather, 16-bit logits", *trl_and_liger, *ours(device)]
