"""``--share_prefixes``: pairs of one prompt in one batch, and the numbers of a run that shares nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from fastdpop.train.trainer import PairTrainer
from tests.train.files import WARNINGS, Files, write

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]

SHARE = "--share-prefixes"
PROMPTS, EACH = 4, 3


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Three pairs for each of four prompts, no two of one prompt beside each other."""
    made = Files.make(tmp_path / "files")
    pairs = [
        {
            "prompt": f"What is {n} + {n}? Answer: ",
            "chosen": f"That is easily said: {2 * n}",
            "rejected": f"That is easily said: {2 * n + wrong}" + "!" * wrong,
        }
        for wrong in range(1, EACH + 1)
        for n in range(11, 11 + PROMPTS)
    ]
    write(made.folder / "train.jsonl", pairs)
    return made


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of every batch that is trained on."""
    seen: list[list[str]] = []
    own = PairTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *more: Any, **kwargs: Any) -> Any:
        if model.training:
            half = len(inputs["input_ids"]) // 2
            rows = zip(inputs["input_ids"][:half], inputs["completion_mask"][:half], strict=True)
            seen.append([str(ids[: int(mask.argmax())].tolist()) for ids, mask in rows])
        return own(self, model, inputs, *more, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", compute_loss)
    return seen


@pytest.mark.parametrize("reference", ["precomputed", "online"])
def test_a_policy_that_has_not_moved(
    files: Files, prompts: list[list[str]], reference: str
) -> None:
    """Through two epochs of batches of one prompt: the very bits of its reference."""
    more = ("--batch-pairs", "3", "--epochs", "2", "--learning-rate", "1e-30")
    assert files.run(*more, "--reference", reference, SHARE) == 0
    rows = [row for row in files.metrics() if "grad_norm" in row]
    assert len(rows) == len(prompts) == 2 * PROMPTS
    for row in rows:
        assert row["logratios/chosen"] == row["logratios/rejected"] == row["penalty"] == 0.0
    assert all(len(set(batch)) == 1 for batch in prompts)
    for epoch in (prompts[:PROMPTS], prompts[PROMPTS:]):
        assert len({batch[0] for batch in epoch}) == PROMPTS
    assert prompts[:PROMPTS] != prompts[PROMPTS:]


@pytest.mark.parametrize("reference", ["precomputed", "online"])
def test_the_numbers_are_those_without_it(files: Files, reference: str) -> None:
    """On batches of all pairs, whose order has no effect."""
    more = ("--batch-pairs", "12", "--steps", "3", "--reference", reference)
    other = files.folder / "other"
    assert files.run(*more) == files.run(*more, SHARE, out=other) == 0
    assert len(files.losses()) == 3
    assert files.losses(other) == pytest.approx(files.losses(), rel=1e-4)
    for name, weight in files.weights().items():
        torch.testing.assert_close(files.weights(other)[name], weight, rtol=1e-3, atol=1e-4)


def test_every_seed_has_its_own_batches(files: Files, prompts: list[list[str]]) -> None:
    for seed in ("1", "1", "2"):
        out = files.folder / f"out-{len(prompts)}"
        assert files.run("--batch-pairs", "3", SHARE, "--seed", seed, out=out) == 0
    assert prompts[:4] == prompts[4:8] != prompts[8:]


def test_a_run_goes_on_as_it_began(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    always = ("--save-every", "2", "--batch-pairs", "3")
    whole = files.folder / "whole"
    assert files.run(*always, SHARE, "--steps", "6", out=whole) == 0
    assert files.run(*always, SHARE, "--steps", "4") == 0
    assert files.run(*always, "--steps", "6", "--resume") == 1
    assert "share_prefixes: True then, False now" in capsys.readouterr().err
    assert files.run(*always, "--padding_free", "--steps", "6", "--resume") == 0
    for name, weight in files.weights().items():
        assert torch.equal(files.weights(whole)[name], weight)
