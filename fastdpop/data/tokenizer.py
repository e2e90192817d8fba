"""The tokenizer as TRL gets it: without what would be wrong around a completion."""

from __future__ import annotations

import datetime
from typing import Any

import transformers
import trl

import fastdpop
from fastdpop.data.template import Turn, turn_of


class PairTokenizer:
    """What TRL tokenises pairs with, in place of the Hugging Face tokenizer ``inner``.

    A text keeps one BOS and ends as it is written, without an EOS that the tokenizer adds to all
    texts. A finished conversation ends without a generation prompt. A tokenisation is cached under
    a hash of this object: the versions are part of it, and the day where a template writes it.

    Attributes:
        inner: the Hugging Face tokenizer.
        eos_token: its EOS token, which TRL appends to texts; may be None.
        turn: how its chat template ends an answer.
        added: how many special tokens it puts after every text.
        unknown: the id of the token for all that it does not know, if that has no other meaning.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.inner = tokenizer
        self.eos_token = tokenizer.eos_token
        self.turn = turn_of(tokenizer) if tokenizer.chat_template else Turn("", "")
        self.added = _added(tokenizer)
        others = (tokenizer.eos_token_id, tokenizer.bos_token_id)
        self.unknown = None if tokenizer.unk_token_id in others else tokenizer.unk_token_id
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

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of what a chat template has written, its special tokens included."""
        return self.inner(text, add_special_tokens=False)["input_ids"]

    def apply_chat_template(
        self, messages: Any, *, add_generation_prompt: bool = False, **options: Any
    ) -> Any:
        """As the tokenizer's own, for a prompt (with a generation prompt) or all of a pair."""
        if add_generation_prompt:
            return self.inner.apply_chat_template(messages, add_generation_prompt=True, **options)
        if not self.turn.header:
            return self.inner.apply_chat_template(messages, **options)
        options |= {"tokenize": False, "return_dict": False}
        text = self.inner.apply_chat_template(messages, **options).removesuffix(self.turn.header)
        return {"input_ids": self.encode_rendered(text)}

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids))

    def without_end(self, completion: Any) -> Any:
        """A completion without the ends of its turn that another would follow.

        One EOS right at the end of a text stays: TRL leaves it alone, too.
        """
        eos, end = self.eos_token, self.turn.end
        if isinstance(completion, str):
            text = _strip(completion, (eos,))
            return completion if text + eos == completion else text
        content = completion[-1].get("content")
        if not end or not isinstance(content, str):
            return completion  # a template that ends no turn leaves that to the text
        text = _strip(content, (end, eos) if eos else (end,))
        if text == content:
            return completion
        return [*completion[:-1], completion[-1] | {"content": text}]


def _strip(text: str, ends: tuple[str, ...]) -> str:
    while (bare := text.rstrip()).endswith(ends):
        text = next(bare.removesuffix(end) for end in ends if bare.endswith(end))
    return text


def _added(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts after every text."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    ids = tokenizer("x")["input_ids"]
    starts = [i for i in range(len(ids)) if bare and ids[i : i + len(bare)] == bare]
    return len(ids) - starts[-1] - len(bare) if starts else 0
