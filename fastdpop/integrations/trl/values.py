"""Columns of the data whose numbers go to the loss with each pair: ``pair_values=["weight", "margin"]``.

Every pair's numbers travel with its token ids, from the data set through the collator to the loss, and on the way
nothing rounds them. What a name means is the loss's affair (:func:`fastdpop.fused_preference_loss`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Value

from fastdpop import pair_values
from fastdpop.data.formats import PAIR_VALUES, number
from fastdpop.integrations.trl.batch import KEY
from fastdpop.integrations.trl.config import value_names
from fastdpop.integrations.trl.loss import configured
from fastdpop.integrations.trl.models import Held, on_fastdpop
from fastdpop.losses.base import PreferenceLoss
from fastdpop.unrounded import Exact

_logger = logging.getLogger(__name__)
_WEIGHT = PAIR_VALUES[0]


class WithValues:
    """A collator whose batches have the numbers of columns as well. Other attributes are the inner collator's."""

    def __init__(self, inner: Callable[..., Any], names: Sequence[str]) -> None:
        self.inner = inner
        self.names = tuple(names)

    def __call__(self, examples: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        batch = self.inner(examples, *args, **kwargs)
        # Not as tensors, which DeepSpeed's trainer casts to 16 bits.
        batch[KEY] = Exact(
            {
                name: torch.tensor([number(name, row) for row in examples], dtype=torch.float64)
                for name in self.names
            }
        )
        return batch

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "names"):  # not there yet, in a copy that is being made
            raise AttributeError(name)
        return getattr(self.inner, name)


class CollatedWithValues(Held):
    """A trainer's ``data_collator``: what is assigned is wrapped, if its arguments name ``pair_values``."""

    def __set__(self, trainer: Any, collator: Any) -> None:
        names = value_names(trainer.args) if on_fastdpop(trainer) else ()
        if names and not isinstance(collator, WithValues):
            collator = WithValues(collator, names)
        vars(trainer)[self.name] = collator


def keep_columns(trainer: Any) -> None:
    """Behind ``Trainer._set_signature_columns_if_needed``: columns that a trainer does not drop as unused."""
    kept = trainer._signature_columns
    kept += [name for name in value_names(trainer.args) if name not in kept]


def without(collator: Any) -> Any:
    """The collator of token ids."""
    return collator.inner if isinstance(collator, WithValues) else collator


def check_dataset(dataset: Any, args: Any, called: str, loss: PreferenceLoss | None) -> None:
    """Look at the numbers of a data set before training; say so if some are there that nobody asked for.

    A stream is looked at batch by batch.

    Args:
        loss: what the trainer was given; None where `args` say which loss it is.

    Raises:
        ValueError: a column is missing or not of numbers, or one of its numbers is missing, not finite, or a negative
            weight; the message names the place (or row) and the column.
    """
    names = value_names(args)
    columns = dataset.column_names
    if columns is None:  # of a stream that does not know
        return
    for name in names:
        if name not in columns:
            raise ValueError(
                f"the {called} dataset has no column {name!r}, which pair_values names (columns here: "
                f"{sorted(columns)})"
            )
    offered = [n for n in PAIR_VALUES if n in columns and n not in names]
    unasked = [name for name in offered if _is_usable(dataset, name)]
    if unasked:
        unasked = pair_values.readable(configured(args, loss), unasked)
    if unasked and PartialState().is_main_process:
        _logger.warning(
            f"fastdpop: the loss does not get {' and '.join(unasked)} of the {called} dataset, expected "
            f"pair_values={[*names, *unasked]} if it is to"
        )
    if isinstance(dataset, Dataset):
        for name in names:
            _check_column(dataset, name, called)


def _is_usable(dataset: Any, name: str) -> bool:
    if not isinstance(dataset, Dataset):
        return _numeric(dataset.features or {}, name)
    try:
        _check_column(dataset, name, "")
    except ValueError:
        return False
    return True


def _numeric(features: Mapping[str, Any], name: str) -> bool:
    feature = features.get(name)
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float"))


def _check_column(dataset: Dataset, name: str, called: str) -> None:
    if not _numeric(dataset.features, name):
        raise ValueError(
            f"column {name!r} of the {called} dataset is {dataset.features[name]!r:.80}, expected numbers"
        )
    start, least = 0, 0.0 if name == _WEIGHT else -np.inf
    for table in dataset.select_columns([name]).with_format("arrow").iter(10_000):
        column = table.column(name)
        found = column.cast("float64", safe=False).to_numpy()  # NaN where null
        wrong = np.flatnonzero(~(np.isfinite(found) & (found >= least)))
        if len(wrong):
            row = start + int(wrong[0])
            place = f"row {row + 1} of the {called} dataset"
            if "place" in dataset.column_names:
                place = dataset[row]["place"]
            expected = "a finite number" + (" >= 0" if name == _WEIGHT else "")
            raise ValueError(
                f"{place}: field '{name}' is {column[int(wrong[0])].as_py()!r}, expected {expected}"
            )
        start += len(found)


def hash_of_values(dataset: Dataset, name: str) -> str:
    """Of the numbers of a column in their order."""
    found = hashlib.sha256()
    for table in dataset.select_columns([name]).with_format("arrow").iter(10_000):
        found.update(table.column(name).cast("float64", safe=False).to_numpy().tobytes())
    return found.hexdigest()
