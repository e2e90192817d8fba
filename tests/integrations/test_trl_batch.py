"""The batch of all processes: who asks for it, which pairs count, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import fastdpop
from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer, batch
from fastdpop.integrations.trl.models import _check_devices
from tests.integrations.trl_setup import WARNINGS, DPOTrainer, trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


def test_arguments_say_it_or_the_patch(tmp_path: Path) -> None:
    fastdpop.patch_trl(global_batch=True)
    try:
        assert trainer(DPOTrainer, tmp_path)._fastdpop.global_batch is True
        assert trainer(DPOTrainer, tmp_path, global_batch=False)._fastdpop.global_batch is False
        fastdpop.patch_trl()
        assert trainer(DPOTrainer, tmp_path)._fastdpop.global_batch is False
        assert trainer(DPOTrainer, tmp_path, global_batch=True)._fastdpop.global_batch is True
        with pytest.raises(TypeError, match="global_batch is 'yes', expected True or False"):
            trainer(DPOTrainer, tmp_path, global_batch="yes")
        with pytest.raises(TypeError, match="global_batch is 1, expected True or False"):
            fastdpop.patch_trl(global_batch=1)  # type: ignore[arg-type]
    finally:
        fastdpop.unpatch_trl()


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(**options: Any) -> Any:
        return trainer(FastDPOTrainer, tmp_path, config=FastDPOConfig, **options)

    uneven = {"even_batches": False}
    with pytest.raises(ValueError, match="even_batches=False, expected True with global_batch"):
        made(global_batch=True, accelerator_config=uneven)
    assert made(accelerator_config=uneven)._fastdpop.global_batch is False
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP is asked for, and accelerate chose NO"):
        made()


def test_a_precomputed_reference_of_processes_that_share_pairs_is_refused() -> None:
    layout = SimpleNamespace(tp_size=2)
    args = SimpleNamespace(n_gpu=1, fsdp=None, precompute_ref_log_probs=True)
    made = SimpleNamespace(args=args, accelerator=SimpleNamespace(parallelism_config=layout))
    with pytest.raises(ValueError, match="tp_size is 2, expected 1 with a precomputed reference"):
        _check_devices(made)


def of_processes(
    number: int, processes: int, remainder: int, *, last: bool = True, copies: int = 1
) -> Any:
    """As much of a trainer in training as is read."""
    state = SimpleNamespace(end_of_dataloader=last, sync_gradients=True, remainder=remainder)
    accelerator = SimpleNamespace(
        process_index=number, num_processes=processes, gradient_state=state
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(dataloader_drop_last=False),
        train_dataset=range(19),
        _tp_size=copies,
    )


@pytest.mark.parametrize(
    ("remainder", "last", "copies", "kept"),
    [
        (3, True, 1, [2, 1, 0, 0]),
        (0, True, 1, [2, 2, 2, 2]),  # the last batches are full
        (3, False, 1, [2, 2, 2, 2]),
        (-1, True, 1, [2, 1, 0, 0]),  # 19 pairs, of which a run that goes on is not told
        (3, True, 2, [2, 2, 1, 1]),  # two and two have the same batch
    ],
)
def test_pairs_that_are_repeated_do_not_count(
    remainder: int, last: bool, copies: int, kept: list[int]
) -> None:
    trainers = [of_processes(number, 4, remainder, last=last, copies=copies) for number in range(4)]
    assert [batch.kept(of, 2) for of in trainers] == kept
    assert sum(batch.counted(of, 2) for of in trainers) == batch.total(trainers[0], 2)


def test_a_part_of_a_batch_is_whole_pairs() -> None:
    ids = torch.arange(12).view(6, 2)  # 3 pairs, chosen first
    inputs = {"input_ids": ids, "ref_chosen_logps": torch.arange(3.0), "name": "x"}
    cut = {name: batch._first(value, 3, 2) for name, value in inputs.items()}
    assert cut["input_ids"].tolist() == ids[[0, 1, 3, 4]].tolist()
    assert cut["ref_chosen_logps"].tolist() == [0.0, 1.0]
    assert cut["name"] == "x"
