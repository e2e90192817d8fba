"""From checked pairs to token ids: TRL's own tokenisation, and a look at all that it can lose.

The ids come from ``DPOTrainer._prepare_dataset`` itself. Around it, every pair is checked before a
model is loaded: that the chat template takes the conversation and shows all of it, that a prompt
and a completion have tokens, that one end of turn is trained, that every id has an embedding, and
that nothing is ever cut.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
import transformers
import trl
from datasets import Dataset, Features, Value
from trl import data_utils
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

import fastdpop
from fastdpop.data.template import (
    Conversation,
    Turn,
    find_loss,
    render_pair,
    turn_of,
    unused_options,
)

TOO_LONG = ("error", "drop")
"""What may become of a pair beyond the greatest length; the first is the default."""

# TRL before 1.15 takes what follows the prompt's number of tokens for the completion.
_TRL_SLICES = not hasattr(data_utils, "common_prefix_length")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_CHECKED = Features(
    {
        "prompt_tokens": Value("int64"),
        "left_out": Value("string"),
        "dropped_thinking": Value("bool"),
        "ended": Value("bool"),
        "unused_options": Value("string"),
    }
)

_NO_PROMPT = (
    "field 'prompt' has no tokens of its own, so the first token of a completion follows nothing"
)
_LEFT_OUT = (
    "the chat template ends the prompt alone with {left}, which is not there when an answer follows. "
    "It is left out of training: the model is trained in another context than the one it will "
    "answer in. Use a chat template that writes the same in both cases"
)
_MERGED = (
    "the end of the prompt and the start of a completion make one token, so the completions start "
    "before their own text, the chosen one with {start!r}, while the model will answer the whole "
    "prompt. In pairs of text, a space at a prompt's end belongs at the start of the completions"
)
_THINKING = (
    "the chat template drops the thinking of earlier turns of the prompt, in training as when the "
    "model answers"
)
_ENDED = "a completion brings an end of turn along, and another would be written after it; one is trained"
_ADDED = (
    "the tokenizer ends every text with a special token; each completion is trained on one {eos!r}, "
    "and no prompt ends with the tokenizer's"
)
_UNUSED = "the chat template does not know these of 'chat_template_kwargs': {options}"
_UNKNOWN = "some of the text is unknown to the tokenizer, and reaches the model as {unk!r}"


class _Tokenizer:
    """What TRL tokenises with: the tokenizer without what would be wrong around a completion.

    A text keeps one BOS and ends as it is written, without an EOS that the tokenizer adds to all
    texts; a finished conversation ends without a generation prompt. The versions and the day are
    here because a tokenisation is cached under a hash of this object.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.inner = tokenizer
        self.eos_token = tokenizer.eos_token
        self.turn = turn_of(tokenizer) if tokenizer.chat_template else Turn("", "")
        self.added = _added(tokenizer)
        self.versions = (fastdpop.__version__, trl.__version__, transformers.__version__)
        dated = "strftime_now" in str(tokenizer.chat_template)
        self.day = datetime.date.today().isoformat() if dated else None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text that no template has written."""
        ids = self.inner(text=text)["input_ids"]
        ids = ids[: len(ids) - self.added]
        bos = self.inner.bos_token_id
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(self.inner.bos_token):
            ids = ids[1:]
        return ids

    def apply_chat_template(
        self, messages: Any, *, add_generation_prompt: bool = False, **options: Any
    ) -> Any:
        if add_generation_prompt or not self.turn.header:
            return self.inner.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, **options
            )
        options |= {"tokenize": False, "return_dict": False}
        text = self.inner.apply_chat_template(messages, **options).removesuffix(self.turn.header)
        return {"input_ids": self.rendered(text)}

    def rendered(self, text: str) -> list[int]:
        """The ids of what a chat template has written, which has its own BOS."""
        return self.inner(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids))


def _added(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts after every text."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    ids = tokenizer("x")["input_ids"]
    starts = [i for i in range(len(ids)) if bare and ids[i : i + len(bare)] == bare]
    return len(ids) - starts[-1] - len(bare) if starts else 0


def tokenize(
    dataset: Dataset,
    tokenizer: Any,
    args: DPOConfig,
    name: str,
    *,
    max_length: int | None,
    too_long: str,
    vocab_size: int | None,
    progress: bool = True,
) -> tuple[Dataset, int]:
    """Token ids of preference pairs, as TRL's ``DPOTrainer`` makes them, checked.

    Warns, with a count and the first place, of what is legal and may surprise: a prompt that does
    not stand in front of its completions as it is, thinking of earlier turns that the template
    drops, an end of turn that a completion brings along, options that the template does not know,
    characters that the tokenizer does not know.

    Args:
        dataset: columns ``prompt``, ``chosen``, ``rejected`` (strings, or lists of messages) and
            ``place``; optionally ``tools`` (JSON) and ``chat_template_kwargs``.
        tokenizer: a Hugging Face tokenizer.
        args: of it, ``dataset_num_proc`` is read, and which process this is.
        name: what the dataset is called on progress bars, such as ``"train"``.
        max_length: most tokens of a sequence, prompt included; None for no limit.
        too_long: what happens to a pair beyond it: ``"error"``, or ``"drop"`` the whole pair.
        vocab_size: rows of the model's embedding; None not to check ids against it.
        progress: show progress bars.

    Returns:
        The columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``place``; and how many
        pairs were dropped as too long. Chosen and rejected follow the same prompt ids.

    Raises:
        ValueError: a pair can't be tokenised as it is; the message starts with its place.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"the {name} dataset is streamed ({type(dataset).__name__}): its pairs cannot be checked "
            "before training; load it whole (streaming=False)"
        )
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long is {too_long!r}, expected 'error' or 'drop'")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2")
    if not len(dataset):
        raise ValueError(f"the {name} dataset has no pairs")
    place = dataset[0]["place"]
    chat = isinstance(dataset[0]["prompt"], list)
    if chat and not tokenizer.chat_template:
        raise ValueError(
            f"{place}: field 'prompt' is a list of chat messages, but the tokenizer has no chat "
            "template: give prompt, chosen and rejected as text, or use a tokenizer that has one "
            "(an instruction-tuned model's)"
        )
    if not chat and not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer has no EOS token, and a completion that is text needs one to end with: "
            "set eos_token in its tokenizer_config.json"
        )
    processing = _Tokenizer(tokenizer)
    with _quiet(progress):
        with args.main_process_first(desc=f"checking the {name} dataset"):
            checked = dataset.map(
                _check,
                batched=True,
                batch_size=100,
                fn_kwargs={"processing": processing},
                remove_columns=dataset.column_names,
                features=_CHECKED,
                num_proc=args.dataset_num_proc,
                desc=f"Checking {name} dataset",
            )
            seen = checked[:]
            if any(seen["ended"]):
                dataset = dataset.map(
                    _end_once,
                    fn_kwargs={"processing": processing},
                    num_proc=args.dataset_num_proc,
                    desc=f"Ending completions of {name} dataset once",
                )
        tokens = _trl_tokens(dataset, processing, args, name)
    found = _Ids(tokens, processing)
    found.check(vocab_size)
    if args.process_index == 0:
        for message in found.remarks(seen, chat):
            warnings.warn(message, stacklevel=2)
    return _not_too_long(tokens, found.lengths, max_length, too_long)


def _trl_tokens(dataset: Dataset, processing: Any, args: DPOConfig, name: str) -> Dataset:
    """The ids by TRL's own code, which needs little of a trainer and no model."""
    args = copy.copy(args)
    args.max_length = None  # it would drop pairs without a word
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = processing
    trainer._is_vlm = False
    tokens = trainer._prepare_dataset(dataset, processing, args, name)
    return tokens.with_format(None).select_columns([*_IDS, "place"])


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without TRL's warning about prompts, in whose place ours counts, and bars on request."""
    logger = logging.getLogger(DPOTrainer.__module__)
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if bars and not progress:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars and not progress:
            datasets.enable_progress_bars()


# -------------------------------------------------------------------------------- before tokenising


def _check(batch: dict[str, list[Any]], processing: _Tokenizer) -> dict[str, list[Any]]:
    """What is to be known of each pair before its ids; see ``_CHECKED``."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    checked = [_check_pair(row, processing) for row in rows]
    return {field: [pair[field] for pair in checked] for field in _CHECKED}


def _check_pair(row: dict[str, Any], processing: _Tokenizer) -> dict[str, Any]:
    place = row["place"]
    chat = isinstance(row["prompt"], list)
    for field in ("prompt", "chosen", "rejected"):
        if chat and not row[field]:
            raise ValueError(f"{place}: field '{field}' has no messages")
    ended = _end_once(row, processing)
    changed = any(ended[field] != row[field] for field in ended)
    row = row | ended
    if chat:
        texts = render_pair(processing.inner, processing.turn, row, place)
        dropped = find_loss(row, texts, place)
        encode = processing.rendered
    else:
        texts = Conversation(row["prompt"], *(row["prompt"] + row[field] for field in ended))
        dropped = False
        encode = processing.encode
    prompt = encode(texts.prompt)
    if not prompt:
        raise ValueError(f"{place}: {_NO_PROMPT}")
    if _TRL_SLICES:
        for field, text in zip(ended, texts[1:], strict=True):
            if encode(text)[: len(prompt)] != prompt:
                raise ValueError(
                    f"{place}: field '{field}': the tokens of the prompt are not those at the start "
                    f"of prompt and completion, which TRL {trl.__version__} mangles (it cuts by the "
                    "prompt's length): update to TRL 1.15 or later, which needs Python 3.11"
                )
    return {
        "prompt_tokens": len(prompt),
        "left_out": texts.left_out,
        "dropped_thinking": dropped,
        "ended": changed,
        "unused_options": ", ".join(unused_options(processing.inner, row)) if chat else "",
    }


def _end_once(row: dict[str, Any], processing: _Tokenizer) -> dict[str, Any]:
    """The completions without the ends of a turn that the template or TRL will write."""
    return {field: _without_end(row[field], processing) for field in ("chosen", "rejected")}


def _without_end(completion: Any, processing: _Tokenizer) -> Any:
    eos, end = processing.eos_token, processing.turn.end
    if isinstance(completion, str):
        text = _strip(completion, (eos,))
        return completion if text + eos == completion else text  # TRL leaves one EOS alone, too
    content = completion[-1].get("content")
    if not end or not isinstance(content, str):
        return completion  # a template that ends no turn leaves that to the text
    text = _strip(content, (end, eos) if eos else (end,))
    return completion if text == content else [*completion[:-1], completion[-1] | {"content": text}]


def _strip(text: str, ends: tuple[str, ...]) -> str:
    while (bare := text.rstrip()).endswith(ends):
        text = next(bare.removesuffix(end) for end in ends if bare.endswith(end))
    return text


# --------------------------------------------------------------------------------- after tokenising


class _Ids:
    """The token ids of all pairs, looked at as arrays."""

    def __init__(self, tokens: Dataset, processing: _Tokenizer) -> None:
        table = tokens.with_format("arrow")[:]
        self.places = table["place"]
        self.columns = {field: table[field] for field in _IDS}
        self.sizes = {
            field: np.asarray(pc.list_value_length(column))
            for field, column in self.columns.items()
        }
        self.tokenizer = processing.inner
        self.adds_end = processing.added > 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer sequence of each pair, prompt included."""
        prompt, chosen, rejected = (self.sizes[field] for field in _IDS)
        return np.asarray(prompt + np.maximum(chosen, rejected))

    def check(self, vocab_size: int | None) -> None:
        """Every prompt and completion has tokens, and every token an embedding."""
        for field, sizes in self.sizes.items():
            for i in np.flatnonzero(sizes == 0)[:1]:
                raise ValueError(
                    f"{self.places[i]}: "
                    + (
                        _NO_PROMPT
                        if field == "prompt_ids"
                        else f"field '{field[:-4]}' {self._empty}"
                    )
                )
        if vocab_size is None:
            return
        for field, column in self.columns.items():
            ids = np.asarray(pc.list_flatten(column))
            for at in np.flatnonzero(ids >= vocab_size)[:1]:
                i = np.searchsorted(np.cumsum(self.sizes[field]), at, side="right")
                raise ValueError(
                    f"{self.places[i]}: field '{field.removesuffix('_ids')}': the token "
                    f"{self.tokenizer.convert_ids_to_tokens(int(ids[at]))!r} has the id {ids[at]}, "
                    f"but the model's embedding has {vocab_size} rows and the tokenizer "
                    f"{len(self.tokenizer)} tokens: use the model's own tokenizer, or resize the "
                    "model's embedding"
                )

    @property
    def _empty(self) -> str:
        return (
            "has no tokens: it is empty, and nothing ends it (the tokenizer's EOS token is "
            f"{self.tokenizer.eos_token!r}, and its chat template writes no end of a turn)"
        )

    def remarks(self, checked: dict[str, list[Any]], chat: bool) -> Iterator[str]:
        """What a user should know: each with the first place and a count."""
        left = np.asarray(checked["left_out"]) != ""
        moved = np.asarray(checked["prompt_tokens"]) > self.sizes["prompt_ids"]
        notes = (
            (left, _LEFT_OUT),
            (moved & ~left, _MERGED),
            (np.asarray(checked["dropped_thinking"]), _THINKING),
            (np.asarray(checked["ended"]), _ENDED),
            (np.full(len(left), self.adds_end and not chat), _ADDED),
            (np.asarray(checked["unused_options"]) != "", _UNUSED),
            (self._unknown(), _UNKNOWN),
        )
        for which, text in notes:
            for i in np.flatnonzero(which)[:1].tolist():
                more = int(which.sum()) - 1
                yield f"{self.places[i]}{f' and {more} more' if more else ''}: " + text.format(
                    left=repr(checked["left_out"][i])[:100],
                    start=self.tokenizer.decode(self.columns["chosen_ids"][i].as_py()[:3]),
                    options=checked["unused_options"][i],
                    eos=self.tokenizer.eos_token,
                    unk=self.tokenizer.unk_token,
                )

    def _unknown(self) -> np.ndarray:
        """Which pairs have a token that stands for whatever the tokenizer does not know."""
        tokenizer = self.tokenizer
        unknown = np.zeros(len(self.places), bool)
        if tokenizer.unk_token_id in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):
            return unknown  # none, or one that has another meaning, too
        for field, column in self.columns.items():
            at = np.flatnonzero(np.asarray(pc.list_flatten(column)) == tokenizer.unk_token_id)
            unknown[np.searchsorted(np.cumsum(self.sizes[field]), at, side="right")] = True
        return unknown


def _not_too_long(
    tokens: Dataset, lengths: np.ndarray, max_length: int | None, too_long: str
) -> tuple[Dataset, int]:
    """The pairs within the greatest length, and how many are not."""
    if max_length is None or (lengths <= max_length).all():
        return tokens, 0
    longer = np.flatnonzero(lengths > max_length)
    if too_long == "error":
        first = int(longer[0])
        raise ValueError(
            f"{tokens[first]['place']}: the pair has {lengths[first]} tokens, more than max_length = "
            f"{max_length}. Completions are never cut: raise --max-length, or drop such pairs with "
            "--too-long drop"
        )
    if len(longer) == len(tokens):
        raise ValueError(f"all {len(tokens)} pairs have more than max_length = {max_length} tokens")
    return tokens.select(np.flatnonzero(lengths <= max_length)), len(longer)
