"""Mistakes that show when the model runs: dropout, padding that is seen, tokens of another tokenizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.batch_check.labels import first_tokens
from fastdpop.batch_check.report import Finding
from fastdpop.batch_check.scores import Runner
from fastdpop.batch_check.view import BatchView
from fastdpop.batch_check.vocabulary import Vocabulary

_NOISE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Nats per token by which log-probs computed in another order may differ, in the mean."""
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
    more = f" and {len(names) - 1} modules more" if len(names) > 1 else ""
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
    if off <= noise(runner.model):
        return []
    evidence = (
        f"; sequence {row} has {float(dropped.sum()):.2f} nats with it and {float(scored.sum()):.2f} without, "
        f"{off:.2f} nats per token apart"
    )
    return check_dropout(names, evidence)


def check_padding(runner: Runner, view: BatchView, logps: Tensor) -> list[Finding]:
    """The sequence with the most padding in front by itself: what stands around it must not matter."""
    before = first_tokens(view)
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


def noise(model: Any) -> float:
    """The nats per token by which two passes of a model may differ in the mean."""
    return _NOISE.get(next(model.parameters()).dtype, 0.15)
