"""``fastdpop train`` in two processes: numbers of the data, and a reference that moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

from fastdpop.train import reference
from tests.distributed.pool import Pool
from tests.distributed.runs import FSDP2, gradients, in_process, largest_error
from tests.train.files import WARNINGS, Files, rows, write

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]
DDP: dict[str, str] = {}
MOVES = ("--sync-ref-model", "--ref-model-sync-steps", "2", "--ref-model-mixup-alpha", "0.6")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files.make(tmp_path_factory.mktemp("files") / "files", train=11)


@pytest.mark.parametrize(
    ("options", "layout", "pairs"),
    [
        pytest.param((), DDP, 11, id="ddp"),  # of the last 3, one process has 1
        pytest.param(("--loss_type", "aot"), DDP, 9, id="ddp-aot"),  # and of the last 1, none
        pytest.param(("--share-prefixes",), FSDP2, 9, id="fsdp2-shared", marks=pytest.mark.slow),
    ],
)
def test_weights_are_those_of_the_joined_batch(
    files: Files,
    two: Pool,
    tmp_path: Path,
    options: tuple[str, ...],
    layout: dict[str, str],
    pairs: int,
) -> None:
    """Every gradient, and what is logged, with pairs of which one process has fewer than the other."""
    weights = [0.1 + 0.7 * (3 * i % pairs) for i in range(pairs)]
    data = [{**row, "weight": w} for row, w in zip(rows(pairs), weights, strict=True)]
    path = write(tmp_path / "train.jsonl", data)
    always = ("--pairs", str(path), *options, "--pair-values", "weight", "--accumulate", "2")
    always += ("--max-grad-norm", "0", "--epochs", "1", "--save-every", "0")
    always += ("--learning-rate", "1e-3")
    one, other, plain = (tmp_path / name for name in ("one", "two", "plain"))
    expected, _ = gradients(files.argv(*always, "--batch-pairs", "4", out=one))
    for steps, _ in two.run(
        in_process, files.argv(*always, "--batch-pairs", "2", out=other), layout
    ):
        errors = [largest_error(*each) for each in zip(steps, expected, strict=True)]
        assert max(errors) < 2e-5
    assert files.losses(other) == pytest.approx(files.losses(one), rel=1e-4)
    write(path, rows(pairs))
    without = [text for text in always if text not in ("--pair-values", "weight")]
    found, _ = gradients(files.argv(*without, "--batch-pairs", "4", out=plain))
    assert largest_error(found[0], expected[0]) > 1e-2


@pytest.mark.parametrize("layout", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_a_moving_reference_is_one_processs_and_goes_on(
    files: Files, two: Pool, tmp_path: Path, layout: dict[str, str]
) -> None:
    always = (*MOVES, "--save-every", "3", "--schedule", "constant", "--learning-rate", "1e-3")
    one, whole, cut = (tmp_path / name for name in ("one", "whole", "cut"))
    assert files.run(*always, "--batch-pairs", "4", "--steps", "6", out=one) == 0
    two.run(in_process, files.argv(*always, "--steps", "6", out=whole), layout)
    two.run(in_process, files.argv(*always, "--steps", "3", out=cut), layout)
    two.run(in_process, files.argv(*always, "--steps", "6", "--resume", out=cut), layout)
    assert files.losses(cut) == files.losses(whole)
    assert files.losses(whole) == pytest.approx(files.losses(one), rel=1e-4)
    at = f"checkpoint-6/{reference.FILE}"
    first = load_file(files.folder / "model" / "model.safetensors")
    mine, other, alone = (load_file(out / at) for out in (cut, whole, one))
    assert mine.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(mine[name], other[name])
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=2e-4)
    assert any((value - first[name]).abs().max() > 1e-3 for name, value in alone.items())
