"""The ways to divide a job among GPUs, each with its memory and its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastdpop.plan.hardware import PER_NODE
from fastdpop.plan.heads import HEADS
from fastdpop.plan.memory import Job, Memory, Setting, memory_of
from fastdpop.plan.speed import Step, step_of

_MOST_PAIRS = 4096


@dataclass(frozen=True)
class Estimate:
    """What a setting should take.

    Attributes:
        setting, memory, step: of it.
        fits: whether the memory is there.
        most_pairs: in one forward pass of a data-parallel rank; 0 if not even one pair fits.
        pairs_per_second, tokens_per_second: of all GPUs; tokens are those of prompts and
            completions, once for each sequence, without padding.
        use: share of the GPUs' peak rate that all operations of a step are.
    """

    setting: Setting
    memory: Memory
    step: Step
    fits: bool
    most_pairs: int
    pairs_per_second: float
    tokens_per_second: float
    use: float


def settings_of(job: Job) -> Iterator[Setting]:
    """All ways to divide it that fit the number of GPUs, without checkpointing and padded."""
    gpus, nodes = job.cluster.gpus, job.cluster.nodes
    if gpus == 1:
        yield Setting("one GPU")
        return
    yield Setting("DDP", replicas=gpus)
    if job.precision == "mixed":
        # DeepSpeed keeps float32 weights and states whatever is asked for.
        for stage, sharded in enumerate(("optimizer", "gradients", "weights"), 1):
            yield Setting(f"ZeRO-{stage}", sharded, gpus, deepspeed=True)
    yield Setting("FSDP2", "weights", gpus)
    yield Setting("FSDP2, no reshard", "weights", gpus, reshard=False)
    if nodes > 1:
        yield Setting("HSDP", "weights", PER_NODE, nodes)
    for tp in (2, 4, 8):
        if tp <= job.cluster.in_node and gpus % tp == 0:
            name = f"TP {tp} x FSDP2" if gpus > tp else f"TP {tp}"
            yield Setting(name, "weights", gpus // tp, tp=tp)


def estimate(job: Job, setting: Setting) -> Estimate:
    """
    Raises:
        ValueError: the model's layers cannot be traced.
    """
    memory, step = memory_of(job, setting), step_of(job, setting)
    pairs = job.pairs * job.accumulate * setting.data_ranks / step.seconds
    return Estimate(
        setting=setting,
        memory=memory,
        step=step,
        fits=memory.total <= job.room,
        most_pairs=_most_pairs(job, setting),
        pairs_per_second=pairs,
        tokens_per_second=pairs * 2 * job.length * job.real,
        use=step.flop / step.seconds / job.cluster.gpu.peak,
    )


def _most_pairs(job: Job, setting: Setting) -> int:
    low, high = 0, _MOST_PAIRS
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory_of(job.with_pairs(middle), setting).total <= job.room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _order(found: Estimate) -> tuple[bool, float]:
    return (not found.fits, -found.pairs_per_second if found.fits else found.memory.total)


def compare(job: Job, checkpointing: bool | None = None) -> tuple[list[Estimate], dict[str, str]]:
    """Every setting, the fastest that fits first, then those that do not by what they need; and why
    others cannot be estimated, by name.

    Args:
        checkpointing: on or off; None for what is better in each setting.

    Raises:
        ValueError: none can be estimated.
    """
    found, left_out = [], {}
    ways = (False, True) if checkpointing is None else (checkpointing,)
    for base in settings_of(job):
        why = job.model.why_not_split(base.tp) if base.tp > 1 else None
        if why is not None:
            left_out[base.name] = why
            continue
        try:
            for shared in (False, True) if job.tree is not None else (False,):
                each = (
                    estimate(job, replace(base, checkpointing=way, shared=shared)) for way in ways
                )
                found.append(min(each, key=_order))
        except ValueError as error:
            left_out[base.name] = str(error)
    if not found:
        raise ValueError(next(iter(left_out.values())))
    return sorted(found, key=_order), left_out


def beside(job: Job, chosen: Setting, checkpointing: bool | None = None) -> list[Estimate]:
    """A setting with each head, padded, since only fastdpop shares prefixes; and with fastdpop's own
    sharing, if the setting has it.
    """
    ways: Sequence[bool] = (False, True) if checkpointing is None else (checkpointing,)
    bases = [chosen] if chosen.shared else []
    bases += [replace(chosen, head=head, shared=False) for head in HEADS]
    return [
        min((estimate(job, replace(base, checkpointing=way)) for way in ways), key=_order)
        for base in bases
    ]
