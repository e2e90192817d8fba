"""The DPOP paper's preference pairs, from the original data sets (arXiv:2402.13228, Section 5.1 and
Appendix D)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from fastdpop.data.build import arc, gsm8k, hellaswag, metamath
from fastdpop.data.build.common import Counts, LeftOut, Rejected, Task
from fastdpop.data.messages import assistant, user
from fastdpop.data.read import Row, open_source

__all__ = ["CORRUPTED", "KINDS", "Counts", "build"]

Pair = dict[str, Any]

KINDS: Mapping[str, Callable[[Mapping[str, Any]], Task]] = {
    "metamath": metamath.read,
    "arc": arc.read,
    "hellaswag": hellaswag.read,
    "gsm8k": gsm8k.read,
}
"""What a row of each data set is read by."""
CORRUPTED = ("metamath", "gsm8k")
"""Those whose rejected completions are chosen ones with an edit."""
POOL = 1000
"""Tasks of a source, drawn by the seed, from which each task's examples are drawn."""
_SAME = "a wrong answer that is the right one, word for word"


def build(
    kind: str,
    source: str | Path | datasets.Dataset,
    *,
    seed: int = 0,
    few_shot: int = 0,
    chat: bool = False,
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    counts: Counts | None = None,
    progress: bool = False,
) -> Iterator[Pair]:
    """Make preference pairs of a data set's rows, in their order and one by one.

    What is made of a row follows from the row, the seed and the examples in front of it, not from the
    rows before it.

    Args:
        kind: one of :data:`KINDS`.
        source: a file, a folder or the name of a data set, as in
            :func:`fastdpop.data.load_pairs`; HellaSwag may be a text of six lines a task.
        seed: chooses results and their wrong values, and the examples.
        few_shot: how many solved tasks of the same source stand in front of each; never the task
            itself, nor one that was made from the same original.
        chat: make messages: each task the user's, each completion the assistant's.
        split: which split of a folder or a data set that is named, "train" by default.
        config: which configuration of it.
        limit: the most pairs to make.
        counts: counts what becomes of the rows, as they are read.
        progress: show a progress bar on stderr, if that is a terminal.

    Yields:
        ``prompt``, ``chosen`` and ``rejected``: texts, the completions with the blank that they begin
        with, or lists of messages. ``source`` says which row they come from: its own name, or file and line.
        Of calculations also ``edit``: ``start``, the place in the chosen completion, ``right`` and ``wrong``.

    Raises:
        ValueError: an argument is none of those above. While they are made: a row is of another kind than
            said (the message names file, line and field), there are no pairs, or not enough examples.
        OSError: a file cannot be read.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {list(KINDS)}")
    for name, number, least in (("few_shot", few_shot, 0), ("limit", limit, 1)):
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}, expected {least} or more")
    rows = _Rows(kind, source, split, config, progress)
    return _pairs(rows, seed, few_shot, chat, limit, Counts() if counts is None else counts)


class _Rows:
    """The tasks of a source."""

    def __init__(
        self,
        kind: str,
        source: str | Path | datasets.Dataset,
        split: str | None,
        config: str | None,
        progress: bool,
    ) -> None:
        self.kind, self.progress = kind, progress
        self.folder = ""
        if isinstance(source, (str, Path)):
            path = Path(source)
            if path.exists():
                # Places go without the folder: the same pairs come from a copy elsewhere.
                self.folder = f"{path if path.is_dir() else path.parent}/"
            if kind == "hellaswag" and path.name.lower().endswith(hellaswag.TEXT):
                if split is not None or config is not None:
                    raise ValueError(
                        f"{path}: a text has no splits or configurations, got split {split!r} and "
                        f"configuration {config!r}"
                    )
                self.name, self.rows = str(path), lambda: hellaswag.rows_of_text(path)
                return
        opened = open_source(source, split="train" if split is None else split, config=config)
        self.name, self.rows = opened.name, opened.rows

    def tasks(self, doing: str) -> Iterator[tuple[str, Task | LeftOut]]:
        """The rows' places and tasks, or why they are left out."""
        # disable=None: no bar where stderr is no terminal
        bar = None if self.progress else True
        for row in tqdm(self.rows(), desc=doing, unit=" rows", disable=bar):
            yield row.place.removeprefix(self.folder), self._task(row)

    def _task(self, row: Row) -> Task | LeftOut:
        try:
            return KINDS[self.kind](row.fields)
        except LeftOut as reason:
            return reason
        except ValueError as error:
            raise ValueError(f"{row.place}: no row of {self.kind}: {error}") from None


def _pairs(
    rows: _Rows, seed: int, few_shot: int, chat: bool, limit: int | None, counts: Counts
) -> Iterator[Pair]:
    pool = _pool(rows, seed) if few_shot else []
    for place, task in rows.tasks("pairs"):
        counts.rows += 1
        try:
            if isinstance(task, LeftOut):
                raise task
            rejections = task.rejected(seed)
        except LeftOut as reason:
            counts.left_out[str(reason)] += 1
            continue
        examples = _examples(pool, task, few_shot, seed, rows.name)
        for rejected in rejections:
            if rejected.text == task.right:
                counts.left_out[_SAME] += 1
                continue
            counts.pairs += 1
            yield _pair(task, rejected, examples, chat, task.source or place)
            if counts.pairs == limit:
                return
    if not counts.pairs:
        why = "".join(f"; {count} rows with {reason}" for reason, count in counts.left_out.items())
        raise ValueError(f"{rows.name}: no pairs of {counts.rows} rows{why}")


def _pool(rows: _Rows, seed: int) -> list[Task]:
    """Up to `POOL` tasks of all, each as likely as any other (Vitter's algorithm R)."""
    pool: list[Task] = []
    rng, seen = random.Random(f"{seed}\npool"), 0
    for _, task in rows.tasks("examples"):
        if isinstance(task, LeftOut):
            continue
        seen += 1
        if len(pool) < POOL:
            pool.append(task)
        elif (place := rng.randrange(seen)) < POOL:
            pool[place] = task
    return pool


def _examples(pool: Sequence[Task], task: Task, count: int, seed: int, name: str) -> Sequence[Task]:
    if not count:
        return []
    others = [other for other in pool if other.origin != task.origin]
    if len(others) < count:
        raise ValueError(f"{name}: {len(others)} other tasks, too few for {count} examples")
    return random.Random(f"{seed}\nexamples\n{task.asked}").sample(others, count)


def _pair(
    task: Task, rejected: Rejected, examples: Sequence[Task], chat: bool, source: str
) -> Pair:
    if chat:
        turns = [turn for e in examples for turn in (user(e.asked), assistant(e.right))]
        pair: Pair = {
            "prompt": [*turns, user(task.asked)],
            "chosen": [assistant(task.right)],
            "rejected": [assistant(rejected.text)],
        }
    else:
        solved = [f"{example.prompt} {example.right}" for example in examples]
        pair = {
            "prompt": "\n\n".join([*solved, task.prompt]),
            "chosen": f" {task.right}",
            "rejected": f" {rejected.text}",
        }
    pair["source"] = source
    if rejected.edit is not None:
        start, right, wrong = rejected.edit
        pair["edit"] = {"start": start + (not chat), "right": right, "wrong": wrong}
    return pair
