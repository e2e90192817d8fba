"""Processes that are started once and run many cases together.

    results = pool.run(function, *args)     # function(rank, *args) in every process; their results, by rank

A function stands in a module that every process can import (a test's own is fine), and what it takes and gives can be
pickled. The default group spans all processes; ``torch.distributed.new_group`` and ``init_device_mesh`` make others,
in every process.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT = 300.0
"""Seconds after which a case is given up."""


class Pool:
    """`size` processes with a gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[Any] = []

    def start(self) -> None:
        """Start the processes, unless they are there."""
        if self.processes:
            return
        context = mp.get_context("spawn")
        rendezvous = tempfile.mktemp(prefix="rendezvous-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self.size, rendezvous, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append((process, ours))

    def stop(self) -> None:
        """Kill the processes: after a failure, some may wait for others for ever."""
        for process, pipe in self.processes:
            pipe.close()
            process.kill()
            process.join()
        self.processes = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, *args)`` in every process.

        Raises:
            AssertionError: it failed in some; which, and their traces.
        """
        self.start()
        for _, pipe in self.processes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        failed: dict[int, str] = {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.processes)}
        left = TIMEOUT
        while waiting:
            ready = wait(list(waiting), timeout=left)
            if not ready:
                missing = f"rank {', '.join(map(str, waiting.values()))}: no answer in time"
                failed[-1] = missing
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    good, found = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, found = False, "the process ended"
                (results if good else failed)[rank] = found
            if failed:
                left = 10.0  # others may fail of themselves, or wait for ever
        if failed:
            self.stop()
            raise AssertionError(
                "\n".join(f"rank {rank} of {self.size}: {text}" for rank, text in failed.items())
            )
        return [results[rank] for rank in range(self.size)]


def _work(rank: int, size: int, rendezvous: str, pipe: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, args = pipe.recv()
            torch.manual_seed(0)
            try:
                answer = True, function(rank, *args)
            except BaseException:
                answer = False, traceback.format_exc()
            pipe.send(answer)
    os._exit(0)  # gloo's threads can outlive what they need of the interpreter
