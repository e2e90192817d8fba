"""CPO and SimPO: TRL's experimental trainer gives TRL's results on fastdpop."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import concatenate_datasets

import fastdpop
from fastdpop.hf.forward import attachment_of
from fastdpop.integrations.trl.cpo import preference
from tests.integrations.trl_setup import (
    MONITOR,
    WARNINGS,
    arguments,
    gradients,
    model,
    namespace,
    pairs,
)
from tests.tiny_model import tiny_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    cpo: Any = importlib.import_module("trl.experimental.cpo")

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


@pytest.fixture
def patched() -> Iterator[None]:
    before = namespace(cpo.CPOTrainer)
    fastdpop.patch_trl()
    yield
    fastdpop.unpatch_trl()
    assert namespace(cpo.CPOTrainer) == before


def trainer(folder: Path, policy: Any = None, data: Any = None, **options: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|end|>"  # TRL asks for one
    return cpo.CPOTrainer(
        model() if policy is None else policy,
        args=arguments(folder, cpo.CPOConfig, max_length=64, **options),
        train_dataset=pairs() if data is None else data,
        processing_class=tokenizer,
    )


def step(of: Any, mode: str = "train") -> tuple[float, dict[str, Any], dict[str, float]]:
    batch = of._prepare_inputs(next(iter(of.get_train_dataloader())))
    loss, metrics = of.get_batch_loss_metrics(of.model, batch, mode)
    loss.backward()
    return loss.item(), gradients(of.model), metrics


CASES: list[dict[str, Any]] = [
    {"loss_type": "sigmoid", "cpo_alpha": 1.0},
    {"loss_type": "sigmoid", "cpo_alpha": 0.0, "label_smoothing": 0.2},
    {"loss_type": "hinge", "cpo_alpha": 0.5},
    {"loss_type": "ipo", "cpo_alpha": 0.0},
    {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7},
    {"loss_type": "simpo", "cpo_alpha": 0.3, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_loss(options: dict[str, Any], tmp_path: Path, patched: None) -> None:
    ours = trainer(tmp_path, **options)
    fastdpop.unpatch_trl()
    theirs = trainer(tmp_path, **options)
    assert not hasattr(theirs, "_fastdpop")
    own_loss, own_gradient, own_metrics = step(theirs)
    fastdpop.patch_trl()
    loss, gradient, metrics = step(ours)
    assert loss == pytest.approx(own_loss, rel=2e-5)
    largest = max(value.abs().max().item() for value in own_gradient.values())
    for name, value in gradient.items():
        torch.testing.assert_close(value, own_gradient[name], rtol=1e-3, atol=2e-5 * largest)
    assert set(metrics) == {*own_metrics, *MONITOR[:-1]}
    for name, value in own_metrics.items():
        if not name.startswith("logits/"):  # TRL's are those of prompts and padding too
            assert metrics[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("options", CASES[-2:], ids=str)
def test_shared_prefixes(options: dict[str, Any], tmp_path: Path, patched: None) -> None:
    found = []
    for share in (False, True):
        fastdpop.patch_trl(share_prefixes=share)
        of = trainer(tmp_path, per_device_train_batch_size=8, **options)  # in any order
        assert attachment_of(of.model).settings["share_prefixes"] is share  # type: ignore[union-attr]
        tokens: list[int] = []
        of.model.get_input_embeddings().register_forward_hook(
            lambda _, ids, __, tokens=tokens: tokens.append(ids[0].numel())
        )
        found.append((step(of), tokens[-1]))
    ((loss, gradient, metrics), count), ((own_loss, own_gradient, own_metrics), own_count) = found
    assert own_count < count
    assert own_loss == pytest.approx(loss, rel=2e-5)
    assert own_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-3, atol=1e-4)


def test_pairs_of_one_prompt_stand_side_by_side(tmp_path: Path, patched: None) -> None:
    fastdpop.patch_trl(share_prefixes=True)
    data = concatenate_datasets([pairs(4), pairs(4)])
    order = list(trainer(tmp_path, data=data).get_train_dataloader().batch_sampler.sampler)
    assert sorted(order) == list(range(8))
    assert [abs(a - b) for a, b in zip(order[::2], order[1::2], strict=True)] == [4] * 4


def test_mean_logits_are_those_of_completions(tmp_path: Path, patched: None) -> None:
    of = trainer(tmp_path)
    batch = of._prepare_inputs(next(iter(of.get_train_dataloader())))
    _, metrics = of.get_batch_loss_metrics(of.model, batch, "eval")
    with torch.no_grad():
        logits = of.model(batch["chosen_input_ids"], batch["chosen_attention_mask"]).logits
    scored = batch["chosen_labels"][:, 1:] != -100
    assert metrics["eval_logits/chosen"] == pytest.approx(
        logits[:, :-1][scored].mean().item(), rel=1e-4
    )


def test_the_monitor_token_by_token(tmp_path: Path, patched: None) -> None:
    """One of the pairs does not differ, and counts for no difference."""
    data = pairs(4)
    data = concatenate_datasets(
        [data, data.select([0]).map(lambda row: {"rejected": row["chosen"]})]
    )
    of = trainer(tmp_path, data=data, per_device_train_batch_size=5)
    batch = of._prepare_inputs(next(iter(of.get_train_dataloader())))
    _, metrics = of.get_batch_loss_metrics(of.model, batch, "train")
    first, after = [], []
    for i in range(5):
        kept = []
        for side in ("chosen", "rejected"):
            ids, labels = batch[f"{side}_input_ids"][i], batch[f"{side}_labels"][i, 1:]
            with torch.no_grad():
                logps = of.model(ids[None]).logits[0, :-1].double().log_softmax(-1)
            scored = labels != -100
            kept.append((labels[scored], logps[scored].gather(1, labels[scored][:, None])[:, 0]))
        (tokens, logps), (others, _) = kept
        place = next(
            (k for k, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), None
        )
        if place is not None:
            first.append(logps[place].item())
            after.append(logps[place + 1 :].mean().item())
    assert len(first) == 4
    assert metrics["logps/first_difference"] == pytest.approx(sum(first) / 4, rel=1e-4)
    assert metrics["logps/after_difference"] == pytest.approx(sum(after) / 4, rel=1e-4)
    assert metrics["ches"] != metrics["ches_normalised"]
    assert "hinge_on" not in metrics


def test_training(tmp_path: Path, patched: None) -> None:
    of = trainer(tmp_path, loss_type="simpo", cpo_alpha=0.0, max_steps=8)
    of.train()
    margins = [row["rewards/margins"] for row in of.state.log_history if "grad_norm" in row]
    assert margins[-1] > margins[0]


def test_what_is_left_to_trl(tmp_path: Path, patched: None) -> None:
    assert not hasattr(trainer(tmp_path, alpha=0.5), "_fastdpop")

    class Headless(type(model())):  # type: ignore[misc]
        def get_output_embeddings(self) -> None:
            return None

    policy = model()
    policy.__class__ = Headless
    of = trainer(tmp_path, policy=policy)
    assert not hasattr(of, "_fastdpop")
    assert step(of)[0] > 0


def test_a_model_that_was_attached_otherwise_is_not_left_to_trl(
    tmp_path: Path, patched: None
) -> None:
    fastdpop.patch_trl(share_prefixes=True)
    with pytest.raises(ValueError, match="share_prefixes is True, expected False, as the model"):
        trainer(tmp_path, policy=fastdpop.attach(model()))


def test_unknown_loss(tmp_path: Path, patched: None) -> None:
    of = trainer(tmp_path)
    of.loss_type = "dpo"
    with pytest.raises(ValueError, match="loss_type is 'dpo', expected one of"):
        preference(of)
