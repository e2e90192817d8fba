"""Keywords of a call that nobody would read.

Models of transformers take any keyword, and hand those that they do not know on, to layers and to attention's kernels.
Which of them have a name for it is known of transformers' own classes: what nothing there reads is refused. A model of
somebody else's may look for any name; one is refused that reads like one that would have an effect, here or there.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import TransformersKwargs

from fastdpop import losses
from fastdpop.hf.asked import OPTIONS, SET_HERE
from fastdpop.losses.base import WEIGHT
from fastdpop.names import near
from fastdpop.stray import LIKE, LOSS_OPTIONS, loss_option

CALL = (
    *("preference", "ref_logps", "return_logps", "preference_options", "router_loss_weight"),
    "prefix_tree",
)
"""What an attached model's forward takes besides its own arguments."""
_TO_ATTACH = (
    *("engine", "workspace_bytes", "cp_group", "tp_group", "grad_reduction"),
    "check",
)
_PAIR_VALUES = frozenset({WEIGHT}).union(
    *(losses.get(name).traits.reads or () for name in losses.available())
)
_USUAL = (
    *("attention_mask", "use_cache", "past_key_values", "cache_position", "inputs_embeds"),
    *("token_type_ids", "special_tokens_mask", "offset_mapping", "length"),
)
"""What most models take, and what tokenizers give, whether or not this one has a use for it."""
_ANYWHERE = frozenset(
    {
        *TransformersKwargs.__annotations__,
        *("labels", "shift_labels", "return_dict", "return_loss"),
        *_USUAL,
    }
)
_SCORED = "labels are -100 where a token is not scored"
_ELSEWHERE = {
    **dict.fromkeys(("mask", "completion_mask", "loss_mask", "label_mask"), _SCORED),
    "ignore_index": _SCORED,
    "average_log_prob": "ipo, simpo, orpo and sigmoid_norm take means over a completion's tokens",
}
"""Names that are in use elsewhere, and what takes their place."""
_ONLY_HERE = ("share_prefixes", "engine", "workspace_bytes", "grad_reduction")
"""Names that ask for something of fastdpop's, whatever else a call asks for."""
_VERY_LIKE = 0.89
"""How alike a name must be to one of `CALL` where no loss is asked for; from 0 to 1."""
_inside: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
"""Arguments of a model's own modules."""


@torch.compiler.disable
def check_keywords(
    model: Any,
    signature: inspect.Signature,
    given: Mapping[str, Any],
    loss: object,
    keyword: str = "preference",
) -> None:
    """
    Args:
        signature: of the model's own forward; given: what the call gives to it.
        loss: as the call gives it, under `keyword`: "preference" of an attached model, "loss" where options are given
            by themselves.

    Raises:
        TypeError: something given has no effect; the message says what to write instead.
    """
    own, unknown = _unknown(model, signature, given)
    for name, value in unknown.items():
        text = f"{type(model).__name__} was given {name!r}, which nothing reads"
        instead = _instead(model, name, value, loss, keyword, own)
        if instead is not None:
            raise TypeError(f"{text}: {instead}")
        if _reads_no_other(model, signature) and name not in _modules_arguments(model):
            raise TypeError(f"{text}: leave it out")


@torch.compiler.disable
def check_plain(model: Any, signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    """The keywords of a call that asks for no preference loss, in which a misspelt one may be meant to.

    Others are columns of somebody's data, or what a model of somebody else's looks for.

    Raises:
        TypeError: as :func:`check_keywords`.
    """
    own, unknown = _unknown(model, signature, given)
    for name, value in unknown.items():
        if name in _modules_arguments(model):
            continue
        is_loss = isinstance(value, str) or callable(value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        meant = near(name, CALL, _VERY_LIKE)
        instead = None
        if meant and (is_loss or meant[0] != "preference"):
            instead = f"did you mean {' or '.join(map(repr, meant))}?"
        elif name == "loss" and is_loss:
            instead = "expected preference="
        elif name in _ONLY_HERE:
            instead = _instead(model, name, value, None, "preference", own)
        elif name in LOSS_OPTIONS and is_number and _reads_no_other(model, signature):
            instead = loss_option(name, value, None, "preference")
        if instead is not None:
            text = f"{type(model).__name__} was given {name!r}, which nothing reads"
            raise TypeError(f"{text} without preference=: {instead}")


def _unknown(
    model: Any, signature: inspect.Signature, given: Mapping[str, Any]
) -> tuple[frozenset[str], dict[str, Any]]:
    """The names that a model's own forward has, and what is given under others."""
    if all(name in signature.parameters or name in _ANYWHERE for name in given):
        return frozenset(), {}
    own = _ANYWHERE.union(
        signature.parameters, _arguments(model), _arguments(getattr(model, "base_model", model))
    )
    return own, {n: value for n, value in given.items() if n not in own and value is not None}


def _reads_no_other(model: Any, signature: inspect.Signature) -> bool:
    """Whether all names that a model reads are among the arguments of its modules."""
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return True
    return type(model).__module__.startswith("transformers.")


def _instead(
    model: Any, name: str, value: object, loss: object, keyword: str, own: frozenset[str]
) -> str | None:
    if name == "loss":
        return "expected preference="
    if name in OPTIONS:
        return f"expected preference_options={{{name!r}: ...}}"
    if name in _TO_ATTACH:
        return f"expected fastdpop.attach(model, {name}=...), before"
    if name in SET_HERE:
        return "fastdpop finds it in the model"
    if name in LOSS_OPTIONS:
        return loss_option(name, value, loss, keyword)
    if name in _modules_arguments(model):
        return None
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    if name in _PAIR_VALUES:
        values = f"{{{name!r}: ...}}"
        if keyword == "loss":
            return f"expected pair_values={values}"
        return f"expected preference_options={{'pair_values': {values}}}"
    named = {*CALL, *own, *OPTIONS}
    if keyword == "loss":
        named = (named - {"preference", "preference_options", "return_logps"}) | {"loss"}
    found = near(name, sorted(named), LIKE)
    if found:
        return f"did you mean {' or '.join(map(repr, found))}?"
    return loss_option(name, value, loss, keyword)


def _modules_arguments(model: nn.Module) -> frozenset[str]:
    """Of all modules of a model, to which it may hand a keyword on."""
    if model not in _inside:
        kinds = {type(module): module for module in model.modules()}
        _inside[model] = frozenset().union(*map(_arguments, kinds.values()))
    return _inside[model]


def _arguments(module: Any) -> frozenset[str]:
    return frozenset(inspect.signature(type(module).forward).parameters)
