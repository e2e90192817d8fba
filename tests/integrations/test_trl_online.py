"""Online DPO: TRL's experimental trainer gets its log-probs, and their gradients, without logits."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

import fastdpop
from fastdpop.integrations.trl.online import completion_logps
from tests.integrations.trl_setup import WARNINGS, arguments, gradients, model, namespace, pairs
from tests.tiny_model import tiny_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    online: Any = importlib.import_module("trl.experimental.online_dpo")

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNINGS]


@pytest.fixture
def patched() -> Iterator[None]:
    before = namespace(online.OnlineDPOTrainer)
    fastdpop.patch_trl()
    yield
    fastdpop.unpatch_trl()
    assert namespace(online.OnlineDPOTrainer) == before


def lengths(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trainer(folder: Path, **options: Any) -> Any:
    return online.OnlineDPOTrainer(
        model(),
        reward_funcs=lengths,
        args=arguments(folder, online.OnlineDPOConfig, max_new_tokens=6, **options),
        train_dataset=pairs().select_columns(["prompt"]),
        processing_class=tiny_tokenizer(),
    )


def batch() -> list[Tensor]:
    prompts, completions = torch.randint(256, (3, 7)), torch.randint(256, (3, 5))
    prompt_mask, completion_mask = torch.ones_like(prompts), torch.ones_like(completions)
    prompt_mask[0, :3] = 0
    completion_mask[1, 3:] = 0
    return [prompts, prompt_mask, completions, completion_mask]


@pytest.mark.parametrize("max_length", [512, 9])
def test_log_probs_of_completions(max_length: int, tmp_path: Path, patched: None) -> None:
    of, inputs, coefficients = trainer(tmp_path, max_length=max_length), batch(), torch.randn(3, 5)
    assert completion_logps(of, of.model, *inputs) is not None
    found = []
    for _ in range(2):
        of.model.zero_grad()
        logps = of._forward(of.model, *inputs)
        (logps * coefficients).sum().backward()
        found.append((logps.detach(), gradients(of.model)))
        fastdpop.unpatch_trl()
    (logps, gradient), (own_logps, own_gradient) = found
    torch.testing.assert_close(logps, own_logps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, own_gradient, rtol=1e-3, atol=1e-4)
    assert not torch.equal(logps, own_logps)  # two computations


def test_two_completions_share_their_prompt(tmp_path: Path, patched: None) -> None:
    prompts, completions = torch.randint(256, (3, 12)).repeat(2, 1), torch.randint(256, (6, 5))
    prompt_mask, completion_mask = torch.ones_like(prompts), torch.ones_like(completions)
    prompt_mask[::3, :2] = completion_mask[1, 3:] = 0
    inputs = [prompts, prompt_mask, completions, completion_mask]
    found = []
    for share in (False, True):
        fastdpop.patch_trl(share_prefixes=share)
        of = trainer(tmp_path)
        tokens: list[int] = []
        of.model.get_input_embeddings().register_forward_hook(
            lambda _, ids, __, tokens=tokens: tokens.append(ids[0].numel())
        )
        logps = of._forward(of.model, *inputs) * completion_mask
        (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
        found.append((logps.detach(), gradients(of.model), tokens[-1]))
    (logps, gradient, count), (shared_logps, shared_gradient, shared_count) = found
    assert shared_count == count - 3 * 12 - 2 - 2
    torch.testing.assert_close(shared_logps, logps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared_gradient, gradient, rtol=1e-3, atol=1e-4)


def test_no_room_for_a_prompt_is_left_to_trl(tmp_path: Path, patched: None) -> None:
    of, inputs = trainer(tmp_path), batch()
    of.max_length = 5
    assert completion_logps(of, of.model, *inputs) is None
    assert of._forward(of.model, *inputs).shape == (3, 5)


def test_training(tmp_path: Path, patched: None) -> None:
    of = trainer(tmp_path, max_steps=2)
    calls: list[bool] = []
    for module in (of.model, of.ref_model):
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append("return_logps" in kwargs), with_kwargs=True
        )
    of.train()
    assert sum(calls) == 4  # policy and reference, twice; the other calls generate
    rows = [row for row in of.state.log_history if "loss" in row]
    assert rows[0]["objective/kl"] == 0.0
    assert rows[1]["objective/kl"] != 0.0
