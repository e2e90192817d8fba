"""Whole training steps of a model with Llama 3.2-1B's sizes, with prefixes shared and padded."""

from __future__ import annotations

import copy
import functools
import re
import statistics
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import fastdpop
from bench import pairs as workloads
from bench.chip.results import Results
from bench.chip.setup import Setup, free
from bench.chip.timing import Row, rounds_of, timed
from bench.memory import peak_extra_bytes
from bench.workloads import LOSSES
from tools.kernels.h100 import RATES

SHARED, PADDED = "shared", "padded"

LARGEST_DIFFERENCE = 2e-3
"""Of the log-probs of sequences, shared and padded, in relation to them (norms). On a CPU, with as many layers,
rounding is up to 5e-4, and one token too many that all those of the row see makes it 5e-3 and more.
"""


def part_sharing(setup: Setup, results: Results) -> None:
    """A step on each of the workloads, shared, then padded in turn with shared."""
    for name, copies in setup.copies.items():
        _steps_on(setup, results, name, copies)
        free()


def _steps_on(setup: Setup, results: Results, name: str, copies: int) -> None:
    pairs = workloads.WORKLOADS[name](setup.model["vocab_size"], copies)
    # Anew for each workload: a model says only once that it does not share.
    models = functools.cache(lambda: Models(setup))
    for contender in (SHARED, PADDED):

        def one(contender: str = contender) -> None:
            row = {"workload": name, "contender": f"fastdpop, {contender}"}
            row |= measure(setup, models(), pairs, contender)
            peak = peak_of(results.data["device"])
            results.add("sharing", row | ({"mfu": row["flops"] / peak} if peak else {}))

        if not results.case(f"{name}: fastdpop, {contender}", one):
            break  # padded has nothing to be compared with


class Models:
    """A policy and a reference of equal random weights, in bfloat16, made on the device."""

    def __init__(self, setup: Setup) -> None:
        # The other parts need no transformers.
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.device = setup.device
        with torch.random.fork_rng(), torch.device(setup.device):
            torch.manual_seed(0)
            policy = AutoModelForCausalLM.from_config(
                LlamaConfig(use_cache=False, **setup.model), dtype=torch.bfloat16
            )
        self.policy = fastdpop.attach(policy.train())
        self.reference = copy.deepcopy(self.policy).eval().requires_grad_(False)

    def step(self, batch: Mapping[str, Tensor], contender: str) -> Tensor:
        """A reference under no_grad, the policy and its backward pass; log-probs ``(2P,)``."""
        options = {"preference_options": {"share_prefixes": contender == SHARED}}
        loss = LOSSES["dpop"].fused()
        with torch.no_grad():
            ref_logps = self.reference(**batch, return_logps=True, **options).logps
        output = self.policy(**batch, preference=loss, ref_logps=ref_logps, **options)
        output.loss.backward()
        return output.logps.detach()

    def forget(self) -> None:
        self.policy.zero_grad(set_to_none=True)


def measure(setup: Setup, models: Models, pairs: list[workloads.Pair], contender: str) -> Row:
    """Rounds of one contender, each behind one of the other where that is shared.

    Raises:
        AssertionError: log-probs differ by more than rounding.
        UserWarning: prefixes were not shared.
    """
    batch = padded(pairs, models.device)
    others = [] if contender == SHARED else [SHARED]

    def seconds(name: str) -> float:
        models.forget()
        return timed(lambda: models.step(batch, name), setup.device)

    try:
        with warnings.catch_warnings():
            # A step that falls back on the padded batch, or on slow attention, is none of ours.
            warnings.filterwarnings("error", "share_prefixes |attention over a prefix tree ")
            logps = models.step(batch, contender)  # compiles, and compares shared with padded
            models.forget()
            peak, _ = peak_extra_bytes(lambda: models.step(batch, contender), setup.device)
            for other in others:
                models.forget()
                check(models.step(batch, other), logps)
            times: dict[str, list[float]] = {name: [] for name in (*others, contender)}
            for _ in range(rounds_of(setup, seconds(contender))):
                for name, of in times.items():
                    of.append(seconds(name))
    finally:
        models.forget()
    own, counts = times[contender], workloads.tokens(pairs)
    took = statistics.median(own)
    row: Row = {
        "pairs": len(pairs),
        **{f"{kind}_tokens": count for kind, count in counts.items()},
        "rounds": len(own),
        "seconds": took,
        "tokens_per_second": counts["real"] / took,
        "flops": step_flop(models.policy.config, pairs) / took,
        "peak_extra_bytes": peak,
    }
    if others:
        ratios = (padded / shared for padded, shared in zip(own, times[SHARED], strict=True))
        row["to_shared"] = statistics.median(ratios)
    return row


def padded(pairs: list[workloads.Pair], device: str) -> dict[str, Tensor]:
    """``(2P, T)`` ids, mask and labels, chosen sequences first."""
    prompts = [len(pair.prompt) for pair in pairs] * 2
    every = [torch.tensor(ids) for ids in workloads.sequences(pairs)]
    labels = [ids.clone() for ids in every]
    for of, prompt in zip(labels, prompts, strict=True):
        of[:prompt] = -100

    def batch(rows: list[Tensor], fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    found = {
        "input_ids": batch(every, 0),
        "attention_mask": batch([torch.ones_like(ids) for ids in every], 0),
        "labels": batch(labels, -100),
    }
    return {name: tensor.to(device) for name, tensor in found.items()}


def check(shared: Tensor, expected: Tensor) -> None:
    """
    Raises:
        AssertionError: log-probs ``(2P,)`` differ by more than rounding.
    """
    difference = ((shared - expected).norm() / expected.norm()).item()
    if not difference <= LARGEST_DIFFERENCE:
        raise AssertionError(
            f"log-probs of sequences differ by {difference:.1e} from the padded batch's"
        )


def step_flop(config: Any, pairs: list[workloads.Pair]) -> float:
    """Model FLOPs of a step: what the sequences need one by one, whoever computes less or more.

    Forward, of a sequence of t tokens: ``2 t`` for each weight of the layers' matrices, ``4 t (t + 1) / 2`` for each
    number of a query, in each layer, and ``2 V H`` for each scored token. A step is four times that: the reference's
    and the policy's forward pass, and a backward pass that is two of them.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    matrices = width * (2 * query + 2 * key + 3 * config.intermediate_size)
    flop = 2.0 * config.vocab_size * width * sum(pair.scored for pair in pairs)
    for t in map(len, workloads.sequences(pairs)):
        flop += layers * (2.0 * t * matrices + 2.0 * query * t * (t + 1))
    return 4 * flop


def peak_of(device: str) -> float | None:
    """Dense bfloat16 operations per second of the SXM cards; None where it is not known."""
    known = re.search(r"H[12]00(?!.*(PCIe|NVL))", device)
    return RATES["989"] if known else None
