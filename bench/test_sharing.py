"""Whole training steps with prefixes shared, against the same without, and against TRL's ``DPOTrainer``.

SmolLM2-135M on pairs of three kinds: GSM8K solutions with one result made wrong, to the bare question and behind four
worked examples, and questions of ARC-Challenge with three pairs each. The ids are random. The lengths are those of the
median batch (in tokens padded to tokens in the tree) of 200 random ones of four training problems, and of 100 of two,
in SmolLM2's chat template, and those of four questions. Larger batches gain more, and are more than 24 GB hold of TRL's
logits.

A step is a reference under ``no_grad``, the policy, and its backward pass, in TRL's trainer, bf16, without gradient
checkpointing, which is everybody's fastest. All take turns.
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


class Lengths(NamedTuple):
    """Of a pair, in tokens: its prompt, the beginning that both completions have, and the rest of each."""

    prompt: int
    common: int
    chosen: int
    rejected: int


ZERO_SHOT = [
    *(Lengths(68, 11, 40, 40), Lengths(67, 34, 31, 30)),
    *(Lengths(135, 26, 82, 82), Lengths(124, 13, 116, 116)),
]
FOUR_SHOT = [Lengths(722, 26, 57, 58), Lengths(733, 49, 30, 30)]
CHOICES = ((55, 15, (14, 16, 18)), (21, 9, (9, 9, 9)), (39, 9, (7, 10, 12)), (35, 5, (3, 3, 3)))
"""Of a question: its prompt, the right answer, and the wrong ones."""


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def _solutions(lengths: list[Lengths], header: int, vocabulary: int) -> list[Pair]:
    """Pairs of such lengths whose prompts begin alike, with `header` tokens."""
    ids = _random_ids(vocabulary)
    begin = ids(header)
    pairs = []
    for each in lengths:
        common = ids(each.common)
        completions = (common + ids(each.chosen), common + ids(each.rejected))
        pairs.append(Pair(begin + ids(each.prompt - header), *completions))
    return pairs


def _choices(vocabulary: int) -> list[Pair]:
    ids = _random_ids(vocabulary)
    pairs = []
    for prompt, right, wrong in CHOICES:
        question, answer = ids(prompt), ids(right)
        pairs += [Pair(question, answer, ids(length)) for length in wrong]
    return pairs


def _random_ids(vocabulary: int) -> Callable[[int], list[int]]:
    source = random.Random(0)
    return lambda count: [source.randrange(3, vocabulary) for _ in range(count)]


WORKLOADS: dict[str, Callable[[int], list[Pair]]] = {
    "GSM8K, zero-shot": lambda vocabulary: _solutions(ZERO_SHOT, 24, vocabulary),
    "GSM8K, four-shot": lambda vocabulary: _solutions(FOUR_SHOT, 669, vocabulary),
    "ARC-Challenge": _choices,
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
    pairs = _choices(90) if quick else WORKLOADS[workload](len(tokenizer))
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
