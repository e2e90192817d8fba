"""Log-probs for TRL's experimental ``OnlineDPOTrainer``, without logits; its loss stays TRL's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.rows import IGNORE


def serves(trainer: Any) -> bool:
    """Images and encoder-decoders are left to TRL."""
    return not (trainer.is_encoder_decoder or trainer.is_vision_model)


def completion_logps(
    trainer: Any,
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
) -> Tensor | None:
    """``OnlineDPOTrainer._forward``: the log-prob of every completion token, padding too, shaped as `completion_ids`.

    Where prefixes are shared, padding is not computed, and has log-probs of 0. TRL's loss reads none of them.

    None where the completions leave no room for a prompt: the first token's log-prob has no meaning then.
    """
    room = trainer.max_length - completion_ids.shape[1]
    if room < 1 or prompt_ids.shape[1] == 0:
        return None
    prompt_ids, prompt_mask = prompt_ids[:, -room:], prompt_mask[:, -room:]
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    labels = ids.clone()
    labels[:, : prompt_ids.shape[1]] = IGNORE
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    if trainer._fastdpop.share_prefixes:
        labels.masked_fill_(mask == 0, IGNORE)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        return_logps=True,
        preference_options={
            "reduction": "token",
            "share_prefixes": trainer._fastdpop.share_prefixes,
        },
    )
    return out.logps[:, prompt_ids.shape[1] :]
