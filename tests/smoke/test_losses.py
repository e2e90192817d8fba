"""A minute of everything that needs torch alone: what `make test-matrix` runs with every version that is served.

Nothing here goes deep, and all of it is tested elsewhere; but it is all that runs with most versions.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdpop
from fastdpop import engines, naive
from fastdpop.engines.triton import unusable

B, T, H, V = 2, 9, 32, 203


def example(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two pairs with prompts that are not scored, and a padded sequence."""
    labels = torch.randint(0, V, (2 * B, T))
    labels[:, :3] = -100
    labels[1, -2:] = -100
    return {
        "hidden": (torch.randn(2 * B, T, H) / 4).to(dtype).requires_grad_(),
        "weight": torch.randn(V, H).to(dtype).requires_grad_(),
        "labels": labels,
        "ref_logps": -30 + torch.randn(2 * B),
    }


def naively(given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss in float64 with full logits, and d loss / d hidden, d loss / d weight."""
    hidden, weight = (
        given[name].detach().double().requires_grad_() for name in ("hidden", "weight")
    )
    logps = naive.sequence_logps(hidden, weight, given["labels"])
    loss = naive.dpop_loss(logps, given["ref_logps"])
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), [hidden.grad, weight.grad]


def assert_near(given: dict[str, Tensor], loss: Tensor, tolerance: float) -> None:
    """Loss and gradients against the definition; gradients relative to their largest element."""
    loss.backward()
    expected, gradients = naively(given)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=tolerance, atol=0)
    for name, gradient in zip(("hidden", "weight"), gradients, strict=True):
        found = given[name].grad
        assert found is not None
        largest = gradient.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(found.double(), gradient, rtol=0, atol=tolerance * largest)


NEEDS = {
    **dict.fromkeys(("attach", "detach", "is_attached"), "transformers"),
    **dict.fromkeys(("patch_trl", "unpatch_trl"), "trl"),
    **dict.fromkeys(("PackedPairs", "PromptSampler", "pack"), "numpy"),
}
"""What public names need beyond torch."""


def test_every_public_name_is_there() -> None:
    there = {name for name in NEEDS.values() if importlib.util.find_spec(name) is not None}
    for name in fastdpop.__all__:
        if NEEDS.get(name) in (None, *there):
            assert getattr(fastdpop, name) is not None


def test_the_engine_in_c_plus_plus_is_there() -> None:
    assert "cpu" in engines.available("cpu")


@pytest.mark.parametrize("engine", ["cpu", "eager"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_loss_and_gradients(engine: str, dtype: torch.dtype, tolerance: float) -> None:
    given = example(dtype)
    assert_near(given, fastdpop.fused_dpop_loss(**given, engine=engine).loss, tolerance)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_compiled() -> None:
    """By torch's own compiler, in one graph; torch 2.9 breaks it at rows, whose number depends on the data."""
    given = example()

    def step(**inputs: Any) -> Tensor:
        return fastdpop.fused_dpop_loss(**inputs).loss

    torch.compiler.reset()
    in_one = not torch.__version__.startswith("2.9.")
    assert_near(given, torch.compile(step, fullgraph=in_one)(**given), 1e-5)


KERNELS = """
import torch
from fastdpop import fused_dpop_loss
from tests.smoke.test_losses import assert_near, example

torch.manual_seed(0)
given = example()
assert_near(given, fused_dpop_loss(**given, engine="triton").loss, 1e-5)
print("right")
"""


@pytest.mark.skipif(unusable() is not None, reason=unusable() or "")
@pytest.mark.skipif(
    importlib.util.find_spec("numpy") is None, reason="numpy, of triton's interpreter, is missing"
)
def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: triton decides when it is first imported."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KERNELS],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "right\n", done.stderr


def test_doctor() -> None:
    """As a shell calls it, which needs the entry point of what is installed."""
    command = Path(sys.executable).with_name("fastdpop")
    done = subprocess.run([command, "doctor", "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["uses"]["loop"]["ready"]
    assert found["cpu"]["library"]["ready"]
    assert found["engines"]["cpu"][0]["name"] == "cpu"
