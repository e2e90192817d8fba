"""What goes wrong on one rank in an attached model, before the loss, is an error on all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from fastdpop.hf import attach
from tests.distributed.pool import Pool
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
