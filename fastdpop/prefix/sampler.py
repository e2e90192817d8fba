"""An order of preference pairs in which those of one prompt stand side by side."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class PromptSampler(Sampler[int]):
    """A random order of pairs in which those of one prompt follow each other, for what they share to be shared.

    Every epoch has its own order of the prompts, and of the pairs of each; all pairs come once. The order
    follows from `seed` and the epoch alone, so every process makes the same one. Give each of them whole
    batches of it, not every other pair: accelerate does (``accelerator.prepare(loader)``), and without it
    ``list(BatchSampler(sampler, batch_pairs, drop_last=True))[rank::processes]``.

    Args:
        prompts: of each pair, something hashable (a text, a number) or a sequence of token ids; equal
            ones belong together.
        seed: 0 or more.

    Raises:
        ValueError: a prompt or the seed is something else.
    """

    def __init__(self, prompts: Iterable[Any], *, seed: int = 0) -> None:
        _check("seed", seed)
        numbers: dict[Hashable, int] = {}
        keys = (_key(i, prompt) for i, prompt in enumerate(prompts))
        self._groups = np.array(
            [numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64
        )
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0 or more) whose order comes next; accelerate and transformers call it."""
        _check("epoch", epoch)
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        rank = rng.permutation(self._groups.max(initial=-1) + 1)[self._groups]
        yield from np.lexsort((rng.random(len(self)), rank)).tolist()


def _check(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}, expected a whole number, 0 or more")


def _key(i: int, prompt: Any) -> Hashable:
    if hasattr(prompt, "tolist"):  # a tensor's hash is its identity
        prompt = prompt.tolist()
    key: Hashable = tuple(prompt) if isinstance(prompt, list) else prompt
    try:
        hash(key)
    except TypeError:
        raise ValueError(
            f"prompts[{i}] is {prompt!r:.100}, expected something hashable or a sequence of token ids"
        ) from None
    return key
