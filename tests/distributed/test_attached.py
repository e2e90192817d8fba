"""Attached models with groups: an error on one rank before the loss is one on all; a rank may have no pairs."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from fastdpop.hf import attach
from tests.distributed.pool import Pool
from tests.distributed.worlds import assert_close, mean_over_ranks
from tests.tiny_models import batch, tiny


def _one_of_them(rank: int) -> None:
    for given in ({"group": dist.group.WORLD}, {}):
        model, options = (
            attach(tiny("llama"), **given),
            {} if given else {"group": dist.group.WORLD},
        )
        _errors(rank, model, options)


def _errors(rank: int, model: Any, options: dict[str, Any]) -> None:
    inputs = batch()
    call: dict[str, Any] = {**inputs, "preference": "dpop", "ref_logps": torch.zeros(4)}
    call["preference_options"] = options
    wrong: dict[str, dict[str, Any]] = {
        "preference_options contains 'nothing'": {"preference_options": {"nothing": 1, **options}},
        "labels is None": {"labels": None},
        "labels has shape": {"labels": inputs["labels"][:, :-1]},
        "logits_to_keep is 1": {"logits_to_keep": 1},
        "ref_logps has shape": {"ref_logps": torch.zeros(3)},
        "embedding|index": {"input_ids": inputs["input_ids"] + 10_000},
    }
    for what, given in wrong.items():
        with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as raised:
            model(**{**call, **(given if rank == 1 else {})})
        said = str(raised.value)
        assert re.search(what if rank == 1 else "rank 1 of group raised an error", said), said
        losses = [torch.empty((), dtype=torch.float64) for _ in range(2)]
        dist.all_gather(losses, model(**call).loss.detach().double())  # and it goes on
        assert losses[0] == losses[1]


def _whole_head(rank: int) -> None:
    """Twice the vocabulary would be another loss, without a sign."""
    model = attach(tiny("llama"), check=False, tp_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="expected this rank's part of the vocabulary"):
        model(**batch(), preference="dpop", ref_logps=torch.zeros(4))


def test_a_head_that_is_not_split(two: Pool) -> None:
    two.run(_whole_head)


def test_an_error_on_one_rank(two: Pool) -> None:
    two.run(_one_of_them)


def _without_pairs(rank: int) -> None:
    """A process that has none left runs a batch of which nothing is scored."""
    one = tiny("llama")
    model = attach(copy.deepcopy(one), group=dist.group.WORLD)
    attach(one)
    inputs, given = batch(), {"preference": "dpop", "ref_logps": torch.full((4,), -40.0)}
    one(**inputs, **given).loss.backward()
    none = {"pairs": torch.empty(0, 2, dtype=torch.int64)}
    found = model(**inputs, **given, preference_options=none if rank == 1 else {})
    found.loss.backward()
    want = dict(one.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(mean_over_ranks(parameter.grad), want[name].grad, name)
    assert not found.logps.any() or rank == 0


def test_a_process_without_pairs(two: Pool) -> None:
    two.run(_without_pairs)
