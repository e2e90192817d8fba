"""What is measured, and by whom."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import contenders
from bench.contenders import Contender
from bench.workloads import MODES, Batch, Shape
from fastdpop import engines

TRAINED, FROZEN, LOGPS = MODES
MATRIX_PRODUCTS = {LOGPS: 1, FROZEN: 2, TRAINED: 3}
"""Of 2 * N * V * H operations each."""


LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2_048,
    "intermediate_size": 8_192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""Llama 3.2-1B's sizes."""


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        device: where.
        heads: width and vocabulary by name. Gemma's softcap is left out: of the peers, few take one.
        main: the head and the number of rows of the main part.
        rows: all numbers of rows, the main one first.
        completion: tokens of a completion.
        peers: who is measured beside us, what matters most first.
        model: sizes of the model of whole steps.
        copies: of each workload of :mod:`bench.pairs`: how many times its pairs. Without gradient checkpointing, a
            padded token takes 2 MB of such a model, and these batches up to 40 GB.
        seconds: about how long a case takes.
        repeated: how often gradients are compared bit for bit.
    """

    device: str = "cuda"
    heads: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: {
            "Llama-3-8B": (4_096, 128_256),
            "Qwen3-8B": (4_096, 151_936),
            "Gemma-2-2B": (2_304, 256_000),
        }
    )
    main: tuple[str, int] = ("Llama-3-8B", 8_192)
    rows: tuple[int, ...] = (8_192, 2_048, 32_768)
    completion: int = 512
    peers: tuple[str, ...] = (
        "gather, fp32 upcast",
        "checkpointed chunks",
        "Liger",
        "TRL, scored rows",
        "F.linear_cross_entropy",
        "gather, fp32 upcast, compiled",
    )
    model: Mapping[str, Any] = field(default_factory=lambda: LLAMA_1B)
    copies: Mapping[str, int] = field(
        default_factory=lambda: {
            "GSM8K, zero-shot": 8,
            "GSM8K, four-shot": 6,
            "ARC-Challenge": 8,
        }
    )
    seconds: float = 1.5
    repeated: int = 20

    def shape(self, head: str, rows: int) -> Shape:
        """Pairs of completions, `rows` in all."""
        width, vocabulary = self.heads[head]
        pairs = rows // (2 * self.completion)
        return Shape(pairs, 16, self.completion, hidden=width, vocabulary=vocabulary)

    def random_batch(self, of: Shape, dtype: torch.dtype) -> Batch:
        """A batch of `make bench`'s kind, made where it is used: on the CPU, a head takes seconds."""
        generator = torch.Generator(self.device).manual_seed(0)
        count, length = 2 * of.pairs, of.prompt + of.completion
        options = {"generator": generator, "device": self.device}
        hidden = torch.randn(count, length, of.hidden, **options).to(dtype)
        weight = torch.randn(of.vocabulary, of.hidden, **options).mul_(4.0 * of.hidden**-0.5)
        labels = torch.randint(of.vocabulary, (count, length), **options)
        labels[:, : of.prompt] = -100
        sequences, at = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        return Batch(
            hidden.requires_grad_(),
            weight.to(dtype).requires_grad_(),
            labels,
            hidden.detach()[sequences, at],
            labels[sequences, at + 1],
            sequences,
            0,
        )


# Baselines that `make bench` does not have.


def _checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    parts = zip(hidden.split(1_024), targets.split(1_024), strict=True)
    return torch.cat(
        [checkpoint(contenders.upcast, h, weight, y, use_reentrant=False) for h, y in parts]
    )


def _compiled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.compile(contenders.upcast, dynamic=False)(hidden, weight, targets)


EXTRA = {
    "checkpointed chunks": Contender(contenders.of_rows(_checkpointed)),
    "gather, fp32 upcast, compiled": Contender(contenders.of_rows(_compiled), compiles=True),
}


def contender(name: str) -> Contender:
    """Of `make bench`, or of those above."""
    return EXTRA.get(name) or contenders.contender(name)


def names_of_ours(device: str) -> list[str]:
    """The default choice, and what it chooses from: its own kernels for all products, the other
    forward product, smaller chunks.
    """
    auto = contenders.ours(device)[0]
    names = [auto]
    if auto == "fastdpop triton":
        from fastdpop.engines.triton import TritonEngine

        for name, options in (
            ("triton-kernels", {"products": "kernels"}),
            ("triton-gluon", {"forward": "gluon"}),
        ):
            if name not in engines.available(device, torch.bfloat16):
                engines.register(TritonEngine(name=name, **options), first=False)
            names.append(f"fastdpop {name}")
    return [*names, f"{auto} in 512 MiB"]


def free() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
