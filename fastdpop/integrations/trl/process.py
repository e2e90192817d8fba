"""The end of a process that is one of several on CPUs."""

from __future__ import annotations

import atexit
import os
import sys

import torch


def end_process(code: int) -> None:
    """End this process now, if it is one of several on CPUs and all its work is done; else return.

    gloo's threads may still hold tensors of Python when the interpreter ends, and now and then abort
    the process for it (pytorch/pytorch#190489).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
