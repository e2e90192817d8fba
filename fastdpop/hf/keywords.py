"""Keywords of a call that nobody would read.

Models of transformers take any keyword, and hand those that they do not know on, to layers and to attention's kernels,
some of which look for a name in them. So not every unknown keyword is a mistake: one is refused that reads like one
that would have an effect, here or there.
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
_ANYWHERE = frozenset(
    {*TransformersKwargs.__annotations__, "labels", "shift_labels", "return_dict"}
)
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
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if all(name in signature.parameters or name in _ANYWHERE for name in given):
        return
    own = _ANYWHERE.union(
        signature.parameters, _arguments(model), _arguments(getattr(model, "base_model", model))
    )
    for name in given:
        if name in own:
            continue
        text = f"{type(model).__name__} was given {name!r}, which nothing reads"
        instead = _instead(model, name, given[name], loss, keyword, own)
        if instead is not None:
            raise TypeError(f"{text}: {instead}")
        if not any_keyword:
            raise TypeError(text)


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
