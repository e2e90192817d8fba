"""Packing pairs: what a batch holds, how pairs are distributed, and what loaders do with it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from fastdpop import PackedPairs, pack
from tests.tiny_model import tiny_llama

PAIRS = ([[7, 8], [7, 8]], [[1, 2, 3], [1, 2, 4]], [[1, 9], []])


def test_what_a_batch_holds() -> None:
    (batch,) = pack(*PAIRS, least_shared=1)
    assert isinstance(batch, dict)
    assert set(batch) == {"input_ids", "position_ids", "labels", "prefix_tree"}
    # 7 8 -> 1 -> 2 -> 3
    #             |    4
    #             9
    assert batch["input_ids"].tolist() == [[7, 8, 1, 2, 3, 4, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 4, 3]]
    assert batch["prefix_tree"]["end"].tolist() == [7, 7, 7, 6, 5, 6, 7]
    assert batch["labels"].tolist() == [
        [-100, -100, 1, 2, 3],
        [-100, -100, 1, 2, 4],
        [-100, -100, 1, 9, -100],
        [-100, -100, -100, -100, -100],
    ]
    assert batch["prefix_tree"]["hidden_index"].tolist() == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 5],
        [0, 1, 2, 6, 0],
        [0, 1, 0, 0, 0],
    ]
    assert batch.pairs == (0, 1)


def test_equal_completions_are_one_path() -> None:
    (batch,) = pack([[5]], [[6, 7]], [[6, 7]])
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch["prefix_tree"]["hidden_index"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 6, 7]]


def test_short_stretches_are_shared_only_if_asked_for() -> None:
    (batch,) = pack([[5] * 3], [[6]], [[7]])
    assert batch["input_ids"].tolist() == [[5, 5, 5, 6, 5, 5, 5, 7]]
    (batch,) = pack([[5] * 3], [[6]], [[7]], least_shared=3)
    assert batch["input_ids"].tolist() == [[5, 5, 5, 6, 7]]


ids = st.lists(st.integers(0, 2), max_size=6)
pairs = st.lists(st.tuples(ids.filter(bool), ids, ids), min_size=1, max_size=12)


@given(pairs, st.integers(18, 60), st.integers(1, 4))
def test_batches_hold_every_pair_once_within_the_budget(
    rows: list[tuple[list[int], ...]], budget: int, least: int
) -> None:
    batches = pack(*zip(*rows, strict=True), max_tokens=budget, least_shared=least)
    assert sorted(i for batch in batches for i in batch.pairs) == list(range(len(rows)))
    for batch in batches:
        tokens = batch["input_ids"][0]
        tree, labels = batch["prefix_tree"], batch["labels"]
        assert len(tokens) <= budget
        assert batch["position_ids"].shape == (1, len(tokens))
        assert tree["end"].shape == (len(tokens),)
        sequences = [rows[i][0] + rows[i][side] for side in (1, 2) for i in batch.pairs]
        prompts = [rows[i][0] for i in batch.pairs] * 2
        assert labels.shape == tree["hidden_index"].shape
        assert labels.shape == (len(sequences), max(map(len, sequences)))
        for s, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
            places = tree["hidden_index"][s]
            padding = labels.shape[1] - len(sequence)
            assert tokens[places[: len(sequence)]].tolist() == sequence
            assert places[len(sequence) :].tolist() == [0] * padding
            scored = [-100] * len(prompt) + sequence[len(prompt) :] + [-100] * padding
            assert labels[s].tolist() == scored


def test_pairs_of_a_prompt_stay_together_where_they_fit() -> None:
    a, b = [1] * 10, [2] * 10
    prompts = [a, b, a, b, a]
    chosen, rejected = [[3 + i, 0] for i in range(5)], [[8 + i, 0] for i in range(5)]
    # A prompt's tree has 10 tokens and 4 for each pair.
    assert [x.pairs for x in pack(prompts, chosen, rejected)] == [(0, 2, 4, 1, 3)]
    kinds: dict[int, list[tuple[int, ...]]] = {
        40: [(0, 2, 4, 1, 3)],
        39: [(0, 2, 4), (1, 3)],
        22: [(0, 2, 4), (1, 3)],
        21: [(0, 2), (4,), (1, 3)],
        14: [(0,), (2,), (4,), (1,), (3,)],
    }
    for budget, expected in kinds.items():
        batches = pack(prompts, chosen, rejected, max_tokens=budget)
        assert [batch.pairs for batch in batches] == expected, budget


def test_no_pairs_are_no_batches() -> None:
    assert pack([], [], []) == []
    assert pack([], [], [], max_tokens=8) == []


def test_arrays_and_tensors() -> None:
    prompts: list[Any] = [torch.tensor([7, 8]), np.array([7, 8], dtype=np.int32)]
    chosen: list[Any] = [(1, 2, 3), range(3)]
    (batch,) = pack(prompts, chosen, [torch.tensor([], dtype=torch.int64), np.array([])])
    (same,) = pack([[7, 8]] * 2, [[1, 2, 3], [0, 1, 2]], [[], []])
    equal(batch, same)
    tensors = [batch["input_ids"], batch["position_ids"], batch["labels"]]
    for tensor in (*tensors, *batch["prefix_tree"].values()):
        assert tensor.dtype == torch.int64
        assert tensor.device.type == "cpu"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": [[1]]}, "prompts, chosen and rejected hold 1, 2 and 2 sequences"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty, so the first token of a completion"),
        ({"chosen": [[1], [2.0]]}, r"chosen\[1\] is \[2.0\], expected a sequence of token ids"),
        ({"chosen": [[1], [True]]}, r"chosen\[1\] is \[True\], expected a sequence of token ids"),
        ({"chosen": [[1], 2]}, r"chosen\[1\] is 2, expected a sequence of token ids"),
        ({"chosen": [[1], None]}, r"chosen\[1\] is None, expected a sequence of token ids"),
        ({"rejected": ["a", [1]]}, r"rejected\[0\] is 'a', expected a sequence of token ids"),
        ({"rejected": [[[1], [2, 3]], [1]]}, r"rejected\[0\] is \[\[1\], \[2, 3\]\], expected"),
        ({"rejected": [torch.ones(2, dtype=torch.bfloat16), [1]]}, r"rejected\[0\] is tensor"),
        ({"rejected": [[3, -100], [1]]}, r"rejected\[0\] holds -100, expected token ids, which"),
        ({"rejected": [np.array([2**64 - 1], dtype=np.uint64), [1]]}, "holds 18446744073709551615"),
        ({"max_tokens": 0}, "max_tokens is 0, expected a positive whole number"),
        ({"max_tokens": True}, "max_tokens is True, expected a positive whole number"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5, expected a positive whole number"),
        ({"least_shared": 0}, "least_shared is 0, expected a positive whole number"),
    ],
)
def test_mistakes(changed: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"prompts": [[1], [1]], "chosen": [[1], [2]], "rejected": [[3], [4]]}
    with pytest.raises(ValueError, match=message):
        pack(**{**right, **changed})


def test_a_pair_beyond_the_budget() -> None:
    prompts, chosen, rejected = [[1] * 9] * 3, [[2], [3] * 9, [4]], [[5], [6] * 9, [7]]
    with pytest.raises(
        ValueError, match=r"pair 1 has 27 tokens.* expected at most max_tokens = 26"
    ):
        pack(prompts, chosen, rejected, max_tokens=26)
    batches = pack(prompts, chosen, rejected, max_tokens=27)
    assert [batch.pairs for batch in batches] == [(0,), (1,), (2,)]


def equal(one: Any, other: Any) -> None:
    """The same tensors under the same names."""
    assert one.keys() == other.keys()
    for name, entry in one.items():
        if isinstance(entry, dict):
            equal(entry, other[name])
        else:
            assert torch.equal(entry, other[name]), name


def arguments(**batch: Any) -> dict[str, Any]:
    return batch


def packed(rows: list[tuple[list[int], ...]]) -> list[PackedPairs]:
    return pack(*zip(*rows, strict=True))


def test_it_survives_what_carries_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)  # which needs a GPU
    (batch,) = pack(*PAIRS)
    assert set(arguments(**batch)) == set(batch)
    for carried in (
        pickle.loads(pickle.dumps(batch)),
        copy.deepcopy(batch),
        batch.to("cpu"),
        pin_memory(batch),
        send_to_device(batch, "cpu"),
        send_to_device([batch], "cpu")[0],
        next(iter(DataLoader([batch], batch_size=None))),  # type: ignore[arg-type]
    ):
        assert isinstance(carried, PackedPairs)
        assert carried.pairs == (0, 1)
        equal(carried, batch)


def test_the_structure_stays_on_the_cpu() -> None:
    (batch,) = pack(*PAIRS)
    moved = batch.to("meta")
    assert moved.pairs == batch.pairs
    tensors = [moved["input_ids"], moved["position_ids"], moved["labels"]]
    assert {t.device.type for t in (*tensors, moved["prefix_tree"]["hidden_index"])} == {"meta"}
    assert moved["prefix_tree"]["end"].device.type == "cpu"
    assert batch["input_ids"].device.type == "cpu"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_packs(workers: int) -> None:
    rows = list(zip(*PAIRS, strict=True))
    loader: Any = DataLoader(rows, batch_size=2, collate_fn=packed, num_workers=workers)  # type: ignore[arg-type]
    for prepared in (loader, Accelerator(cpu=True).prepare(loader)):
        ((batch,),) = list(prepared)
        assert batch.pairs == (0, 1)
        equal(batch, pack(*PAIRS)[0])


def test_log_probs_are_those_of_separate_sequences() -> None:
    """Through a model, by the mask that `end` stands for."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 250, size) for size in (9, 20, 9)]
    prompts[2] = prompts[0]
    chosen = [rng.integers(0, 250, size) for size in (12, 0, 5)]
    rejected = [np.append(chosen[0][:10], 7), rng.integers(0, 250, 3), chosen[0]]
    (batch,) = pack(prompts, chosen, rejected)
    end, places = batch["prefix_tree"].values()
    # What is padded below: 3 pairs of 21 tokens at most, and 23 of the second rejected.
    assert len(end) < 6 * 23 / 2
    query, key = torch.arange(len(end))[:, None], torch.arange(len(end))
    mask = (key <= query) & (query < end)
    model = tiny_llama()
    with torch.no_grad():
        tree = model(batch["input_ids"], mask[None, None], batch["position_ids"]).logits[0]
        for s, labels in enumerate(batch["labels"]):
            i = batch.pairs[s % 3]
            ids = torch.from_numpy(np.concatenate([prompts[i], (chosen, rejected)[s // 3][i]]))
            alone = model(ids[None]).logits[0]
            scored = (labels != -100).nonzero()[:, 0]
            found = tree[places[s, scored - 1]].log_softmax(-1).gather(1, labels[scored, None])
            expected = alone[scored - 1].log_softmax(-1).gather(1, ids[scored, None])
            assert len(scored) == len((chosen, rejected)[s // 3][i])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
