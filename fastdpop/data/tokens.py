"""From checked pairs to token ids: TRL's own tokenisation, and a look at all that it can lose.

The ids come from ``DPOTrainer._prepare_dataset`` itself. Around it, every pair is checked before a
model is loaded: that the chat template takes the conversation and shows all of it, that a prompt
and a completion have tokens, that one end of turn is trained, that every id has an embedding, and
that nothing is ever cut.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import trl
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from trl import data_utils
from trl.trainer.dpo_trainer import DPOTrainer

from fastdpop.data import template
from fastdpop.data.load import progress_bars
from fastdpop.data.tokenizer import PairTokenizer

TOO_LONG = ("error", "drop")
"""What may become of a pair beyond the greatest length; the first is the default."""

# TRL before 1.15 takes what follows the prompt's number of tokens for the completion.
_TRL_SLICES = not hasattr(data_utils, "common_prefix_length")
_COMPLETIONS = ("chosen", "rejected")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")

_NO_PROMPT = (
    "field 'prompt' has no tokens of its own, so the first token of a completion follows nothing: where its end and "
    "the completion's start make one token, put a space or the end of a line between them, or make messages of the "
    "pair with --chat (chat=True)"
)
_LEFT_OUT = (
    "the chat template ends the prompt alone with {left}, which is not there when an answer follows, nor "
    "in training: the model will answer in another context. Use one that writes the same in both cases"
)
_MERGED = (
    "the end of the prompt and the start of a completion make one token, so the completions start before "
    "their own text, the chosen one with {start!r}. In pairs of text, a space at a prompt's end belongs at "
    "the start of the completions"
)
_THINKING = (
    "the chat template drops the thinking of earlier turns, in training as when the model answers"
)
_ENDED = "a completion brings an end of turn along, and another would follow it; one is trained"
_NO_END = (
    "the chat template writes nothing after an answer, so the model is not trained to end its turn"
)
_ADDED = (
    "the tokenizer ends every text with a special token; each completion is trained on one {eos!r}, "
    "and no prompt ends with the tokenizer's"
)
_UNUSED = "the chat template does not know these of 'chat_template_kwargs': {options}"
_UNKNOWN = "some of the text is unknown to the tokenizer, and reaches the model as {unk!r}"


def tokenize(
    dataset: Dataset,
    tokenizer: Any,
    *,
    name: str = "train",
    max_length: int | None = None,
    too_long: str = TOO_LONG[0],
    vocab_size: int | None = None,
    num_proc: int | None = None,
    values: Sequence[str] = (),
    progress: bool = True,
) -> tuple[Dataset, int]:
    """Token ids of preference pairs, as TRL's ``DPOTrainer`` makes them, checked.

    Warns, with the first place and a count, of what is legal and may surprise, such as a prompt that
    does not stand in front of its completions as it is.

    Args:
        dataset: columns ``prompt``, ``chosen``, ``rejected`` (strings, or lists of messages) and
            ``place``; optionally ``tools`` (JSON) and ``chat_template_kwargs``.
        tokenizer: a Hugging Face tokenizer.
        name: what the dataset is called in messages and on progress bars.
        max_length: most tokens of a sequence, prompt included; None for no limit.
        too_long: what happens to a pair beyond it: ``"error"``, or ``"drop"`` the whole pair.
        vocab_size: rows of the model's embedding; None not to check ids against it.
        num_proc: how many processes tokenise; None for this one alone.
        values: columns that stay beside the ids.
        progress: show progress bars.

    Returns:
        The columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``place`` and `values`; and how
        many pairs were dropped as too long. Chosen and rejected follow the same prompt ids.

    Raises:
        ValueError: a pair can't be tokenised as it is; the message starts with its place.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long is {too_long!r}, expected 'error' or 'drop'")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"the {name} dataset is a {type(dataset).__name__}, expected a datasets.Dataset: all of it is "
            "checked before training, which a stream does not allow"
        )
    if not len(dataset):
        raise ValueError(f"the {name} dataset has no pairs")
    _check_tokenizer(tokenizer, dataset[0])
    processing = PairTokenizer(tokenizer)
    with progress_bars(progress):
        with PartialState().main_process_first():
            checked = dataset.map(
                _checked,
                fn_kwargs={"processing": processing},
                features=Features({**dataset.features, "notes": List(Value("string"))}),
                num_proc=num_proc,
                desc=f"Checking {name} dataset",
            )
        tokens = _trl_tokens(checked, processing, name, num_proc)
        with PartialState().main_process_first():
            lengths = tokens.map(
                _length,
                fn_kwargs={"processing": processing, "vocab_size": vocab_size},
                remove_columns=tokens.column_names,
                num_proc=num_proc,
                desc=f"Measuring {name} dataset",
            )["length"][:]
    if PartialState().is_main_process:
        _warn(checked)
    tokens = tokens.select_columns([*_IDS, "place", *values])
    long = [i for i, length in enumerate(lengths) if max_length and length > max_length]
    if long and too_long == "error":
        raise ValueError(
            f"{tokens[long[0]]['place']}: the pair has {lengths[long[0]]} tokens, more than max_length = "
            f"{max_length}. Completions are never cut: raise --max-length, or drop such pairs with "
            "--too-long drop"
        )
    if len(long) == len(tokens):
        raise ValueError(f"all {len(tokens)} pairs have more than max_length = {max_length} tokens")
    if long:
        tokens = tokens.select(sorted({*range(len(tokens))} - {*long}))
    return tokens, len(long)


def _check_tokenizer(tokenizer: Any, first: dict[str, Any]) -> None:
    chat = isinstance(first["prompt"], list)
    if chat and not tokenizer.chat_template:
        raise ValueError(
            f"{first['place']}: field 'prompt' is a list of chat messages, but the tokenizer has no chat "
            "template: give text, or use a tokenizer that has one (an instruction-tuned model's)"
        )
    if not chat and not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer has no EOS token, and a completion that is text needs one to end with: "
            "set eos_token in its tokenizer_config.json"
        )


def _trl_tokens(dataset: Any, processing: Any, name: str, num_proc: int | None) -> Any:
    """The ids by TRL's own code, which needs little of a trainer, of a config, and no model."""
    # A greatest length would drop pairs without a word.
    args: Any = SimpleNamespace(dataset_num_proc=num_proc, max_length=None)
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer._tokenizer = processing
    trainer._is_vlm = False
    logger = logging.getLogger(DPOTrainer.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # no warning about prompts: ours counts them
    try:
        return trainer._prepare_dataset(dataset, processing, args, name).with_format(None)
    finally:
        logger.setLevel(level)


def pair_ids(row: dict[str, Any], tokenizer: Any) -> tuple[dict[str, list[int]], list[str]]:
    """The ids of one pair, as :func:`tokenize` gives them, by no other process and no cache.

    Args:
        row: a row as in the dataset of :func:`tokenize`.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; and what :func:`tokenize` would warn of.

    Raises:
        ValueError: as :func:`tokenize`.
    """
    _check_tokenizer(tokenizer, row)
    processing = PairTokenizer(tokenizer)
    looked = _look(row, processing)
    prompt, chosen, rejected = looked.sequences
    shared = template.common_prefix(looked.sequences)
    ids = dict(zip(_IDS, (prompt[:shared], chosen[shared:], rejected[shared:]), strict=True))
    _length({**ids, "place": row["place"]}, processing, None)
    return ids, [note for note in looked.notes if note]


class _Look(NamedTuple):
    """A pair whose completions bring no end of their own.

    Attributes:
        completions: as TRL gets them.
        sequences: the ids of the prompt alone, and with each completion.
        notes: what a user should know, each in its place, empty where there is nothing to say.
    """

    completions: dict[str, Any]
    sequences: list[list[int]]
    notes: list[str]


def _checked(row: dict[str, Any], processing: PairTokenizer) -> dict[str, Any]:
    looked = _look(row, processing)
    return {**looked.completions, "notes": looked.notes}


def _look(row: dict[str, Any], processing: PairTokenizer) -> _Look:
    place, chat, inner = row["place"], isinstance(row["prompt"], list), processing.inner
    for field in ("prompt", *_COMPLETIONS):
        if chat and not row[field]:
            raise ValueError(f"{place}: field '{field}' has no messages")
    ended = {field: processing.without_end(row[field]) for field in _COMPLETIONS}
    brought = any(ended[field] != row[field] for field in _COMPLETIONS)
    row = row | ended
    if chat:
        texts = template.render_pair(inner, processing.turn, row, place)
        dropped = template.find_loss(row, texts, place)
        sequences = [processing.encode_rendered(text) for text in texts]
        unused = template.unused_options(inner, row)
        said = str(row["chosen"][-1].get("content") or "").strip()
        endless = said != "" and texts.chosen.endswith(said)
    else:
        texts = template.Conversation(
            row["prompt"],
            *(
                row["prompt"] + completion.removesuffix(inner.eos_token) + inner.eos_token
                for completion in ended.values()
            ),
        )
        dropped, unused, endless = False, "", False
        sequences = [processing.encode(text) for text in texts]
    prompt, chosen, _ = sequences
    if not prompt:
        raise ValueError(f"{place}: {_NO_PROMPT}")
    shared = template.common_prefix(sequences)
    if _TRL_SLICES and shared < len(prompt):
        raise ValueError(
            f"{place}: the tokens of the prompt are not those at the start of prompt and completion, "
            f"which TRL {trl.__version__} mangles (it cuts by the prompt's length): update to TRL "
            "1.15 or later, which needs Python 3.11"
        )
    left = repr(texts.left_out)[:100]
    start = inner.decode(chosen[shared : shared + 3], skip_special_tokens=True)
    notes = {
        _LEFT_OUT.format(left=left): texts.left_out,
        _MERGED.format(start=start): shared < len(prompt) and not texts.left_out,
        _THINKING: dropped,
        _ENDED: brought,
        _NO_END: endless,
        _ADDED.format(eos=inner.eos_token): processing.added > 0 and not chat,
        _UNUSED.format(options=unused): unused,
        _UNKNOWN.format(unk=inner.unk_token): any(processing.unknown in ids for ids in sequences),
    }
    return _Look(ended, sequences, [note if said else "" for note, said in notes.items()])


def _length(row: dict[str, Any], processing: PairTokenizer, vocab_size: int | None) -> Any:
    """The tokens of a pair's longer sequence, prompt included; all have an embedding."""
    for field in _IDS:
        where, ids = f"{row['place']}: field '{field.removesuffix('_ids')}'", row[field]
        if not ids and field == "prompt_ids":
            raise ValueError(f"{row['place']}: {_NO_PROMPT}")
        if not ids:
            raise ValueError(
                f"{where} has no tokens: it is empty, and nothing ends it (the tokenizer's EOS token "
                f"is {processing.eos_token!r}, and its chat template writes no end of a turn)"
            )
        if vocab_size is not None and max(ids) >= vocab_size:
            token = processing.inner.convert_ids_to_tokens(max(ids))
            raise ValueError(
                f"{where}: the token {token!r} has the id {max(ids)}, but the model's embedding has "
                f"{vocab_size} rows and the tokenizer {len(processing.inner)} tokens: use the model's "
                "own tokenizer, or resize the model's embedding"
            )
    prompt, chosen, rejected = (len(row[field]) for field in _IDS)
    return {"length": prompt + max(chosen, rejected)}


def _warn(checked: Dataset) -> None:
    """Say each note once, with the first pair that it is about and the number of others."""
    for notes in zip(*checked["notes"], strict=True):
        pairs = [i for i, note in enumerate(notes) if note]
        if pairs:
            more = f" and {len(pairs) - 1} more" if len(pairs) > 1 else ""
            warnings.warn(f"{checked[pairs[0]]['place']}{more}: {notes[pairs[0]]}", stacklevel=3)
