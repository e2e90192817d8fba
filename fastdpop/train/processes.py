"""The processes of a run: what all of them must have been given, and how parameters are spread over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin, gather_object

from fastdpop.integrations.trl.process import sharding_asked
from fastdpop.train.parse import Asked

_OWN = ("local_rank", "logging_dir")
"""TRL's settings that may be another one in each process."""


def settings(asked: Asked) -> dict[str, str]:
    """Everything that a process was told, by name."""
    told = {name: value for name, value in asked.config.to_dict().items() if name not in _OWN}
    for part in (asked.own, asked.data, asked.model, asked.mixture):
        told |= vars(part)
    told["parameters"] = layout(asked.config)
    return {name: str(value) for name, value in told.items()}


def agree(told: Mapping[str, str]) -> None:
    """Compare what the processes of a run were told; they would wait for one another for ever, or train apart.

    Raises:
        ValueError: in all of them; the message names what differs.
    """
    of_all = gather_object([dict(told)])
    differ = []
    for name in sorted({name for one in of_all for name in one}):
        values = [one.get(name) for one in of_all]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differ.append(f"{name}: {values[0]} on rank 0, {values[other]} on rank {other}")
    if differ:
        raise ValueError(
            "the processes were told different things, expected the same command and files for all; "
            + "; ".join(differ)
        )


def layout(config: Any) -> str:
    """How parameters are spread over processes, as far as checkpoints depend on it: one sharded by FSDP may be read by
    any number of processes, DeepSpeed's by as many as wrote it.
    """
    asked = sharding_asked()
    if config.deepspeed or asked == "DEEPSPEED":
        return f"DeepSpeed's, over {config.world_size} processes"
    if config.fsdp or asked == "FSDP":
        plugin = FullyShardedDataParallelPlugin(**(getattr(config, "fsdp_plugin_args", None) or {}))
        return f"FSDP{plugin.fsdp_version}'s, {plugin.state_dict_type.name}"
    return "whole in each process"


def check(trainer: Any) -> None:
    """
    Raises:
        ValueError: what is asked for ends a process without a word, or could not be resumed.
    """
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin and plugin.fsdp_version == 1 and trainer.accelerator.device.type == "cpu":
        raise ValueError(
            "fsdp_version is 1, expected 2 on CPUs: FSDP1 cannot gather a model there, to save it"
        )
    deepspeed = trainer.is_deepspeed_enabled
    if trainer.args.sync_ref_model and (deepspeed or (plugin and plugin.fsdp_version == 1)):
        kind = "DeepSpeed" if deepspeed else "FSDP1"
        raise ValueError(
            f"--sync_ref_model has no place with {kind}, of whose sharded parameters a checkpoint would not hold the "
            "reference's: shard by FSDP2, or keep a copy of the model in each process"
        )
