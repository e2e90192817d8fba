"""What is known of token ids: their text, and which of them begin, end and pad sequences."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Vocabulary:
    """
    Attributes:
        tokenizer: None where none was given or found: ids are shown then.
        pad, bos: ids, None where there is none.
        ends: ids that end a text or a turn.
        size: rows of the model's embedding; None if it is not known.
        positions: tokens of the longest sequence that the model is made for; None if there is no such limit.
    """

    tokenizer: Any = None
    pad: int | None = None
    bos: int | None = None
    ends: frozenset[int] = frozenset()
    size: int | None = None
    positions: int | None = None

    @staticmethod
    def of(model: Any, tokenizer: Any) -> Vocabulary:
        """From the tokenizer, else from the model's configuration.

        Raises:
            TypeError: the tokenizer is none.
        """
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise TypeError(f"tokenizer is {tokenizer!r:.60}, expected a tokenizer of transformers")
        config = getattr(model, "config", None)
        config = getattr(config, "text_config", None) or config
        generation = getattr(model, "generation_config", None)
        if tokenizer is None:
            tokenizer = _local_tokenizer(config)
        ends: set[int] = set()
        for source in (tokenizer, config, generation):
            found = getattr(source, "eos_token_id", None)
            ends |= {found} if isinstance(found, int) else set(found or ())
        return Vocabulary(
            tokenizer,
            _first("pad_token_id", tokenizer, config),
            _first("bos_token_id", tokenizer) if tokenizer else _first("bos_token_id", config),
            frozenset(ends),
            _rows(model),
            _positions(config) if _knows_places(model) else None,
        )

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, or their ids."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def _first(name: str, *sources: Any) -> int | None:
    found = (getattr(source, name, None) for source in sources)
    return next((value for value in found if isinstance(value, int)), None)


def _rows(model: Any) -> int | None:
    """Rows of the embedding, which a model that is sharded may not show."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    weight = getattr(model.get_input_embeddings(), "weight", None)
    shape: Any = getattr(weight, "ds_shape", None) or getattr(weight, "shape", ())  # ZeRO-3
    if len(shape) == 2:
        return int(shape[0])
    return getattr(getattr(model, "config", None), "vocab_size", None)


def _knows_places(model: Any) -> bool:
    """Whether it has embeddings of positions, rotary ones or others, as a model of states has not."""
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, part in parts:
        last = name.rpartition(".")[2]
        if "Rotary" in type(part).__name__ or last == "wpe" or "position" in last:
            return True
    return False


def _positions(config: Any) -> int | None:
    """What a model's configuration says of its context, stretched by what it says of rotary embeddings."""
    limit = getattr(config, "max_position_embeddings", None)
    kind = getattr(config, "position_embedding_type", None)
    if not isinstance(limit, int) or limit <= 0 or kind in ("alibi", "nope"):
        return None
    if getattr(config, "alibi", False) or getattr(config, "use_alibi", False):
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    scaling = scaling if isinstance(scaling, dict) else {}
    for part in (scaling, *scaling.values()):  # some have one for each type of layer
        if not isinstance(part, dict):
            continue
        if "dynamic" in (part.get("rope_type"), part.get("type")):
            return None
        factor = part.get("factor")
        if isinstance(factor, (int, float)):
            original = part.get("original_max_position_embeddings") or limit
            limit = max(limit, int(factor * original))
    return limit


def _local_tokenizer(config: Any) -> Any:
    """The tokenizer that lies beside the model on this machine, if there is one."""
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    try:
        from transformers import AutoTokenizer

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # of whatever kind: it only makes a report easier to read
        return None
