"""Preference pairs: reading them, tokenising them, and laying them out as a batch.

A file of pairs is JSONL, one object per line with the fields ``prompt``, ``chosen`` and ``rejected``;
further fields are left alone. ``prompt`` is a string or a list of chat messages; the completions
are strings, and an empty one is legal (the model is then scored on ending its turn at once).
Nothing here ever cuts a text: a pair that is too long is an error, or is dropped whole and counted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdpop.rows import IGNORE

TOO_LONG = ("error", "drop")
"""What may become of a pair beyond the greatest length; the first is the default."""

Message = dict[str, str]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """A prompt (text or chat messages ``{"role", "content"}``) and its two completions."""

    prompt: str | list[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class TokenPair:
    """The token ids of a :class:`Pair`.

    Both completions follow the very same prompt ids and end with the end of the turn.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences, prompt included."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


# ------------------------------------------------------------------------------------------ reading


def read_pairs(path: str | Path) -> list[Pair]:
    """Read preference pairs from a JSONL file; blank lines are skipped.

    Warns once, with the count, of pairs whose two completions are the same text: they are legal,
    and teach nothing.

    Raises:
        ValueError: a row is malformed, or there is none; the message starts with ``file:line:`` and
        names the field.
        OSError: the file cannot be read.
    """
    path = Path(path)
    pairs = [_pair(row, place) for place, row in read_jsonl(path)]
    if not pairs:
        raise ValueError(f"{path}: no pairs in this file")
    same = sum(pair.chosen == pair.rejected for pair in pairs)
    if same:
        warnings.warn(
            f"{path}: chosen equals rejected in {same} of {len(pairs)} pairs", stacklevel=2
        )
    return pairs


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place ``"file:line"`` for error messages."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(line) if line else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 ({error.reason})") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{place}: invalid JSON at column {error.colno} ({error.msg})"
                ) from None
            if not line:
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected an object, got {_kind(row)}")
            yield place, row


def _pair(row: dict[str, Any], place: str) -> Pair:
    for field in ("prompt", "chosen", "rejected"):
        if field not in row:
            raise ValueError(f"{place}: field '{field}' is missing (fields here: {sorted(row)})")
    for field in ("chosen", "rejected"):
        if not isinstance(row[field], str):
            raise ValueError(f"{place}: field '{field}' is {_kind(row[field])}, expected a string")
    prompt = row["prompt"]
    if isinstance(prompt, list):
        _check_messages(prompt, place)
    elif not isinstance(prompt, str):
        raise ValueError(
            f"{place}: field 'prompt' is {_kind(prompt)}, expected a string or a list of chat messages"
        )
    if not prompt:
        raise ValueError(f"{place}: field 'prompt' is empty")
    return Pair(prompt, row["chosen"], row["rejected"])


def _check_messages(messages: list[Any], place: str) -> None:
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise ValueError(
                    f"{place}: field 'prompt': message {i} has no string '{key}': {message!r:.80}"
                )
    if messages and messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{place}: field 'prompt' ends with an assistant message; the completion belongs in "
            "'chosen' and 'rejected'"
        )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


# --------------------------------------------------------------------------------------- corruption

_ANNOTATION = re.compile(r"<<[^<>]*=([^<>=]*)>>")


def without_annotations(answer: str) -> str:
    """A GSM8K answer as a reader sees it: ``48/2 = <<48/2=24>>24`` becomes ``48/2 = 24``."""
    return _ANNOTATION.sub("", answer)


def corrupt(answer: str, rng: random.Random) -> str | None:
    """Make one intermediate result of a GSM8K answer wrong; leave all else, the answer included.

    This is how the DPOP paper builds rejected completions from chosen ones (arXiv:2402.13228,
    Appendix D). GSM8K marks every result with a calculator annotation; the last one is the final
    answer's and is never touched.

    Args:
        answer: an answer with its ``<<...>>`` annotations.
        rng: chooses the result and the error.

    Returns:
        The corrupted answer without annotations, to set against ``without_annotations(answer)``;
        None when the answer has no intermediate result that is written as a plain number right
        after its annotation.
    """
    places = []
    for mark in list(_ANNOTATION.finditer(answer))[:-1]:
        shown = re.match(r"\d+(?:\.\d+)?(?![\d.,]*\d)", answer[mark.end() :])
        if shown and shown.group() == mark.group(1):
            places.append((mark.end(), shown.group()))
    if not places:
        return None
    start, right = rng.choice(places)
    errors = [e for e in (-10, -5, -3, -2, -1, 1, 2, 3, 5, 10) if Decimal(right) + e > 0]
    wrong = str(Decimal(right) + rng.choice(errors))
    end = start + len(right)
    return without_annotations(answer[:start]) + wrong + without_annotations(answer[end:])


# ------------------------------------------------------------------------------------- tokenisation

_STANDIN = "fastdpop-completion"


def tokenise(
    pairs: Sequence[Pair],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    too_long: str = TOO_LONG[0],
) -> tuple[list[TokenPair], int]:
    """Token ids of pairs, through the tokenizer's chat template if it has one.

    The prompt is what the model is given before it answers, the template's generation prompt
    included. The completion is the text as written plus the end of the turn: the template's, or the
    tokenizer's EOS. The two are tokenised apart, as they are when the model generates, so chosen and
    rejected share the prompt's ids exactly.

    Args:
        pairs: what to tokenise.
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens a sequence may have, prompt included; None for no limit.
        too_long: what happens to a pair beyond it: ``"error"``, or ``"drop"`` the whole pair.

    Returns:
        The tokenised pairs in order, and how many were dropped.

    Raises:
        ValueError: a pair is too long under ``"error"``; chat messages without a chat template; a
            tokenizer without a way to end a turn; a prompt without tokens (the first token of a
            completion needs one before it); all pairs dropped.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long is {too_long!r}, expected 'error' or 'drop'")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2")
    kept: list[TokenPair] = []
    for i, pair in enumerate(pairs):
        prompt, end = _frame(pair, tokenizer, i)
        ids = TokenPair(
            prompt,
            *(
                tuple(tokenizer(text + end, add_special_tokens=False)["input_ids"])
                for text in (pair.chosen, pair.rejected)
            ),
        )
        if max_length is None or ids.length <= max_length:
            kept.append(ids)
        elif too_long == "error":
            raise ValueError(
                f"pair {i} has {ids.length} tokens, more than max_length = {max_length}. Completions are never cut: "
                "raise max_length, or drop such pairs with too_long='drop'"
            )
    if pairs and not kept:
        raise ValueError(f"all {len(pairs)} pairs have more than max_length = {max_length} tokens")
    return kept, len(pairs) - len(kept)


def _frame(pair: Pair, tokenizer: Any, index: int) -> tuple[tuple[int, ...], str]:
    """The prompt's ids and the text that ends a completion."""
    eos = tokenizer.eos_token
    if getattr(tokenizer, "chat_template", None):
        messages = pair.prompt
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text, end = _through_template(tokenizer, messages)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif isinstance(pair.prompt, str):
        ids, end = tokenizer(pair.prompt)["input_ids"], ""
        if ids and ids[-1] == tokenizer.eos_token_id and not pair.prompt.endswith(eos):
            ids = ids[:-1]  # some tokenizers end every text; the completion is still to come
    else:
        raise ValueError(
            f"the prompt of pair {index} is a list of chat messages, but the tokenizer has no chat template: "
            "give prompts as strings"
        )
    end = end or eos
    if not end:
        raise ValueError(
            "the tokenizer has no EOS token and no chat template that ends a turn: set tokenizer.eos_token"
        )
    if not ids:
        raise ValueError(
            f"the prompt of pair {index} has no tokens, so its completions' first token follows nothing"
        )
    return tuple(ids), end


def _through_template(tokenizer: Any, messages: list[Message]) -> tuple[str, str]:
    """The prompt's text and the end of the assistant's turn, as the chat template writes them."""

    def render(extra: list[Message], generate: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                [*messages, *extra], tokenize=False, add_generation_prompt=generate
            )
        )

    answered = render([{"role": "assistant", "content": _STANDIN}], False)
    before, found, after = answered.rpartition(_STANDIN)
    if not found:
        raise ValueError("the chat template does not show the assistant's message")
    asked = render([], True)
    # A template without a generation prompt shows the assistant's header only in front of an answer.
    prompt = before if asked == render([], False) else asked
    return prompt, after.rstrip()  # what follows the turn's end is never generated, so never scored


# ----------------------------------------------------------------------------------------- batching


def collate(pairs: Sequence[TokenPair], pad_id: int) -> Batch:
    """Lay B pairs out as a batch of 2B sequences, all chosen first, padded on the right.

    Returns:
        ``input_ids`` and ``attention_mask``, ``(2B, T)`` int64, and ``labels``, ``(2B, T)`` int64:
        the ids again with prompt and padding at -100 (aligned with ``input_ids``; the shift by one
        happens inside the loss).
    """
    if not pairs:
        raise ValueError("pairs is empty, expected at least one")
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    shape = (len(rows), max(pair.length for pair in pairs))
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE)
    for i, (prompt, completion) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(completion)
        input_ids[i, :stop] = torch.tensor(prompt + completion)
        attention_mask[i, :stop] = 1
        labels[i, start:stop] = input_ids[i, start:stop]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class Batches:
    """Pairs as batches of fixed composition, each with its reference log-probabilities once known.

    Attributes:
        pairs: all pairs, in the order of the batches.
        ref_logps: from a batch's number to ``(2B,)`` on the CPU, chosen first; float64 where the
            device has it.
    """

    def __init__(self, pairs: Sequence[TokenPair], size: int, pad_id: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
        self.pairs = list(pairs)
        self.ref_logps: dict[int, Tensor] = {}
        self._size = size
        self._pad_id = pad_id

    @classmethod
    def shuffled(cls, pairs: Sequence[TokenPair], size: int, pad_id: int, *, seed: int) -> Batches:
        """Batches of the pairs mixed by a seed."""
        return cls([pairs[i] for i in _permutation(len(pairs), seed)], size, pad_id)

    def __len__(self) -> int:
        return -(-len(self.pairs) // self._size)

    def __getitem__(self, number: int) -> Batch:
        """The tensors of one batch, see :func:`collate`; the last batch may have fewer pairs."""
        start = number * self._size
        return collate(self.pairs[start : start + self._size], self._pad_id)

    def digest(self) -> str:
        """A fingerprint of all token ids and their order, by which a resumed run knows its data."""
        flat = [(pair.prompt, pair.chosen, pair.rejected) for pair in self.pairs]
        return hashlib.sha256(repr(flat).encode()).hexdigest()


def batch_numbers(batches: int, step: int, accumulate: int, seed: int) -> list[int]:
    """The batches of one optimizer step, every epoch in an order of its own.

    A pure function of its arguments, so that a resumed run needs no iterator's state.
    """
    numbers = []
    for i in range(step * accumulate, (step + 1) * accumulate):
        epoch, place = divmod(i, batches)
        numbers.append(_permutation(batches, seed + 1 + epoch)[place])
    return numbers


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist())
