"""Keywords that a call does not know: what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from fastdpop import losses
from fastdpop.names import hint, near

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

LIKE = 0.8
"""How like a known keyword is to be what somebody may have meant by it."""
LOSS_OPTIONS = sorted({option for each in losses.available() for option in losses.options_of(each)})
_ELSEWHERE = {
    "model": "hidden states and the lm_head's weight; fastdpop.preference_loss(model, **batch, loss=...) takes a model",
    "input_ids": "hidden states; fastdpop.preference_loss(model, **batch, loss=...) takes token ids",
    "attention_mask": "no mask: labels are -100 where a token is not scored",
    **dict.fromkeys(
        ("loss", "preference", "loss_type"), "none: fused_preference_loss takes any loss, as loss="
    ),
    "return_logps": "none: fused_logps gives log-probs",
    **dict.fromkeys(
        ("mask", "completion_mask", "loss_mask", "ignore_index"),
        "none: labels are -100 where a token is not scored",
    ),
    "average_log_prob": "none: ipo, simpo, orpo and sigmoid_norm take means over a completion's tokens",
    "logits": "hidden states after the final norm and the lm_head's weight, of which logits need not be made",
}
"""Keywords of functions that take something else."""


def known_keywords(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that says, of a keyword that it does not know, what to write instead."""
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        for name in kwargs:
            if name not in known:
                raise TypeError(_unknown(function, name, kwargs))
        return function(*args, **kwargs)

    return call


def _unknown(function: Any, name: str, given: dict[str, Any]) -> str:
    parameters = inspect.signature(function).parameters
    text = f"{function.__name__} has no argument {name!r}"
    if name in _ELSEWHERE:
        return f"{text}, expected {_ELSEWHERE[name]}"
    meant = hint(name, parameters)
    if "ref_logps" in parameters and (name in LOSS_OPTIONS or not meant):
        instead = loss_option(name, given[name], given.get("loss", "dpop"), "loss")
        if instead is not None:
            return f"{text}: {instead}"
    return text + meant


def loss_option(name: str, value: object, loss: object, keyword: str) -> str | None:
    """How to write a loss's option that was given beside the loss; None if `name` is no loss's option.

    Args:
        loss: as it was given, under `keyword`.
    """
    known = isinstance(loss, str) and loss in losses.available()
    own = losses.options_of(str(loss)) if known else ()
    meant = next(iter(near(name, own, LIKE) or near(name, LOSS_OPTIONS, LIKE)), None)
    if meant is None:
        return None
    if known and meant not in own:
        return f"the loss {loss!r} has no option {meant!r}; it has {', '.join(own) or 'no options'}"
    shown = repr(loss) if known else "name"
    return f"it is an option of the loss, expected {keyword}=losses.get({shown}, {meant}={value!r:.40})"
