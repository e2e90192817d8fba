"""The order of pairs in which those of a prompt stand side by side."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from fastdpop import PromptSampler

PROMPTS = [i % 7 for i in range(24)]


def test_every_pair_once_and_those_of_a_prompt_together() -> None:
    sampler = PromptSampler(PROMPTS)
    order = list(sampler)
    assert len(sampler) == len(order) == 24
    assert sorted(order) == list(range(24))
    assert len([*groupby(order, PROMPTS.__getitem__)]) == 7
    assert list(sampler) == order


def test_orders_follow_from_seed_and_epoch() -> None:
    orders = set()
    for seed in range(3):
        sampler = PromptSampler(PROMPTS, seed=seed)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            order = tuple(sampler)
            assert sorted(order) == list(range(24))
            orders.add(order)
            again = PromptSampler(PROMPTS, seed=seed)
            again.set_epoch(epoch)
            assert tuple(again) == order
    assert len(orders) == 12


def test_prompts_and_the_pairs_of_each_are_shuffled() -> None:
    """Over many epochs every prompt comes first, and every pair of a prompt is its first."""
    sampler = PromptSampler(["a", "b", "a", "b", "a"])
    firsts = set()
    for epoch in range(100):
        sampler.set_epoch(epoch)
        firsts.add(next(iter(sampler)))
    assert firsts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "prompts",
    [
        ["a", "b", "a"],
        [(1, 2), (1,), (1, 2)],
        [[1, 2], [1], [1, 2]],
        [torch.tensor([1, 2]), torch.tensor([1]), torch.tensor([1, 2])],
        [torch.tensor([1, 2]).numpy(), [1], (1, 2)],
    ],
)
def test_kinds_of_prompts(prompts: list[Any]) -> None:
    for epoch in range(8):
        sampler = PromptSampler(iter(prompts))
        sampler.set_epoch(epoch)
        assert list(sampler)[1] != 1


def test_no_pairs() -> None:
    assert list(PromptSampler([])) == []


def test_mistakes() -> None:
    with pytest.raises(
        ValueError, match=r"prompts\[1\] is \[\{'role': 'user'\}\], expected someth"
    ):
        PromptSampler(["a", [{"role": "user"}]])
    for seed in (-1, 0.5, True):
        with pytest.raises(ValueError, match=f"seed is {seed}, expected a whole number"):
            PromptSampler(["a"], seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epoch is -1, expected a whole number"):
        PromptSampler(["a"]).set_epoch(-1)


def test_accelerate_deals_whole_batches_and_changes_the_epoch() -> None:
    """Three pairs of each prompt, batches of three, two processes: none is torn apart."""
    prompts = [i // 3 for i in range(24)]
    loader: Any = DataLoader(list(range(24)), batch_size=3, sampler=PromptSampler(prompts))  # type: ignore[arg-type]
    processes = [
        prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        for rank in range(2)
    ]
    epochs = []
    for epoch in range(2):
        seen = []
        for prepared in processes:
            prepared.set_epoch(epoch)
            batches = [batch.tolist() for batch in prepared]
            assert len(batches) == 4
            assert all(len({prompts[i] for i in batch}) == 1 for batch in batches)
            seen += [i for batch in batches for i in batch]
        assert sorted(seen) == list(range(24))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
