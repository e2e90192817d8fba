"""A comparison as text and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from fastdpop.plan.hardware import GIB
from fastdpop.plan.memory import Job, Setting
from fastdpop.plan.settings import Estimate
from fastdpop.plan.speed import scoring_seconds


def title_of(setting: Setting) -> str:
    """A setting in a few words."""
    extra = [
        word
        for word, there in (
            ("checkpointing", setting.checkpointing),
            ("shared prefixes", setting.shared),
        )
        if there
    ]
    return ", ".join([setting.name, *extra])


def heading(job: Job) -> list[str]:
    """What is planned."""
    model, cluster = job.model, job.cluster
    counts = model.counts()
    what = f"LoRA of rank {model.lora.rank}" if model.lora else "all weights"
    share = "" if job.tree is None else f"; in trees {job.tree:.0%} of the tokens"
    real = "" if job.real == 1 else f", {job.real:.0%} of them real"
    nodes = f" in {cluster.nodes} nodes" if cluster.nodes > 1 else ""
    accumulate = f", {job.accumulate} passes a step" if job.accumulate > 1 else ""
    return [
        f"Estimates, not measurements, for {model.config.model_type}: {counts.all:,} parameters, "
        f"{counts.trained:,} trained ({what}, {job.precision})",
        f"{cluster.gpus} x {cluster.kind}{nodes}, {job.room / GIB:.1f} GiB for tensors on each; "
        f"{job.pairs} pairs a rank{accumulate}, sequences of {job.length:,} tokens{real}, "
        f"{job.completion:,} scored{share}; reference {job.reference}",
    ]


def _row(title: str, found: Estimate) -> str:
    step = found.step
    return (
        f"{title:50}{found.memory.total / GIB:>8.1f}{'yes' if found.fits else 'no':>6}"
        f"{found.most_pairs:>6}{step.seconds:>9.2f}{step.exposed / step.seconds:>7.0%}"
        f"{found.pairs_per_second:>9.2f}{found.tokens_per_second:>11,.0f}{found.use:>6.0%}"
    )


_HEADER = (
    f"{'':50}{'GiB':>8}{'fits':>6}{'most':>6}{'s/step':>9}{'wait':>7}{'pairs/s':>9}{'tokens/s':>11}"
    f"{'peak':>6}"
)


def table(job: Job, found: Sequence[Estimate], left_out: dict[str, str]) -> str:
    """All settings, and why some do not fit."""
    lines = [*heading(job), "", _HEADER]
    lines += [_row(title_of(each.setting), each) for each in found]
    too_large = [each for each in found if not each.fits]
    if too_large:
        lines += ["", "Too large, and the largest part at the fullest moment:"]
        for each in too_large:
            size = each.memory.parts[each.memory.largest] / GIB
            lines.append(f"  {title_of(each.setting):50}{each.memory.largest} {size:,.1f} GiB")
    lines += [f"Not estimated: {name}: {why}" for name, why in left_out.items()]
    lines += [
        "",
        "GiB: of a GPU at its fullest moment; most: pairs a rank that fit; wait: share of a step that "
        "waits for other",
        "GPUs; tokens/s: real ones of all sequences; peak: all operations of a step over the GPUs' peak "
        "rate.",
    ]
    return "\n".join(lines)


def heads_table(found: Sequence[Estimate]) -> str:
    """One setting with each head."""
    lines = [f"The same with other heads ({found[0].setting.name}):", _HEADER]
    for each in found:
        setting = each.setting
        extra = ", checkpointing" if setting.checkpointing else ""
        title = setting.head + extra + (", shared prefixes" if setting.shared else "")
        lines.append(_row(title, each))
    return "\n".join(lines)


def advice(job: Job, best: Estimate | None, steps: int | None) -> str:
    """A paragraph: what to do."""
    if best is None:
        text = (
            "Nothing fits. Use more GPUs, fewer --pairs-per-gpu, shorter sequences, --lora or "
            "--precision bf16."
        )
        return textwrap.fill(text, 110)
    setting, memory = best.setting, best.memory
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size >= GIB / 20)
    text = (
        f"Recommended: {title_of(setting)}. A GPU holds {memory.total / GIB:.1f} GiB at its fullest "
        f"moment ({largest}). A step of {job.pairs * job.accumulate * setting.data_ranks} pairs takes "
        f"{best.step.seconds:.2f} s and sends {best.step.traffic.node / 1e9:.1f} GB from each GPU "
        f"within its node and {best.step.traffic.network / 1e9:.1f} GB to others. "
    )
    if steps is not None:
        text += f"{steps:,} steps take {steps * best.step.seconds / 3600:.1f} hours"
        if job.reference == "precomputed":
            hours = steps * job.accumulate * scoring_seconds(job, setting) / 3600
            text += f", and the reference's scores beforehand at most {hours:.1f}"
        text += ". "
    return textwrap.fill(text + _how(job, setting), 110, break_on_hyphens=False)


def _how(job: Job, setting: Setting) -> str:
    """The options of accelerate, or of FSDP, that make a setting."""
    cluster = job.cluster
    launch = f"accelerate launch --num_processes {cluster.gpus}"
    if cluster.nodes > 1:
        launch += f" --num_machines {cluster.nodes} --machine_rank N --main_process_ip HOST"
    if setting.tp > 1 and setting.shards == 1:
        return 'It needs a loop of your own, with from_pretrained(..., tp_plan="auto") and fastdpop.attach.'
    options = f"--batch-pairs {job.pairs} --accumulate {job.accumulate} --bf16"
    options += " --gradient-checkpointing" if setting.checkpointing else ""
    options += " --share-prefixes" if setting.shared else ""
    if job.model.lora:
        options += f" --lora --lora-rank {job.model.lora.rank}"
        targets = job.model.lora.targets
        if targets != ("all-linear",):
            options += f" --lora_target_modules {' '.join(targets)}"
    # What a reference is scored with before training knows nothing of a split head.
    if job.reference != "precomputed" or setting.tp > 1:
        options += " --reference online"
    if setting.name == "one GPU":
        return f"Start it with: fastdpop train {options} ..."
    if setting.deepspeed:
        stage = setting.name.removeprefix("ZeRO-")
        how = f"--use_deepspeed --zero_stage {stage} --mixed_precision bf16"
    elif setting.sharded == "nothing":
        how = "--multi_gpu --mixed_precision bf16"
    else:
        how = (
            "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
            f"--fsdp_reshard_after_forward {str(setting.reshard).lower()} --mixed_precision bf16"
        )
    if setting.tp > 1 or setting.name == "HSDP":
        how += (
            f" --use_parallelism_config --parallelism_config_tp_size {setting.tp}"
            f" --parallelism_config_dp_shard_size {setting.shards}"
            f" --parallelism_config_dp_replicate_size {setting.replicas}"
        )
    return f"Start it with: {launch} {how} -m fastdpop train {options} ..."


def numbers(
    job: Job, found: Sequence[Estimate], left_out: dict[str, str], heads: Sequence[Estimate]
) -> dict[str, Any]:
    """All of it for programs; bytes and seconds."""
    counts = job.model.counts()
    return {
        "estimates": True,
        "model": {
            "type": job.model.config.model_type,
            "parameters": counts.all,
            "trained": counts.trained,
        },
        "gpus": job.cluster.gpus,
        "kind": job.cluster.kind,
        "nodes": job.cluster.nodes,
        "bytes_for_tensors": job.room,
        "pairs_per_rank": job.pairs,
        "accumulate": job.accumulate,
        "tokens": job.length,
        "completion_tokens": job.completion,
        "real_share": job.real,
        "tree_share": job.tree,
        "reference": job.reference,
        "precision": job.precision,
        "settings": [_numbers(each) for each in found],
        "heads": [_numbers(each) for each in heads],
        "not_estimated": left_out,
    }


def _numbers(found: Estimate) -> dict[str, Any]:
    setting, step = found.setting, found.step
    return {
        "name": setting.name,
        "head": setting.head,
        "checkpointing": setting.checkpointing,
        "shared_prefixes": setting.shared,
        "tensor_parallel": setting.tp,
        "shards": setting.shards,
        "replicas": setting.replicas,
        "fits": found.fits,
        "bytes": {
            "moment": found.memory.moment,
            "total": found.memory.total,
            **found.memory.parts,
        },
        "most_pairs_per_rank": found.most_pairs,
        "seconds": {
            "step": step.seconds,
            "layers": step.compute,
            "head": step.head,
            "optimizer": step.optimizer,
            "waiting": step.exposed,
        },
        "bytes_sent": {"in_node": step.traffic.node, "between_nodes": step.traffic.network},
        "pairs_per_second": found.pairs_per_second,
        "tokens_per_second": found.tokens_per_second,
        "share_of_peak": found.use,
    }
