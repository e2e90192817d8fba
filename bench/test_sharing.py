"""Whole training steps with prefixes shared, against the same without, and against TRL's ``DPOTrainer``.

SmolLM2-135M on the pairs of :mod:`bench.pairs`, of which more in a batch are more than 24 GB hold of TRL's logits.

A step is a reference under ``no_grad``, the policy, and its backward pass, in TRL's trainer, bf16, without gradient
checkpointing, which is everybody's fastest. All take turns.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import pairs as workloads
from bench.memory import peak_extra_bytes, release_freed_memory
from bench.test_trl import _model_and_tokenizer, _pairs, _skip_without_packages

ROUNDS = 3
PADDED, TRL = "padded", "TRL"


class Steps(NamedTuple):
    """One function a contender, each a whole step; ours first."""

    by_name: dict[str, Callable[[], Any]]
    forget: Callable[[], None]
    tokens: dict[str, int]


@functools.lru_cache(maxsize=1)
def steps(workload: str, device: str, quick: bool) -> Steps:
    """Trainers of equal weights on the same pairs."""
    from trl import DPOConfig, DPOTrainer

    from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer

    release_freed_memory()
    model, tokenizer = _model_and_tokenizer(quick)
    pairs = workloads.choices(90) if quick else workloads.WORKLOADS[workload](len(tokenizer))
    kinds = {
        "shared": (FastDPOTrainer, FastDPOConfig, {"share_prefixes": True}),
        PADDED: (FastDPOTrainer, FastDPOConfig, {}),
        TRL: (DPOTrainer, DPOConfig, {}),
    }
    trainers = {}
    for name, (kind, config, own) in kinds.items():
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainers[name] = kind(
                copy.deepcopy(model),
                ref_model=copy.deepcopy(model),
                args=config(
                    folder,
                    bf16=True,
                    gradient_checkpointing=False,
                    max_length=None,
                    use_cpu=device == "cpu",
                    report_to=[],
                    disable_tqdm=True,
                    **own,
                ),
                train_dataset=_pairs(1),
                processing_class=tokenizer,
            )
        trainers[name].current_gradient_accumulation_steps = 1  # as train() sets it
    rows = [
        {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
        for pair in pairs
    ]
    batch = trainers[TRL].data_collator(rows)
    batch = {name: value.to(device) for name, value in batch.items()}

    def step(trainer: Any) -> Any:
        return trainer.training_step(trainer.model, dict(batch))

    def forget() -> None:
        for trainer in trainers.values():
            trainer.model.zero_grad(set_to_none=True)

    return Steps(
        by_name={name: functools.partial(step, trainer) for name, trainer in trainers.items()},
        forget=forget,
        tokens=workloads.tokens(pairs),
    )


@pytest.mark.parametrize("workload", workloads.WORKLOADS)
def test_a_step(
    benchmark: BenchmarkFixture,
    rows: list[dict[str, Any]],
    quick: bool,
    device: str,
    workload: str,
) -> None:
    _skip_without_packages(quick)
    made = steps(workload, device, quick)
    benchmark.group = f"a training step with shared prefixes, {workload}"
    peaks = {name: peak_extra_bytes(step, device)[0] for name, step in made.by_name.items()}
    times: dict[str, list[float]] = {name: [] for name in made.by_name}

    def all_in_turn() -> None:
        for name, step in made.by_name.items():
            made.forget()
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)

    # Measuring the memory has warmed everybody up.
    benchmark.pedantic(all_in_turn, rounds=1 if quick else ROUNDS)
    if benchmark.disabled:
        return
    shared = times["shared"]
    row: dict[str, Any] = {
        "kind": "sharing",
        "workload": workload,
        "rounds": len(shared),
        "seconds": statistics.median(shared),
        "tokens": made.tokens,
        "peak_extra_bytes": peaks,
    }
    for name in (PADDED, TRL):
        ratios = (theirs / ours for theirs, ours in zip(times[name], shared, strict=True))
        row[f"over_{name.lower()}"] = statistics.median(ratios)
    benchmark.extra_info.update(row)
    rows.append(row)
