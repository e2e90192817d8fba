"""``fastdpop train`` in two processes: the losses and every gradient of one process with their pairs, step by step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from tests.distributed.pool import Pool
from tests.distributed.runs import (
    FSDP1,
    FSDP2,
    failure,
    gradients,
    in_process,
    largest_error,
    without_saving,
)
from tests.train.files import WARNINGS, Files, rows, write

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
DDP: dict[str, str] = {}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """11 pairs of many lengths: a step of 4 + 4 pairs, and one of 3, of which one process has 1 or none."""
    made = Files.make(tmp_path_factory.mktemp("files") / "files", test=3)
    write(made.folder / "train.jsonl", rows(11))
    return made


SLOW = pytest.mark.slow
MIX = ("--loss_type", "dpop", "sft", "--loss_weights", "1.0", "0.5")
SHARED = (*MIX, "--share-prefixes")
LORA = (*MIX, "--lora", "--reference", "online")


@pytest.mark.parametrize(
    ("options", "layout", "pairs"),
    [
        pytest.param(MIX, DDP, 11, id="ddp-dpop+sft"),
        pytest.param(SHARED, DDP, 9, id="ddp-shared", marks=SLOW),
        pytest.param(("--loss_type", "aot"), DDP, 11, id="ddp-aot"),
        pytest.param(("--loss", "bco_pair"), DDP, 9, id="ddp-bco", marks=SLOW),
        pytest.param(("--loss", "kto"), DDP, 11, id="ddp-kto"),
        pytest.param(MIX, FSDP2, 9, id="fsdp2-dpop+sft"),
        pytest.param(SHARED, FSDP2, 11, id="fsdp2-shared"),
        pytest.param(("--loss_type", "aot_unpaired"), FSDP2, 11, id="fsdp2-aot"),
        pytest.param(LORA, FSDP2, 11, id="fsdp2-lora"),
        pytest.param((*MIX, "--reference", "online"), FSDP2, 11, id="fsdp2-online", marks=SLOW),
        pytest.param(LORA, DDP, 9, id="ddp-lora", marks=SLOW),
    ],
)
def test_every_gradient_is_that_of_the_joined_batch(
    files: Files,
    two: Pool,
    tmp_path: Path,
    options: tuple[str, ...],
    layout: dict[str, str],
    pairs: int,
) -> None:
    data = write(tmp_path / "train.jsonl", rows(pairs))
    always = ("--pairs", str(data), *options, "--accumulate", "2", "--max-grad-norm", "0")
    always += ("--epochs", "1", "--save-every", "0", "--learning-rate", "1e-3")
    always += ("--eval-pairs", str(files.folder / "test.jsonl"))
    one, other = tmp_path / "one", tmp_path / "two"
    expected, _ = gradients(files.argv(*always, "--batch-pairs", "4", out=one))
    argv = files.argv(*always, "--batch-pairs", "2", out=other)
    of_ranks = two.run(in_process, argv, layout)
    assert len(expected) == 2
    for steps, sharded in of_ranks:
        assert sharded is bool(layout)
        errors = [largest_error(*each) for each in zip(steps, expected, strict=True)]
        assert max(errors) < 2e-5
    alike: Any = ("loss", "logps/chosen", "penalty", "eval_loss", "entropy", "num_tokens")
    for row, same in zip(files.metrics(one), files.metrics(other), strict=True):
        assert {n: same[n] for n in alike if n in same} == pytest.approx(
            {n: row[n] for n in alike if n in row}, rel=1e-4, abs=1e-6
        )
    for name, weight in files.weights(one).items():
        error = (files.weights(other)[name] - weight).abs().max()
        assert error < 2e-4, name


def test_each_process_by_itself_on_request(files: Files, two: Pool, tmp_path: Path) -> None:
    """As TRL does it: the mean of two means over tokens is something else."""
    always = (*MIX, "--max-grad-norm", "0", "--steps", "1", "--save-every", "0")
    expected, _ = gradients(files.argv(*always, "--batch-pairs", "4", out=tmp_path / "one"))
    more = ("--batch-pairs", "2", "--global_batch", "false")
    argv = files.argv(*always, *more, out=tmp_path / "two")
    for steps, _ in two.run(in_process, argv, DDP):
        assert largest_error(steps[0], expected[0]) > 1e-2


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="full"),
        pytest.param(("--lora", "--reference", "online"), id="lora", marks=SLOW),
    ],
)
@pytest.mark.parametrize(
    "form", ["SHARDED_STATE_DICT", pytest.param("FULL_STATE_DICT", marks=SLOW)]
)
def test_a_sharded_run_goes_on_bit_for_bit(
    files: Files, two: Pool, tmp_path: Path, more: tuple[str, ...], form: str
) -> None:
    layout = FSDP2 | {"FSDP_STATE_DICT_TYPE": form}
    always = (*more, "--share-prefixes", "--save-every", "2", "--schedule", "constant")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    two.run(in_process, files.argv(*always, "--steps", "4", out=whole), layout)
    two.run(in_process, files.argv(*always, "--steps", "2", out=cut), layout)
    manifest = json.loads((cut / "checkpoint-2" / "fastdpop.json").read_text())["files"]
    of_ranks = {"optimizer_0/__0_0.distcp", "optimizer_0/__1_0.distcp"}
    assert of_ranks <= set(manifest) or form == "FULL_STATE_DICT"
    two.run(in_process, files.argv(*always, "--steps", "4", "--resume", out=cut), layout)
    assert files.losses(cut) == files.losses(whole)
    weights = files.weights(whole)
    assert all(torch.equal(value, weights[name]) for name, value in files.weights(cut).items())
    # A shard that is damaged, and a run that keeps its parameters otherwise.
    (found,) = two.run(failure, [files.argv(*always, "--resume", out=cut)] * 2, DDP)[:1]
    assert "parameters: FSDP2's" in found
    assert "whole in each process now" in found
    damaged = max((cut / "checkpoint-4").rglob("*"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for found in two.run(failure, [files.argv(*always, "--resume", out=cut)] * 2, layout):
        assert f"{damaged} is damaged: its checksum has changed" in found


def test_fsdp1_trains_alike_and_is_refused_where_it_cannot_save(
    files: Files, two: Pool, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "two"
    always = (*MIX, "--steps", "3", "--save-every", "0")
    assert files.run(*always, "--batch-pairs", "4", out=one) == 0
    argv = files.argv(*always, out=other)
    for found in two.run(failure, [argv, argv], FSDP1):
        assert "fsdp_version is 1, expected 2 on CPUs" in found
    for wrapped in two.run(without_saving, argv, FSDP1):
        assert wrapped == "FullyShardedDataParallel"
    assert files.losses(other) == pytest.approx(files.losses(one), rel=1e-4)


def test_no_reference_is_scored_without_weights(files: Files, two: Pool, tmp_path: Path) -> None:
    """Of pairs that no other test has scored."""
    data = write(tmp_path / "train.jsonl", rows(5, offset=1234))
    argv = files.argv("--pairs", str(data), "--lora", "--steps", "1", out=tmp_path / "run")
    layout = FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    for found in two.run(failure, [argv, argv], layout):
        assert "fsdp_cpu_ram_efficient_loading is true, expected false" in found


def test_other_settings_or_data_are_an_error_in_every_process(
    files: Files, two: Pool, tmp_path: Path
) -> None:
    argv = files.argv("--steps", "1", "--save-every", "0", out=tmp_path / "run")
    write(tmp_path / "other.jsonl", rows(11, offset=1))
    for more, said in (
        (["--beta", "0.5"], "beta: 0.3 on rank 0, 0.5 on rank 1"),
        (["--loss", "simpo"], "loss: None on rank 0, simpo on rank 1"),
        (["--eval-pairs", str(files.folder / "test.jsonl")], "eval_pairs: None on rank 0"),
        (["--pairs", str(tmp_path / "other.jsonl")], "pairs: "),
    ):
        for found in two.run(failure, [argv, [*argv, *more]], DDP):
            assert said in found
            assert "the processes were told different things" in found
    # The same file, which is another one on another node.
    local = [tmp_path / f"local-{rank}" / "train.jsonl" for rank in (0, 1)]
    for rank, path in enumerate(local):
        path.parent.mkdir()
        write(path, rows(6, offset=rank))
    for found in two.run(
        elsewhere,
        [str(path.parent) for path in local],
        files.argv("--pairs", "train.jsonl", "--steps", "1", out=tmp_path / "run"),
    ):
        assert "training pairs: " in found
        assert "on rank 1" in found


def elsewhere(rank: int, folders: list[str], argv: list[str]) -> str:
    before = os.getcwd()
    os.chdir(folders[rank])
    try:
        return failure(rank, [argv, argv], DDP)
    finally:
        os.chdir(before)
