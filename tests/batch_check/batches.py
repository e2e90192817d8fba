"""Good batches of recorded pairs, in all the ways that loops lay them out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.batch_check.real import END, Pair

Batch = dict[str, Any]


@dataclass
class Made:
    """A batch, and what was done.

    Attributes:
        cut: how many tokens of each sequence are left.
        options: further arguments of ``check_batch``.
    """

    batch: Batch
    pairs: list[Pair]
    cut: int
    layout: str
    options: dict[str, Any] = field(default_factory=dict)

    def references(self, name: str = "policy", whole: bool = False) -> Tensor:
        """``(2B,)`` sums over completions, or over all tokens."""
        return torch.stack(
            [
                pair.logps[name][side][(1 if whole else len(pair.prompt)) : self.cut].sum()
                for side in (0, 1)
                for pair in self.pairs
            ]
        )


LAYOUTS = ("right", "left", "no mask", "trl", "packed", "wide", "pairs", "shift_labels")


def made(pairs: list[Pair], layout: str = "right", cut: int = 10_000) -> Made:
    """A batch of pairs, padded with the end token as SmolLM2 is."""
    sequences = [
        (len(p.prompt), torch.tensor((p.prompt + side)[:cut]))
        for sides in (lambda p: p.chosen, lambda p: p.rejected)
        for p, side in ((p, sides(p)) for p in pairs)
    ]
    width = max(len(ids) for _, ids in sequences) + (5 if layout == "wide" else 0)
    shape = (len(sequences), width)
    ids = torch.full(shape, END)
    labels, mask = torch.full(shape, -100), torch.zeros(shape, dtype=torch.int64)
    for row, (prompt, own) in enumerate(sequences):
        at = width - len(own) if layout == "left" else 0
        ids[row, at : at + len(own)] = own
        mask[row, at : at + len(own)] = 1
        labels[row, at + prompt : at + len(own)] = own[prompt:]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    result = Made(batch, pairs, cut, layout)
    if layout == "no mask":
        del batch["attention_mask"]
    elif layout == "trl":
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
        chosen, rejected = result.references().chunk(2)
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    elif layout == "packed":
        bounds = torch.tensor([0, *(len(own) for _, own in sequences)]).cumsum(0)
        kept = mask.bool()
        result.batch = {"input_ids": ids[kept][None], "labels": labels[kept][None]}
        result.options["cu_seqlens"] = bounds
    elif layout == "pairs":
        order = torch.arange(len(ids)).view(2, -1).T.flatten()
        result.batch = {name: value[order] for name, value in batch.items()}
        result.options["pairs"] = torch.arange(len(ids)).view(-1, 2)
    elif layout == "shift_labels":
        rolled = torch.cat([batch.pop("labels")[:, 1:], torch.full((len(ids), 1), -100)], 1)
        batch["shift_labels"] = rolled
    return result


def reference_for(made_batch: Made, name: str = "policy") -> Any:
    """Reference log-probs in the form that goes with the layout."""
    values = made_batch.references(name)
    if made_batch.layout == "trl" and name == "policy":
        return None  # in the batch
    if made_batch.layout == "pairs":
        return values.view(2, -1).T.flatten()
    return tuple(values.chunk(2)) if made_batch.layout == "wide" else values


def good(pairs: list[Pair], count: int, seed: int = 0, least: int = 1) -> Iterator[Made]:
    """Batches of `least` to 8 pairs, of one kind or mixed, some truncated, in all layouts by turns."""
    chance = random.Random(seed)
    kinds = sorted({pair.kind for pair in pairs})
    for number in range(count):
        of = pairs
        if chance.random() < 0.5:
            kind = chance.choice(kinds)
            of = [pair for pair in pairs if pair.kind == kind]
        own = chance.sample(of, min(chance.choice((1, 2, 3, 4, 8)) + least - 1, len(of)))
        cut = 10_000
        if (
            chance.random() < 0.2
        ):  # by a greatest length, which leaves tokens of each completion that differ
            cut = max(
                len(p.prompt)
                + max(first_difference(p) + 1, min(len(p.chosen), len(p.rejected)) // 2)
                for p in own
            )
        yield made(own, LAYOUTS[number % len(LAYOUTS)], cut)


def first_difference(pair: Pair) -> int:
    """Of its completions."""
    both = zip(pair.chosen, pair.rejected, strict=False)
    return next((i for i, (c, r) in enumerate(both) if c != r), 0)
