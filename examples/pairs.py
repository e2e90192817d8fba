"""The model and the batches of the other examples: yours, or tiny made-up ones."""

from __future__ import annotations

import argparse
import random
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import fastdpop
from fastdpop.data import load_pairs
from fastdpop.data.tokens import tokenize

Row = dict[str, list[int]]
"""Token ids: ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``."""


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model", help="a causal language model with its tokenizer; default: a tiny random one"
    )
    parser.add_argument(
        "--pairs", help="a JSON Lines file with prompt, chosen, rejected; default: made-up pairs"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-pairs", type=int, default=4)
    options = parser.parse_args()
    if (options.model is None) != (options.pairs is None):
        parser.error("--model and --pairs belong together")
    return options


def load(options: argparse.Namespace) -> tuple[Any, DataLoader[Row]]:
    """A model in evaluation mode (no dropout), and batches of chosen sequences followed by the rejected ones."""
    torch.manual_seed(0)
    if options.model is None:
        model, rows, pad = _tiny(), _made_up(32), 0
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        pairs = load_pairs(options.pairs).dataset
        rows, _ = tokenize(pairs, tokenizer, vocab_size=model.config.vocab_size)
        pad = tokenizer
    collate = partial(fastdpop.collate, tokenizer=pad)
    batches = DataLoader(rows, batch_size=options.batch_pairs, shuffle=True, collate_fn=collate)
    return model.eval(), batches


def _tiny() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, **tokens))


def _made_up(count: int) -> list[Row]:
    """Chosen completions count upwards; one number of a rejected one is wrong."""
    chance, pairs = random.Random(0), []
    for _ in range(count):
        start, length = chance.randrange(3, 100), chance.randrange(6, 16)
        right = list(range(start + 3, start + length))
        wrong = list(right)
        wrong[chance.randrange(len(wrong))] = chance.randrange(3, 100)
        prompt = list(range(start, start + 3))
        pairs.append({"prompt_ids": prompt, "chosen_ids": [*right, 2], "rejected_ids": [*wrong, 2]})
    return pairs
