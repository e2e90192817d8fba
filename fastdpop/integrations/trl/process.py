"""Processes that are one of several: how they begin on CPUs, and how they end.

accelerate shards models over GPUs alone. On CPUs it would give each process a copy, and say nothing; for trying things
out :func:`shard_on_cpus` has it go the same way as on GPUs.

gloo's threads may be the last to hold a tensor of Python's, and need the interpreter's lock to let go of it. A process
that takes its groups down meanwhile holds that lock and waits for those threads, for ever; one that takes the
interpreter down is aborted (pytorch/pytorch#190489). So neither is done.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

SHARDING = ("FSDP", "DEEPSPEED")
"""What accelerate's launcher asks for by ``ACCELERATE_USE_...``."""


def sharding_asked() -> str | None:
    """The one that the launcher asked for; None for none of them."""
    asked = (
        name for name in SHARDING if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
    )
    return next(asked, None)


def shard_on_cpus() -> None:
    """Have accelerate take this process's CPU for a GPU, if it is one of several: then it shards as it is asked to.

    To be called before anything of accelerate's is made, and not together with ``use_cpu``.
    """
    if "LOCAL_RANK" in os.environ:
        PartialState._prepare_backend = _gloo
        PartialState.set_device = _cpu


def _gloo(*_: Any, **__: Any) -> tuple[str, DistributedType]:
    """In the place of ``PartialState._prepare_backend``."""
    return "gloo", DistributedType.MULTI_GPU


def _cpu(state: PartialState) -> None:
    """In the place of ``PartialState.set_device``."""
    state.device = torch.device("cpu")


def keep_process_groups() -> None:
    """Have accelerate leave the process groups to :func:`end_process`, if this is one of several on CPUs."""
    if _one_of_several_on_cpus():
        PartialState.destroy_process_group = _keep


def end_process(code: int) -> None:
    """End this process now, if it is one of several and failed, or all its work is done and it is on CPUs; else return.

    One that fails leaves the others waiting, and would itself wait for them in taking the groups down: what started
    them ends them when it sees this one end.
    """
    if _one_of_several_on_cpus() or (code and _one_of_several()):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _one_of_several_on_cpus() -> bool:
    return _one_of_several() and not torch.cuda.is_available()


def _keep(state: PartialState, group: Any = None) -> None:
    """In the place of ``PartialState.destroy_process_group``."""
