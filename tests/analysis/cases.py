"""Preference pairs of token ids, degenerate ones among them, and what a model's own logits say of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROMPT = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
PAIRS: list[dict[str, Any]] = [
    {"prompt_ids": PROMPT, "chosen_ids": c, "rejected_ids": r}
    for c, r in (
        ([20, 21, 22, 23, 24, 25], [20, 21, 30, 23, 24, 25]),  # one token differs
        ([20, 21, 22], [20, 21, 22]),  # none does
        ([20, 21], [20, 21, 22, 23]),  # one is the beginning of the other
        ([40, 41, 42], [50]),  # nothing in common
        ([], [51, 52]),
        ([60], []),
        ([70, 71, 72, 73, 74, 75, 76, 77, 78], [70, 71, 79, 80, 72, 73, 74, 75, 76, 77, 78]),
    )
]
PAIRS += [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8, 7]}]


def own_states(model: Any, pair: dict[str, Any], side: str) -> tuple[Tensor, Tensor]:
    """``(T, V)`` log-probs and ``(T, H)`` states from which a completion's T tokens are predicted."""
    prompt, ids = pair["prompt_ids"], pair[f"{side}_ids"]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([prompt + ids]), output_hidden_states=True)
    kept = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
    return out.logits[0, kept].log_softmax(-1), out.hidden_states[-1][0, kept]


def own_logps(model: Any, pair: dict[str, Any], side: str) -> Tensor:
    """``(T,)`` log-probs of a completion's tokens."""
    ids = torch.tensor(pair[f"{side}_ids"], dtype=torch.int64)
    return own_states(model, pair, side)[0].gather(1, ids[:, None])[:, 0]
