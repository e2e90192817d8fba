"""``torch_compile=True``: the compiled model trains as the uncompiled one does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer
from tests.integrations.test_trl import lora
from tests.integrations.trl_setup import WARNINGS, logged, model, pairs, trainer

# The last is of torch's own compiler, where it reads an activation.
IGNORED = [*WARNINGS, "ignore:The .grad attribute of a Tensor"]
pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(line) for line in IGNORED)]


@pytest.fixture(autouse=True)
def nothing_compiled_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")  # to be restored: the settings of a trainer set them
        monkeypatch.delenv(name)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("adapter", "share"),
    [(False, False), (True, False), (False, True)],
    ids=["all weights", "LoRA", "shared prefixes"],
)
def test_training(adapter: bool, share: bool, tmp_path: Path) -> None:
    def trained(**options: Any) -> Any:
        torch.manual_seed(3)
        of = trainer(
            FastDPOTrainer,
            tmp_path,
            config=FastDPOConfig,
            share_prefixes=share,
            reference=None if adapter else model(noise=0.02),
            given={"peft_config": lora()} if adapter else {},
            pad_to_multiple_of=64,
            max_steps=2,
            **options,
        )
        of.train()
        return of

    plain = trained()
    compiled = trained(torch_compile=True, torch_compile_backend="eager")
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    names = ("loss", "grad_norm", "penalty", "rewards/chosen", "entropy")
    for mine, own in zip(logged(compiled, *names), logged(plain, *names), strict=True):
        assert mine == pytest.approx(own, rel=1e-5, abs=1e-6)
    for mine, own in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, own)


def test_evaluation(tmp_path: Path) -> None:
    def evaluated(**options: Any) -> dict[str, float]:
        of = trainer(FastDPOTrainer, tmp_path, given={"eval_dataset": pairs(4, 20)}, **options)
        of.evaluate()
        found = of.state.log_history[-1]
        return {name: found[name] for name in ("eval_loss", "eval_penalty", "eval_rewards/margins")}

    assert evaluated(torch_compile_backend="eager") == pytest.approx(evaluated(), rel=1e-5)
