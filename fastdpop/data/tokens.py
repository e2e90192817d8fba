"""From checked pairs to token ids: TRL's own tokenisation, and a look at all that it can lose.

The ids come from ``DPOTrainer._prepare_dataset`` itself. Around it, every pair is checked before a
model is loaded: that the chat template takes the conversation and shows all of it, that a prompt
and a completion have tokens, that one end of turn is trained, that every id has an embedding, and
that nothing is ever cut.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import trl
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Value
from trl import data_utils
from trl.trainer.dpo_trainer import DPOTrainer

from fastdpop.data.template import Conversation, find_loss, render_pair, unused_options
from fastdpop.data.tokenizer import PairTokenizer

TOO_LONG = ("error", "drop")
"""What may become of a pair beyond the greatest length; the first is the default."""

# TRL before 1.15 takes what follows the prompt's number of tokens for the completion.
_TRL_SLICES = not hasattr(data_utils, "common_prefix_length")
_BATCH = 100
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_CHECKED = Features(
    {
        "prompt_tokens": Value("int64"),
        "left_out": Value("string"),
        "dropped_thinking": Value("bool"),
        "ended": Value("bool"),
        "added": Value("bool"),
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
_ENDED = (
    "a completion brings an end of turn along, and another would be written after it; one is "
    "trained"
)
_ADDED = (
    "the tokenizer ends every text with a special token; each completion is trained on one {eos!r}, "
    "and no prompt ends with the tokenizer's"
)
_UNUSED = "the chat template does not know these of 'chat_template_kwargs': {options}"
_UNKNOWN = "some of the text is unknown to the tokenizer, and reaches the model as {unk!r}"


class _Remark(NamedTuple):
    """Which of the notes, the first pair's place, how many more there are, and the text."""

    note: str
    place: str
    more: int
    text: str


class _Limits(NamedTuple):
    """The most tokens of a pair, what becomes of a longer one, and how many ids there are."""

    max_length: int | None
    too_long: str
    vocab_size: int | None


def tokenize(
    dataset: Dataset | IterableDataset,
    tokenizer: Any,
    *,
    name: str = "train",
    max_length: int | None = None,
    too_long: str = TOO_LONG[0],
    vocab_size: int | None = None,
    num_proc: int | None = None,
    progress: bool = True,
) -> tuple[Dataset | IterableDataset, int]:
    """Token ids of preference pairs, as TRL's ``DPOTrainer`` makes them, checked.

    Warns, with the first place and a count, of what is legal and may surprise: a prompt that does
    not stand in front of its completions as it is, thinking of earlier turns that the template
    drops, an end of turn that a completion brings along, options that the template does not know,
    characters that the tokenizer does not know.

    Args:
        dataset: columns ``prompt``, ``chosen``, ``rejected`` (strings, or lists of messages) and
            ``place``; optionally ``tools`` (JSON) and ``chat_template_kwargs``. The pairs of a
            stream are checked when they come.
        tokenizer: a Hugging Face tokenizer.
        name: what the dataset is called in messages and on progress bars.
        max_length: most tokens of a sequence, prompt included; None for no limit.
        too_long: what happens to a pair beyond it: ``"error"``, or ``"drop"`` the whole pair.
        vocab_size: rows of the model's embedding; None not to check ids against it.
        num_proc: how many processes tokenise; None for this one alone.
        progress: show progress bars.

    Returns:
        The columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``place``; and how many
        pairs were dropped as too long (0 for a stream, which is not known). Chosen and rejected
        follow the same prompt ids.

    Raises:
        ValueError: a pair can't be tokenised as it is; the message starts with its place.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long is {too_long!r}, expected 'error' or 'drop'")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"the {name} dataset has no pairs")
    _check_tokenizer(tokenizer, first)
    processing = PairTokenizer(tokenizer)
    limits = _Limits(max_length, too_long, vocab_size)
    with _quiet(progress):
        if isinstance(dataset, IterableDataset):
            return _stream(dataset, processing, name, limits), 0
        checked, tokens = _tokenized(dataset, processing, name, num_proc)
    found = _Ids(tokens.with_format("arrow")[:], tokenizer)
    found.check(vocab_size)
    if PartialState().is_main_process:
        for remark in found.remarks(checked):
            count = f" and {remark.more} more" if remark.more else ""
            warnings.warn(f"{remark.place}{count}: {remark.text}", stacklevel=2)
    if max_length is None or (found.lengths <= max_length).all():
        return tokens, 0
    if too_long == "error":
        found.check_lengths(max_length)
    kept = np.flatnonzero(found.lengths <= max_length)
    if not len(kept):
        raise ValueError(f"all {len(tokens)} pairs have more than max_length = {max_length} tokens")
    return tokens.select(kept), len(tokens) - len(kept)


def _check_tokenizer(tokenizer: Any, first: dict[str, Any]) -> None:
    chat = isinstance(first["prompt"], list)
    if chat and not tokenizer.chat_template:
        raise ValueError(
            f"{first['place']}: field 'prompt' is a list of chat messages, but the tokenizer has no "
            "chat template: give prompt, chosen and rejected as text, or use a tokenizer that has "
            "one (an instruction-tuned model's)"
        )
    if not chat and not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer has no EOS token, and a completion that is text needs one to end with: "
            "set eos_token in its tokenizer_config.json"
        )


def _tokenized(
    dataset: Dataset, processing: PairTokenizer, name: str, num_proc: int | None
) -> tuple[dict[str, list[Any]], Dataset]:
    """What is to be known of each pair before its ids, see ``_CHECKED``; and the ids."""
    with PartialState().main_process_first():
        checked = dataset.map(
            _check,
            batched=True,
            batch_size=_BATCH,
            fn_kwargs={"processing": processing},
            remove_columns=dataset.column_names,
            features=_CHECKED,
            num_proc=num_proc,
            desc=f"Checking {name} dataset",
        )[:]
        if any(checked["ended"]) and isinstance(dataset[0]["prompt"], str):
            dataset = dataset.map(_end_once, fn_kwargs={"processing": processing})
    tokens = _trl_tokens(dataset, processing, name, num_proc)
    return checked, tokens.select_columns([*_IDS, "place"])


def _trl_tokens(dataset: Any, processing: Any, name: str, num_proc: int | None = None) -> Any:
    """The ids by TRL's own code, which needs little of a trainer, of a config, and no model."""
    # A greatest length would drop pairs without a word.
    args: Any = SimpleNamespace(dataset_num_proc=num_proc, max_length=None)
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = processing
    trainer._is_vlm = False
    tokens = trainer._prepare_dataset(dataset, processing, args, name)
    return tokens.with_format(None)


def _stream(
    dataset: IterableDataset,
    processing: PairTokenizer,
    name: str,
    limits: _Limits,
) -> IterableDataset:
    """The ids of a stream; each pair is checked when it comes, and each remark made once."""
    told: set[str] = set()

    def check_ids(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = _Ids(
            pa.table({field: batch[field] for field in (*_IDS, "place")}), processing.inner
        )
        found.check(limits.vocab_size)
        for remark in found.remarks(batch):
            if remark.note not in told:
                told.add(remark.note)
                warnings.warn(f"{remark.place}: {remark.text}", stacklevel=2)
        if limits.max_length is not None and limits.too_long == "error":
            found.check_lengths(limits.max_length)
        return {}

    options: dict[str, Any] = {"batched": True, "batch_size": _BATCH}
    rows = dataset.map(_check, fn_kwargs={"processing": processing}, **options)
    if isinstance(next(iter(dataset))["prompt"], str):
        rows = rows.map(_end_once, fn_kwargs={"processing": processing})
    rows = _trl_tokens(rows, processing, name).map(check_ids, **options)
    if limits.max_length is not None:
        rows = rows.filter(_within, fn_kwargs={"max_length": limits.max_length})
    return rows.select_columns([*_IDS, "place"])


def _within(row: dict[str, Any], max_length: int) -> bool:
    prompt, chosen, rejected = (len(row[field]) for field in _IDS)
    return prompt + max(chosen, rejected) <= max_length


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


def _check(batch: dict[str, list[Any]], processing: PairTokenizer) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    checked = [_check_pair(row, processing) for row in rows]
    return {field: [pair[field] for pair in checked] for field in _CHECKED}


def _check_pair(row: dict[str, Any], processing: PairTokenizer) -> dict[str, Any]:
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
        encode = processing.encode_rendered
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
        "added": not chat and processing.added > 0,
        "unused_options": ", ".join(unused_options(processing.inner, row)) if chat else "",
    }


def _end_once(row: dict[str, Any], processing: PairTokenizer) -> dict[str, Any]:
    return {field: processing.without_end(row[field]) for field in ("chosen", "rejected")}


# --------------------------------------------------------------------------------- after tokenising


class _Ids:
    """The token ids of pairs, looked at as arrays.

    Attributes:
        places: where each pair came from.
        columns: the ids by field.
        sizes: the numbers of ids by field.
        lengths: tokens of the longer sequence of each pair, prompt included.
    """

    def __init__(self, table: Any, tokenizer: Any) -> None:
        self.places = table["place"]
        self.columns = {field: table[field] for field in _IDS}
        self.sizes = {
            field: np.asarray(pc.list_value_length(column))
            for field, column in self.columns.items()
        }
        prompt, chosen, rejected = self.sizes.values()
        self.lengths = prompt + np.maximum(chosen, rejected)
        self._tokenizer = tokenizer

    def check(self, vocab_size: int | None) -> None:
        """Every prompt and completion has tokens, and every token an embedding."""
        tokenizer = self._tokenizer
        for field, sizes in self.sizes.items():
            for i in np.flatnonzero(sizes == 0)[:1].tolist():
                if field == "prompt_ids":
                    raise ValueError(f"{self.places[i]}: {_NO_PROMPT}")
                raise ValueError(
                    f"{self.places[i]}: field '{field.removesuffix('_ids')}' has no tokens: it is "
                    f"empty, and nothing ends it (the tokenizer's EOS token is "
                    f"{tokenizer.eos_token!r}, and its chat template writes no end of a turn)"
                )
        if vocab_size is None:
            return
        for field in _IDS:
            for i, token in self._where(field, lambda ids: ids >= vocab_size)[:1]:
                raise ValueError(
                    f"{self.places[i]}: field '{field.removesuffix('_ids')}': the token "
                    f"{tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, but the "
                    f"model's embedding has {vocab_size} rows and the tokenizer {len(tokenizer)} "
                    "tokens: use the model's own tokenizer, or resize the model's embedding"
                )

    def check_lengths(self, max_length: int) -> None:
        """No pair is too long."""
        for i in np.flatnonzero(self.lengths > max_length)[:1].tolist():
            raise ValueError(
                f"{self.places[i]}: the pair has {self.lengths[i]} tokens, more than max_length = "
                f"{max_length}. Completions are never cut: raise --max-length, or drop such pairs "
                "with --too-long drop"
            )

    def remarks(self, checked: dict[str, list[Any]]) -> Iterator[_Remark]:
        """What a user should know of these pairs; ``checked`` is what :func:`_check` says."""
        left = np.asarray(checked["left_out"]) != ""
        moved = np.asarray(checked["prompt_tokens"]) > self.sizes["prompt_ids"]
        notes = {
            _LEFT_OUT: left,
            _MERGED: moved & ~left,
            _THINKING: np.asarray(checked["dropped_thinking"]),
            _ENDED: np.asarray(checked["ended"]),
            _ADDED: np.asarray(checked["added"]),
            _UNUSED: np.asarray(checked["unused_options"]) != "",
            _UNKNOWN: self._unknown(),
        }
        for note, which in notes.items():
            for i in np.flatnonzero(which)[:1].tolist():
                chosen = self.columns["chosen_ids"][i].as_py()
                text = note.format(
                    left=repr(checked["left_out"][i])[:100],
                    start=self._tokenizer.decode(chosen[:3]),
                    options=checked["unused_options"][i],
                    eos=self._tokenizer.eos_token,
                    unk=self._tokenizer.unk_token,
                )
                yield _Remark(note, str(self.places[i]), int(which.sum()) - 1, text)

    def _unknown(self) -> Any:
        """Which pairs have a token that stands for whatever the tokenizer does not know."""
        unknown = np.zeros(len(self.places), bool)
        token = self._tokenizer.unk_token_id
        if token in (None, self._tokenizer.eos_token_id, self._tokenizer.bos_token_id):
            return unknown  # none, or one that has another meaning, too
        for field in _IDS:
            unknown[[i for i, _ in self._where(field, lambda ids: ids == token)]] = True
        return unknown

    def _where(self, field: str, test: Callable[[Any], Any]) -> list[tuple[int, int]]:
        """The pairs' numbers and the ids that pass a test."""
        ids = np.asarray(pc.list_flatten(self.columns[field]))
        at = np.flatnonzero(test(ids))
        pairs = np.searchsorted(np.cumsum(self.sizes[field]), at, side="right")
        return list(zip(pairs.tolist(), ids[at].tolist(), strict=True))
