"""What a new adapter is of: the names that its options give must be some of the model's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fastdpop.names import hint

_ALL = "all-linear"
_NAMED = ("lora_target_modules", "lora_modules_to_save", "lora_target_parameters")
"""TRL's options whose names PEFT passes over where a model has none of them, as long as it has one of the others."""


def check(model_args: Any, model: nn.Module) -> None:
    """Refuse a name that is none of the model's; settle whether a single one is a name or a regular expression.

    Args:
        model_args: TRL's ``ModelConfig``, which makes a text of a list of one; PEFT would take that for a regular
            expression of whole names, which ``q_proj`` is not.

    Raises:
        ValueError: the message names the option and those names that there are.
    """
    for option in _NAMED:
        given = getattr(model_args, option, None)
        if given is None or given in (_ALL, [_ALL]):
            continue
        parameters = option.endswith("parameters")
        known = [
            name for name, _ in (model.named_parameters() if parameters else model.named_modules())
        ]
        if isinstance(given, str) and not _stands_for(given, known):
            if any(re.fullmatch(given, name) for name in known):
                continue
            given = [given]
        names = [given] if isinstance(given, str) else list(given)
        for name in names:
            if not _stands_for(name, known):
                last = sorted(set(_last(known if parameters else _linear(model))))
                flag = "--lora-targets" if option == _NAMED[0] else f"--{option}"
                raise ValueError(
                    f"{flag} names {name!r}, which the model has not{hint(name, last)}, expected some of "
                    + ", ".join(last)
                    + (f", or {_ALL} alone" if option == _NAMED[0] else "")
                )
        setattr(model_args, option, names)


def _stands_for(name: str, known: Iterable[str]) -> bool:
    """As PEFT has it: for a whole name, or for the last parts of some."""
    return bool(name) and any(one == name or one.endswith(f".{name}") for one in known)


def _linear(model: nn.Module) -> Iterator[str]:
    """What adapters can be of; transformers' Conv1D is a linear layer, too."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D":
            yield name


def _last(names: Iterable[str]) -> Iterator[str]:
    return (name.rpartition(".")[2] for name in names)
