"""What a new user's first step needs, run by the Python of an environment that holds the wheel and torch alone:
every set of instructions against plain torch in float64, on one OpenMP, with no compiler in reach.
"""

from __future__ import annotations

import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch  # warns where there is no numpy

import fastdpop
from fastdpop import engines, fused_dpop_loss
from fastdpop.engines.cpu import CPUEngine, instruction_sets

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")


def step(engine: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(4, 60, 48, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(1000, 48, dtype=torch.float64) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(0, 1000, (4, 60))
    labels[:, :20] = -100
    references = torch.full((2, 2), -300.0, dtype=torch.float64)
    out = fused_dpop_loss(
        hidden, weight, labels, ref_logps=(references[0], references[1]), beta=0.1, engine=engine
    )
    out.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [t.detach().double() for t in (out.loss, out.chosen_logps, hidden.grad, weight.grad)]


def main() -> None:
    warnings.simplefilter("error")
    assert not any(map(shutil.which, COMPILERS)), "a compiler is in reach"
    assert Path(fastdpop.__file__).is_relative_to(sys.prefix), fastdpop.__file__
    assert engines.choose("auto", torch.device("cpu"), torch.float32) == "cpu"
    exact = step("eager", torch.float64)
    for name in instruction_sets():
        engine = CPUEngine(name)
        engine.name = f"cpu-{name}"
        engines.register(engine, first=False)
        found = step(engine.name, torch.float32)
        off = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        print(f"{engine.describe()}: {off:.1e} from float64")
        assert off < 1e-5
    loaded = set(re.findall(r"\S*(?:gomp|iomp|libomp)\S*", Path("/proc/self/maps").read_text()))
    print("OpenMP:", *sorted(loaded))
    assert len(loaded) == 1, loaded


main()
