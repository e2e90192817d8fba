"""Preference pairs as the padded batch that models and losses take."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdpop.data.formats import convert
from fastdpop.prefix.pack import token_ids
from fastdpop.rows import IGNORE

_COMPLETIONS = ("chosen", "rejected")
_TEXTS = ("prompt", *_COMPLETIONS)
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def collate(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
    """A padded batch of preference pairs, as TRL's ``DPOTrainer`` makes it, with labels.

        batch = fastdpop.collate(pairs, tokenizer)
        loader = DataLoader(pairs, 8, collate_fn=partial(fastdpop.collate, tokenizer=tokenizer))

    Args:
        rows: B pairs, each a dict. Either ``prompt``, ``chosen`` and ``rejected``, texts or lists of chat
            messages (``{"role": ..., "content": ...}``), with ``tools`` and ``chat_template_kwargs`` where
            a template reads them; without ``prompt``, it is what ``chosen`` and ``rejected`` both begin with
            (TRL's implicit prompt), or in the field that another format has for it, as in ``fastdpop train``.
            These are tokenised as TRL does, and need it installed. Or ``prompt_ids``, ``chosen_ids`` and
            ``rejected_ids``, integers; the completions without the prompt, and with the EOS that ends them.
            Other fields of a row are left out.
        tokenizer: a Hugging Face tokenizer; or, for rows of ids, the id that pads. A tokenizer without a
            padding token pads with its EOS. Padding stands on the right, whatever its `padding_side`.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``(2B, T)``, int64, on the CPU: the B chosen
        sequences, then the B rejected ones, T the tokens of the longest. `labels` are the ids of the
        completions' tokens, at the same positions, and -100 elsewhere.

    Raises:
        ValueError: a row is not as described, or cannot be tokenised; the message begins with the row (with
            its ``place``, if it has one) and names the field. Or there are no rows, or there is no padding id.
        ImportError: rows are text, and TRL is not installed.
    """
    pad_id = _pad_id(tokenizer)
    if isinstance(rows, (Mapping, str)) or not isinstance(rows, Iterable):
        raise ValueError(
            f"rows is {rows!r:.80}, expected a list of pairs, each a dict (of a datasets.Dataset: "
            "dataset.select(range(8)), since dataset[:8] is a dict of columns)"
        )
    sequences: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i, row in enumerate(rows):
        prompt, *completions = _ids(f"rows[{i}]", row, tokenizer)
        for side, completion in enumerate(completions):
            sequences[side].append(torch.cat([prompt, completion]))
            labels[side].append(torch.cat([torch.full_like(prompt, IGNORE), completion]))
    if not sequences[0]:
        raise ValueError("rows is empty, expected at least one pair")
    ids = sequences[0] + sequences[1]
    return {
        "input_ids": _padded(ids, pad_id),
        "attention_mask": _padded([torch.ones_like(row) for row in ids], 0),
        "labels": _padded(labels[0] + labels[1], IGNORE),
    }


def _pad_id(tokenizer: Any) -> int:
    pad_id = tokenizer
    if not isinstance(tokenizer, int):
        if not hasattr(tokenizer, "pad_token_id"):
            raise ValueError(
                f"tokenizer is {tokenizer!r:.80}, expected a Hugging Face tokenizer or the id that pads"
            )
        pad_id = tokenizer.pad_token_id
        if pad_id is None:
            pad_id = tokenizer.eos_token_id
        if pad_id is None:
            raise ValueError(
                "the tokenizer has no padding token and no EOS token to pad with: set pad_token"
            )
    if isinstance(pad_id, bool) or pad_id < 0:
        raise ValueError(f"the padding id is {pad_id}, expected a token id, which is 0 or more")
    return int(pad_id)


def _ids(place: str, row: Any, tokenizer: Any) -> list[Tensor]:
    """The ids of the prompt, the chosen completion and the rejected one."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} is {row!r:.80}, expected a dict with {', '.join(_TEXTS)}")
    place = str(row.get("place", place))
    if not any(name in row for name in _IDS):
        row = _tokenised(place, row, tokenizer)
    _require(place, row, _IDS)
    ids = [torch.from_numpy(token_ids(f"{place}: field '{name}'", row[name])) for name in _IDS]
    if not len(ids[0]):
        raise ValueError(
            f"{place}: field 'prompt_ids' is empty, so the first token of a completion would follow "
            "nothing: begin with a token that every text begins with, such as BOS"
        )
    return ids


def _tokenised(place: str, row: Mapping[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    _require(place, row, _COMPLETIONS)
    if isinstance(tokenizer, int):
        raise ValueError(
            f"{place}: field 'chosen' is {row['chosen']!r:.60}, and tokenizer a padding id: pass the "
            f"tokenizer, or rows of {', '.join(_IDS)}"
        )
    from fastdpop.data.tokens import pair_ids  # TRL takes seconds, and rows of ids do without

    try:
        fields = convert(row).fields
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    ids, notes = pair_ids({**fields, "place": place}, tokenizer)
    for note in notes:  # without the place: once, and not with every batch
        warnings.warn(f"fastdpop.collate: {note}", stacklevel=4)
    return ids


def _require(place: str, row: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in row:
            raise ValueError(
                f"{place}: field '{name}' is missing (fields here: {sorted(row)}), expected "
                f"{', '.join(_TEXTS)} or {', '.join(_IDS)}"
            )


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
