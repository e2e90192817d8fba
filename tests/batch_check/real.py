"""Pairs from GSM8K (MIT, fastdpop/assets) and the log-probs of all their tokens under SmolLM2-135M-Instruct, recorded.

    python -m tests.batch_check.real     # records them anew, in ten minutes on a CPU

Log-probs under four models: ``policy``, in float32; ``bf16``, the same in bfloat16; ``other``, without two of its 30
layers, as another, worse reference; and ``foreign``, the policy on ids that were renumbered, as they are to a reference
with another tokenizer. A truncated sequence has the log-probs of its beginning.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdpop.batch_check import scores
from fastdpop.batch_check.view import BatchView
from fastdpop.data.gsm8k import shipped_pairs

FILE = Path(__file__).with_name("smollm2.npz")
MODELS = ("policy", "bf16", "other", "foreign")
VOCABULARY, BOS, END = 49152, 1, 2


@dataclass(frozen=True)
class Pair:
    """Ids, and by model the log-probs of both sequences' tokens, 0 for the first."""

    kind: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    logps: dict[str, tuple[Tensor, Tensor]]


def load() -> list[Pair]:
    """What is recorded."""
    data = np.load(FILE)
    ids, parts, kinds = data["ids"].tolist(), data["parts"].tolist(), data["kinds"].tolist()
    values = {name: torch.from_numpy(data[name]).double() for name in MODELS}
    pairs, at, of = [], 0, 0
    for kind, (p, c, r) in zip(kinds, parts, strict=True):
        prompt, chosen, rejected = (
            ids[at : at + p], ids[at + p : at + p + c], ids[at + p + c : at + p + c + r],
        )  # fmt: skip
        ends = (of, of + p + c, of + 2 * p + c + r)
        logps = {n: (v[ends[0] : ends[1]], v[ends[1] : ends[2]]) for n, v in values.items()}
        pairs.append(Pair(kind, prompt, chosen, rejected, logps))
        at, of = at + p + c + r, ends[2]
    return pairs


class Tokenizer:
    """What a check reads of SmolLM2's, whose padding token is its end of a turn."""

    pad_token_id = eos_token_id = END
    bos_token_id = BOS

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class Recorded:
    """In the place of the model and of what runs it: looks log-probs up by the ids."""

    def __init__(self, pairs: list[Pair], name: str = "policy") -> None:
        self.model, self.training, self.passes = self, [], 0
        self.dtype = torch.bfloat16 if name == "bf16" else torch.float32
        self.rows = [
            (torch.tensor(pair.prompt + side), logps)
            for pair in pairs
            for side, logps in zip((pair.chosen, pair.rejected), pair.logps[name], strict=True)
        ]

    def parameters(self) -> Iterator[Tensor]:
        yield torch.empty(0, dtype=self.dtype)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        return iter(())

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.empty(VOCABULARY, 0))

    def logps(self, view: BatchView, dropping: bool = False) -> Tensor:
        assert not dropping
        self.passes += 1
        found = torch.zeros(view.ids.shape, dtype=torch.float64)
        for row, ids in enumerate(view.ids):
            own = ids[view.attended[row]]
            known, logps = next(
                (known, logps)
                for known, logps in self.rows
                if torch.equal(known[: len(own)], own[: len(known)])
                and bool((own[len(known) :] == END).all())  # padding without a mask
            )
            places = view.attended[row].nonzero()[: len(known), 0]
            found[row, places] = logps[: len(places)]
        return found


@contextmanager
def _running(model: Recorded) -> Iterator[Recorded]:
    yield model


def patch(monkeypatch: Any) -> None:
    """Have recorded models answer."""
    monkeypatch.setattr(scores, "running", _running)
    monkeypatch.setattr(scores, "why_not", lambda _: None)


# ---- recording ----------------------------------------------------------------------------------


def _pairs(tokenizer: Any) -> Iterator[tuple[str, list[int], list[int], list[int]]]:
    """Solutions with one wrong number, solutions of other problems, numbers alone; as chats and as text."""
    rows, end = shipped_pairs("train")[:36], [END]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for i, row in enumerate(rows):
        question, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        kind = ("edit", "far", "number")[i % 3]
        if kind == "far":
            rejected = rows[i - 1]["chosen"]
        if kind == "number":
            question, chosen, rejected = f"{question}\nFirst digit of the answer: ", chosen[-1], "0"
            rejected = "0" if chosen != "0" else "5"
        if i % 2:
            message = [{"role": "user", "content": question}]
            chat = {"add_generation_prompt": True, "return_dict": False}
            prompt = list(tokenizer.apply_chat_template(message, **chat))
            tail = [] if kind == "number" else end + newline
        else:
            prompt, tail = ids(question), [] if kind == "number" else end
        yield kind, prompt, ids(chosen) + tail, ids(rejected) + tail


@torch.no_grad()
def _logps(model: Any, ids: list[int]) -> list[float]:
    given = torch.tensor([ids])
    every = model(given).logits[0, :-1].float().log_softmax(-1)
    return [0.0, *every.gather(-1, given[0, 1:, None])[:, 0].tolist()]


def record() -> None:
    """Write the file."""
    from fastdpop.demo import load_smollm2

    model, tokenizer = load_smollm2()
    other = copy.deepcopy(model)
    del other.model.layers[15:17]
    pairs = list(_pairs(tokenizer))
    random.Random(0).shuffle(pairs)
    sequences = [p + side for _, p, *sides in pairs for side in sides]
    found: dict[str, Any] = {}
    for name in MODELS:
        asked = {"bf16": model, "other": other}.get(name, model)
        if name == "bf16":
            asked = copy.deepcopy(model).bfloat16()
        foreign = name == "foreign"
        values = [
            _logps(asked, [(i * 7919 + 13) % VOCABULARY for i in ids] if foreign else ids)
            for ids in sequences
        ]
        found[name] = np.array([*chain.from_iterable(values)], dtype=np.float16)
        print(name, flush=True)
    ids = [*chain.from_iterable(p + c + r for _, p, c, r in pairs)]
    np.savez_compressed(
        FILE,
        ids=np.array(ids, dtype=np.uint16),
        parts=np.array([[len(p), len(c), len(r)] for _, p, c, r in pairs], dtype=np.int32),
        kinds=np.array([kind for kind, *_ in pairs]),
        **found,
    )


if __name__ == "__main__":
    record()
