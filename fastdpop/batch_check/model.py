"""Mistakes that show when the model runs: dropout, padding that is seen, tokens of another tokenizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.batch_check.report import Finding, counted
from fastdpop.batch_check.scores import Runner
from fastdpop.batch_check.view import BatchView
from fastdpop.batch_check.vocabulary import Vocabulary
from fastdpop.hf.wrappers import wrapped

_NOISE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Nats per token by which log-probs computed in another order may differ, in the mean."""
_HARM = {
    torch.float16: "AdamW's epsilon is 0 there, and weights become NaN",
    torch.bfloat16: "an update of less than 1/512 of a weight is lost, and at small learning rates nearly all are",
}
"""What becomes of weights that an optimizer updates in their own 16 bits."""
_WORSE = 2.0
"""Nats per token below a guess among all tokens: a model that has not been trained stays above."""


def dropouts(model: nn.Module) -> list[str]:
    """Modules in training mode that drop something out, as ``name (rate)``."""
    found = []
    for name, module in model.named_modules():
        if not module.training:
            continue
        rates = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, float)
            and value > 0
            and (key == "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "drop" in key)
        }
        found += [f"{name or type(module).__name__} ({value:g})" for value in rates.values()]
    return found


def check_dropout(names: list[str], evidence: str = "") -> list[Finding]:
    """
    Args:
        evidence: what it does to the log-probs of a sequence, if that was looked at.
    """
    if not names:
        return []
    more = f" and {counted(len(names) - 1, 'other module')}" if len(names) > 1 else ""
    return [
        Finding(
            "dropout-on",
            "warning",
            f"dropout is on: {names[0]}{more}{evidence}",
            "Call model.eval() before you train too (gradients flow all the same), or set the rates to 0 "
            "(disable_dropout=True in TRL): a log-ratio would be noise of the policy's pass",
        )
    ]


def measured_dropout(runner: Runner, view: BatchView, logps: Tensor) -> list[Finding]:
    """The shortest sequence twice: as in training, and without dropout."""
    for module in runner.training:
        module.training = True
    names = dropouts(runner.model)
    for module in runner.training:
        module.training = False
    counted = view.lengths > 0
    if not names or not bool(counted.any()):
        return []
    row = int(view.lengths.masked_fill(~counted, view.ids.shape[1] + 1).argmin())
    one = view.rows([row])
    scored = logps[row][view.scored[row]]
    dropped = runner.logps(one, dropping=True)[0][one.scored[0]]
    off = float((dropped - scored).abs().mean())
    if off <= noise(runner.model):  # a batch of other sequences may have rounded otherwise
        scored = runner.logps(one)[0][one.scored[0]]
        off = float((dropped - scored).abs().mean())
    if off <= noise(runner.model) / 100:
        # What is dropped in front of an adapter's zeros shows after the first step only.
        modules = dict(runner.model.named_modules())
        real = [
            name
            for name in names
            if isinstance(modules.get(name.split(" ")[0]), nn.modules.dropout._DropoutNd)
        ]
        return check_dropout(real, "; it changes nothing yet")
    evidence = (
        f"; sequence {row} has {float(dropped.sum()):.2f} nats with it and {float(scored.sum()):.2f} without, "
        f"{off:.2g} nats per token apart"
    )
    return check_dropout(names, evidence)


def check_padding(runner: Runner, view: BatchView, logps: Tensor) -> list[Finding]:
    """The sequence with the most padding in front by itself: what stands around it must not matter."""
    before = view.begins
    if "position_ids" not in view.extra and not bool(before.any()):
        return []
    row = int(before.argmax())
    start, end = int(before[row]), int(view.attended[row].nonzero()[-1]) + 1
    alone = BatchView(
        view.ids[row : row + 1, start:end],
        view.labels[row : row + 1, start:end],
        view.attended[row : row + 1, start:end],
        False,
        (),
        extra={k: v for k, v in view.extra.items() if not isinstance(v, Tensor)},
    )
    kept = alone.scored[0]
    if not bool(kept.any()) or not bool(alone.attended.all()):
        return []
    given, own = logps[row, start:end][kept], runner.logps(alone)[0][kept]
    off = float((given - own).abs().mean())
    if off <= noise(runner.model):
        return []
    return [
        Finding(
            "padding-changes-logps",
            "warning",
            f"sequence {row} has {float(given.sum()):.2f} nats in this batch, with {start} tokens of padding in "
            f"front, and {float(own.sum()):.2f} alone, {off:.2f} nats per token apart",
            "Pass attention_mask (0 on padding) and, for padding on the left, position_ids that count from 0 at each "
            "sequence's first token; or pad on the right",
        )
    ]


def check_likelihood(view: BatchView, logps: Tensor, vocabulary: Vocabulary) -> list[Finding]:
    """Tokens that the model finds less likely than any guess are another tokenizer's, or not shown in this order."""
    scored = logps[view.scored]
    if vocabulary.size is None or len(scored) < 4:
        return []
    mean, guess = float(scored.mean()), -math.log(vocabulary.size)
    if not mean < guess - _WORSE:
        return []
    return [
        Finding(
            "tokens-unlikely",
            "warning",
            f"the model gives {len(scored)} scored tokens {mean:.1f} nats each in the mean, less than a guess "
            f"among its {vocabulary.size} tokens ({guess:.1f})",
            "Tokenise with the model's own tokenizer",
        )
    ]


def check_weights(model: Any) -> list[Finding]:
    """Trained weights in 16 bits; DeepSpeed trains its own copies of them in 32.

    LoRA's may be bfloat16, as TRL has those of QLoRA: they start at 0, and take larger steps.
    """
    around, outside = model, []
    while around is not None:
        outside.append(around)
        around = wrapped(around)
    trained = [
        p
        for name, p in outside[-1].named_parameters()
        if p.requires_grad and not ("lora_" in name and p.dtype == torch.bfloat16)
    ]
    if any(type(m).__module__.startswith("deepspeed") for m in outside):
        return []
    if any(hasattr(p, "ds_id") for p in trained):
        return []
    for dtype, harm in _HARM.items():
        count = sum(p.numel() for p in trained if p.dtype == dtype)
        if count == 0:
            continue
        share = count / sum(p.numel() for p in trained)
        return [
            Finding(
                "weights-half-precision",
                "warning",
                f"{_part(share)} trained weights are {dtype}: {harm}",
                "Load the model in float32 (dtype=torch.float32) and compute under autocast (bf16=True in a trainer), "
                "or train adapters (LoRA) in float32. An optimizer that keeps float32 copies of weights needs neither",
            )
        ]
    return []


def _part(share: float) -> str:
    if share == 1:
        return "all"
    return "nearly all" if share > 0.995 else f"{share:.0%} of the"


def noise(model: Any) -> float:
    """The nats per token by which two passes of a model may differ in the mean."""
    return _NOISE.get(next(model.parameters()).dtype, 0.15)
