"""Whole training steps with prefixes shared, against the same without, and against TRL's ``DPOTrainer``.

SmolLM2-135M on pairs of three kinds: GSM8K solutions with one result made wrong, to the bare question and behind four
worked examples, and questions with four short choices, three pairs each. A step is a reference under ``no_grad``, the
policy, and its backward pass, in bf16 autocast over fp32 weights, without gradient checkpointing, which is everybody's
fastest. The others' steps are timed in turn with ours.
"""

from __future__ import annotations

import copy
import functools
import random
import statistics
import time
import warnings
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.memory import peak_extra_bytes, release_freed_memory
from bench.test_trl import _model_and_tokenizer, _pairs, _skip_without_packages

ROUNDS = 3
PADDED, TRL = "padded", "TRL"

CHOICES = (
    (55, 15, (14, 16, 18)),
    (21, 9, (9, 9, 9)),
    (39, 9, (7, 10, 12)),
    (35, 5, (3, 3, 3)),
)
"""Tokens of four questions of ARC-Challenge: the prompt, the right answer, the three wrong ones."""


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def _solutions(tokenizer: Any, pairs: int, shots: int) -> list[Pair]:
    rows = _pairs(100)

    def turn(row: dict[str, str]) -> str:
        return f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"

    examples = "".join(
        f"{turn(row)}{row['chosen']}<|im_end|>\n" for row in list(rows)[pairs : pairs + shots]
    )
    texts = [
        (examples + turn(row), *(f"{row[side]}<|im_end|>" for side in ("chosen", "rejected")))
        for row in list(rows)[:pairs]
    ]
    return [Pair(*(tokenizer(text)["input_ids"] for text in row)) for row in texts]


def _choices(vocabulary: int) -> list[Pair]:
    tokens = random.Random(0)

    def ids(count: int) -> list[int]:
        return [tokens.randrange(3, vocabulary) for _ in range(count)]

    pairs = []
    for prompt, right, wrong in CHOICES:
        question, answer = ids(prompt), ids(right)
        pairs += [Pair(question, answer, ids(length)) for length in wrong]
    return pairs


WORKLOADS: dict[str, Callable[[Any, int], list[Pair]]] = {
    "GSM8K, zero-shot": lambda tokenizer, _: _solutions(tokenizer, 8, 0),
    "GSM8K, four-shot": lambda tokenizer, _: _solutions(tokenizer, 4, 4),
    "multiple choice": lambda _, vocabulary: _choices(vocabulary),
}


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
    from fastdpop.prefix.tree import build_tree

    release_freed_memory()
    model, tokenizer = _model_and_tokenizer(quick)
    if quick:
        pairs = _choices(90)
    else:
        pairs = WORKLOADS[workload](tokenizer, len(tokenizer))
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

    sequences = [p.prompt + completion for p in pairs for completion in (p.chosen, p.rejected)]
    return Steps(
        by_name={name: functools.partial(step, trainer) for name, trainer in trainers.items()},
        forget=forget,
        tokens={
            "padded": batch["input_ids"].numel(),
            "real": sum(map(len, sequences)),
            "tree": len(build_tree(sequences).input_ids),
        },
    )


@pytest.mark.parametrize("workload", WORKLOADS)
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

    all_in_turn()
    for taken in times.values():
        taken.clear()
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
