"""The order of training data whose prefixes are shared: pairs of one prompt stand side by side."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from torch.utils.data import RandomSampler
from trl.trainer import dpo_trainer

from fastdpop.prefix.sampler import PromptSampler

_PROMPTS = ("prompt_ids", "prompt_input_ids")
"""The columns of token ids, in the data of DPO and of CPO."""


def by_prompt(trainer: Any, sampler: Any, dataset: Any = None) -> Any:
    """``Trainer._get_train_sampler``: a random order of prompts, in the place of one of pairs, if prefixes are shared.

    Args:
        sampler: Trainer's own. One that was asked for (``train_sampling_strategy``) stays, as does that of a stream.
        dataset: the training data; the trainer's by default.
    """
    dataset = trainer.train_dataset if dataset is None else dataset
    shares = trainer._fastdpop.share_prefixes
    if not (shares and isinstance(sampler, RandomSampler) and isinstance(dataset, Dataset)):
        return sampler
    column = next((name for name in _PROMPTS if name in dataset.column_names), None)
    if column is None:
        return sampler
    args = trainer.args
    seed = args.seed if args.data_seed is None else args.data_seed
    return _PromptSampler(trainer, prompts(dataset, column), seed=seed)


class _PromptSampler(PromptSampler):
    """Of the epoch that the trainer is in, whatever stands around this and does not tell it, and on resuming too."""

    def __init__(self, trainer: Any, prompts: Iterable[Any], *, seed: int) -> None:
        super().__init__(prompts, seed=seed)
        self._trainer = trainer

    def __iter__(self) -> Iterator[int]:
        self.set_epoch(int(self._trainer.state.epoch or 0))
        return super().__iter__()


def prompts(dataset: Dataset, column: str = _PROMPTS[0]) -> Iterator[bytes]:
    """A digest for every pair, of its prompt's token ids."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(1000):
        lists = table.column(column).combine_chunks()
        tokens = lists.flatten().cast("int64").to_numpy()
        ends = lists.value_lengths().to_numpy().cumsum()
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            yield hashlib.sha256(tokens[start:end].tobytes()).digest()


@contextmanager
def without_padding_warning() -> Iterator[None]:
    """While a trainer is made: TRL says that ``padding_free`` has no effect, which it has here."""
    logger = logging.getLogger(dpo_trainer.__name__)
    logger.addFilter(_of_another_matter)
    try:
        yield
    finally:
        logger.removeFilter(_of_another_matter)


def _of_another_matter(record: logging.LogRecord) -> bool:
    return "`padding_free=True` is temporarily unavailable" not in str(record.msg)
