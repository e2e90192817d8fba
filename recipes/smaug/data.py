"""Preference pairs of GSM8K and ARC-Challenge as token ids, in the order in which a run trains."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from fastdpop.data.build import build
from fastdpop.data.gsm8k import shipped_problems
from fastdpop.data.tokens import tokenize
from recipes.smaug.runs import Run

Row = dict[str, Any]
Group = list[Row]
"""The pairs of one prompt."""

HUB = {"gsm8k": ("openai/gsm8k", "main"), "arc": ("allenai/ai2_arc", "ARC-Challenge")}
"""Name and configuration of each data set."""
FOLDERS = {"gsm8k": "gsm8k", "arc": "arc_challenge"}
HELD_OUT_SEED = 0
"""The same held-out pairs for all seeds."""


@dataclass(frozen=True)
class Source:
    """Where the data sets come from.

    Attributes:
        kind: ``"hub"``, ``"folder"``, or ``"excerpt"``: GSM8K problems that the package brings along.
        folder: with ``gsm8k/`` and ``arc_challenge/``, each of ``train.jsonl`` and ``test.jsonl``.
    """

    kind: str
    folder: Path | None = None

    def data_sets(self) -> list[str]:
        """Those that there are."""
        return ["gsm8k"] if self.kind == "excerpt" else ["gsm8k", "arc"]

    def file(self, data: str, split: str) -> Path:
        """A split in the folder."""
        assert self.folder is not None
        return self.folder / FOLDERS[data] / f"{split}.jsonl"

    def identity(self, data: str) -> str:
        """Equal only for equal data, wherever they are.

        Raises:
            OSError: a file is missing.
        """
        if self.kind == "folder":
            digest = hashlib.sha256()
            for split in ("train", "test"):
                digest.update(self.file(data, split).read_bytes())
            return f"sha256:{digest.hexdigest()[:16]}"
        return "excerpt" if self.kind == "excerpt" else "/".join(HUB[data])

    def pairs(self, data: str, split: str, seed: int) -> Iterator[Row]:
        """Pairs of text, as ``fastdpop pairs build`` makes them."""
        if self.kind == "excerpt":
            return build(data, Dataset.from_list(shipped_problems(split)), seed=seed)
        if self.kind == "folder":
            return build(data, self.file(data, split), seed=seed)
        name, config = HUB[data]
        return build(data, name, config=config, split=split, seed=seed)


@dataclass(frozen=True)
class Sets:
    """What a run needs, tokenised.

    Attributes:
        batches: the groups of each training step.
        train: watched pairs, of the first groups that are trained on.
        held_out: watched pairs of the test split.
        questions: of the test split, if they are asked: all pairs of each.
    """

    batches: list[list[Group]]
    train: list[Row]
    held_out: list[Row]
    questions: list[Group]


def load_sets(run: Run, source: Source, tokenizer: Any) -> Sets:
    """The pairs of a run.

    Raises:
        ValueError: there are fewer groups than are to be watched.
    """
    plan = run.schedule
    rng = random.Random(run.seed)
    needed = plan.steps * plan.groups
    groups = _drawn(source.pairs(run.data, "train", run.seed), rng, needed, run, tokenizer)
    held_out = _drawn(
        source.pairs(run.data, "test", HELD_OUT_SEED),
        random.Random(HELD_OUT_SEED),
        plan.held_out,
        run,
        tokenizer,
    )
    for name, found, least in (("train", groups, plan.train), ("test", held_out, plan.held_out)):
        if len(found) < least:
            raise ValueError(
                f"{run.data}: {len(found)} prompts of the {name} split have pairs of at most "
                f"{plan.max_tokens} tokens, expected {least}"
            )
    watched = groups[: plan.train]
    order = list(groups)
    while len(order) < needed:  # another epoch, in another order
        order += rng.sample(groups, len(groups))
    questions = []
    if plan.questions:
        tests = list(_grouped(source.pairs(run.data, "test", HELD_OUT_SEED)))
        questions = _tokenised(tests, tokenizer)
    return Sets(
        [order[i * plan.groups : (i + 1) * plan.groups] for i in range(plan.steps)],
        list(itertools.chain(*watched)),
        list(itertools.chain(*held_out)),
        questions,
    )


def _drawn(
    pairs: Iterator[Row], rng: random.Random, count: int, run: Run, tokenizer: Any
) -> list[Group]:
    """Up to `count` groups at random, none with a pair that is too long."""
    groups = list(_grouped(pairs))
    rng.shuffle(groups)
    found: list[Group] = []
    for start in range(0, len(groups), count):
        if len(found) >= count:
            break
        some = _tokenised(groups[start : start + count], tokenizer)
        found += [g for g in some if max(map(_tokens, g)) <= run.schedule.max_tokens]
    return found[:count]


def _grouped(pairs: Iterator[Row]) -> Iterator[Group]:
    """Pairs that come from the same row of a data set stand together."""
    for _, group in itertools.groupby(pairs, key=lambda pair: pair["source"]):
        yield list(group)


def _tokens(row: Row) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _tokenised(groups: list[Group], tokenizer: Any) -> list[Group]:
    """Groups of token ids, with the lengths of the completions' texts in characters."""
    flat = [pair for group in groups for pair in group]
    columns = ("prompt", "chosen", "rejected")
    texts = [{**{c: pair[c] for c in columns}, "place": pair["source"]} for pair in flat]
    ids, _ = tokenize(Dataset.from_list(texts), tokenizer, progress=False)
    characters = (
        {f"{side}_characters": len(pair[side].strip()) for side in ("chosen", "rejected")}
        for pair in flat
    )
    rows = iter([{**row, **extra} for row, extra in zip(ids, characters, strict=True)])
    return [list(itertools.islice(rows, len(group))) for group in groups]
