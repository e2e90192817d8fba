"""The forward product in Gluon against the plain one, bit for bit; a process of its own, started by
``test_engines.py``. Exit code 5: this chip does not run it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import signal
import sys

import torch

from fastdpop.engines import STATISTICS
from fastdpop.engines.triton import TritonEngine
from fastdpop.kernels import config
from fastdpop.transform import LogitTransform
from tests.gpu.problems import TRAINED, coefficients, one_pass, problem, two_passes

CASES = (
    # rows, width, vocabulary, head, bias; one step of the sum, fewer tiles than multiprocessors,
    # whole tiles and none, and more tiles than a program takes by itself
    (1, 64, 300, LogitTransform(), False),
    (129, 72, 1_000, LogitTransform(), False),
    (257, 4_096, 8_192, LogitTransform(), True),
    (300, 512, 30_011, LogitTransform(softcap=5.0), False),
    (640, 2_304, 4_097, LogitTransform(softcap=5.0), True),
    (4_096, 4_096, 128_256, LogitTransform(), False),
)
TIMES = 20


def results(engine: TritonEngine, dtype: torch.dtype, device: torch.device, case: int) -> list:
    rows, width, vocabulary, head, bias = CASES[case]
    p = problem(
        device, dtype, rows=rows, width=width, vocabulary=vocabulary, pieces=1, head=head, bias=bias
    )
    c = coefficients(p)
    plain, logged = engine.logps(p, ()), engine.logps(p, STATISTICS)
    found = [plain.logps, plain.lse, logged.logps, logged.lse, logged.statistics]
    kept = engine.logps_and_dlogp_dhidden(p, ())
    direction = kept.dlogp_dhidden
    found += [kept.logps, direction, *one_pass(engine, p, c, TRAINED)]
    small = dataclasses.replace(p, workspace_bytes=p.workspace_bytes // 32)
    return found + two_passes(engine, small, c, TRAINED)


def main(name: str, device: torch.device) -> None:
    dtype = getattr(torch, name)
    plain, gluon = (TritonEngine(forward=forward) for forward in ("plain", "gluon"))
    for case in range(len(CASES)):
        want = results(plain, dtype, device, case)
        assert all(one.isfinite().all() for one in want), case
        times = TIMES if case < len(CASES) - 1 else 3
        for time in range(times):
            got = results(gluon, dtype, device, case)
            for i, (one, two) in enumerate(zip(want, got, strict=True)):
                assert torch.equal(one, two), (CASES[case], time, i)
        print(CASES[case], times, "times", flush=True)
    if device.type == "cuda":
        from fastdpop.kernels import gluon_forward

        torch.cuda.synchronize()
        compiled = gluon_forward.forward_kernel.device_caches
        assert any(cache[0] for cache in compiled.values()), "it was not launched"


if __name__ == "__main__":
    # A kernel that hangs must not outlive the test that started this, however that one ends.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if config.target_of(torch.device("cuda")) != "sm_90a":
        print("no Hopper here")
        raise SystemExit(5)
    from tests import launches

    launches.settle_keys()
    main(sys.argv[1], torch.device("cuda"))
