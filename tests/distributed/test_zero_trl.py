"""TRL's trainer under DeepSpeed's ZeRO on two processes, with fastdpop."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastdpop
from tests.distributed.pool import Pool
from tests.distributed.zero_models import RANKS, config, deepspeed
from tests.tiny_model import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: make test-distributed",
)


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    """Two processes of their own: DeepSpeed replaces torch.nn.functional.linear for good."""
    pool = Pool(RANKS)
    yield pool
    pool.stop()


STEPS = 4


def _on_cpus() -> None:
    """On a machine without an accelerator, accelerate leaves out DeepSpeed in silence unless it is told the backend."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the case before
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


def _trainer(folder: str, stage: int, output: str, **options: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    deepspeed()
    _on_cpus()
    words = ["a b c", "b c d", "c d e", "d a b"]
    pairs = [{"prompt": w, "chosen": " " + v, "rejected": " " + w} for w in words for v in words]
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    auto["gradient_accumulation_steps"] = "auto"
    settings: dict[str, Any] = {
        "loss_type": "dpop",
        "beta": 0.3,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "deepspeed": {**config(stage), **auto},
        "accelerator_config": {"use_configured_state": True},
        "bf16": False,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    fastdpop.patch_trl()
    trainer = DPOTrainer(
        folder,
        args=DPOConfig(output, **settings, **options),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tiny_tokenizer(),
    )
    assert trainer.args.world_size == RANKS
    return trainer


def _log(trainer: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    found = [(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "loss" in x]
    return [(loss, float(norm)) for loss, norm in found]


def _train(rank: int, folder: str, output: str, stage: int, options: Any) -> Any:
    trainer = _trainer(folder, stage, output, **options)
    trainer.train()
    assert trainer.model_wrapped.zero_optimization_stage() == stage
    if stage == 3:
        assert all(p.numel() == 0 for p in trainer.model.parameters() if not p.ds_persist)
    return _log(trainer)


def _resume(rank: int, folder: str, output: str) -> Any:
    trainer = _trainer(folder, 3, output)
    trainer.train(resume_from_checkpoint=f"{output}/checkpoint-2")
    return _log(trainer)[-2:]


PRECOMPUTED = {"precompute_ref_log_probs": True}


def test_trl(two: Pool, tmp_path: Path) -> None:
    """Whatever the stage, with either reference; and what was saved in pieces goes on to the bit.

    TRL precomputes in other batches than it trains on, so log-probs differ by rounding, at which DPOP's hinge may be
    on: the two references are not compared with each other.
    """
    folder, output = str(tmp_path / "model"), str(tmp_path / "run")
    tiny_llama(tied=False).save_pretrained(folder)
    runs = {}
    for stage in (2, 3):
        for name, options in (("live", {}), ("precomputed", PRECOMPUTED)):
            runs[stage, name] = two.run(_train, folder, output + name, stage, options)[0]
    for case, found in runs.items():
        want = runs[2, case[1]]
        assert len(want) == STEPS
        assert want[0][0] == pytest.approx(0.6931, abs=1e-4)
        assert want[-1][0] != want[0][0]
        assert found[0] == pytest.approx(want[0], rel=1e-6), case
        for step in range(1, STEPS):  # DPOP multiplies what rounding makes of the first
            assert found[step] == pytest.approx(want[step], rel=1e-4), case
    assert two.run(_resume, folder, output + "live")[0] == runs[3, "live"][-2:]
