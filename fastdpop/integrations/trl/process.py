"""The end of a process that is one of several on CPUs.

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


def keep_process_groups() -> None:
    """Have accelerate leave the process groups to :func:`end_process`, if this is one of several on CPUs."""
    if _one_of_several_on_cpus():
        PartialState.destroy_process_group = _keep


def end_process(code: int) -> None:
    """End this process now, if it is one of several on CPUs and all its work is done; else return."""
    if _one_of_several_on_cpus():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _one_of_several_on_cpus() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def _keep(state: PartialState, group: Any = None) -> None:
    """In the place of ``PartialState.destroy_process_group``."""
