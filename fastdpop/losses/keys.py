"""Losses by a string: operators take no Python objects.

Value-like losses stay registered, since a compiled graph holds only the string; a user's function, or
object, is kept no longer than the user keeps it.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from fastdpop.compiling import constant

from .base import FunctionLoss, PreferenceLoss, WeightedSum

_VALUES: dict[str, PreferenceLoss] = {}
_OBJECTS: weakref.WeakValueDictionary[str, PreferenceLoss] = weakref.WeakValueDictionary()
_REGISTERING = threading.Lock()


def key_of(loss: PreferenceLoss) -> str:
    """A string from which :func:`by_key` finds the loss again."""
    if torch.compiler.is_compiling() and not _is_opaque(loss):
        return _key_of_recipe(_recipe(loss))
    return _key_of_object(loss)


def _is_opaque(value: object) -> bool:
    """Whether a loss is, or holds, more than its class and plain options."""
    if isinstance(value, WeightedSum):
        return any(_is_opaque(loss) for _, loss in value.terms)
    inner = getattr(value, "loss", None)
    if isinstance(inner, PreferenceLoss) and _is_opaque(inner):
        return True
    return isinstance(value, FunctionLoss) or not is_dataclass(value)


def _recipe(value: Any) -> Any:
    """A loss as its class and options. The compiler takes an object that is made inside the
    function that it compiles for one with the class's defaults, but knows plain values.
    """
    if isinstance(value, tuple):
        return tuple([_recipe(part) for part in value])
    if isinstance(value, PreferenceLoss):
        options = [(f.name, _recipe(getattr(value, f.name))) for f in fields(value)]  # type: ignore[arg-type]
        return type(value), tuple(options)
    return value


def _of_recipe(recipe: Any) -> Any:
    if isinstance(recipe, tuple) and recipe and isinstance(recipe[0], type):
        kind, options = recipe
        return kind(**{name: _of_recipe(value) for name, value in options})
    if isinstance(recipe, tuple):
        return tuple(_of_recipe(part) for part in recipe)
    return recipe


@constant
def _key_of_recipe(recipe: Any) -> str:
    return _key_of_object(_of_recipe(recipe))


@constant
def _key_of_object(loss: PreferenceLoss) -> str:
    table = _OBJECTS if _is_opaque(loss) else _VALUES
    key = own = repr(loss)
    with _REGISTERING:
        # What reads the same need not be the same: other classes of that name, other objects.
        for number in itertools.count(2):
            held = _VALUES.get(key) or _OBJECTS.get(key)
            if held is None or (type(held) is type(loss) and held == loss):
                break
            key = f"{own} #{number}"
        table[key] = loss
    return key


def by_key(key: str) -> PreferenceLoss:
    """The loss registered under a key by :func:`key_of`."""
    found = _VALUES.get(key) or _OBJECTS.get(key)
    if found is None:
        raise KeyError(
            f"no loss is registered under {key!r}: the object must outlive the graph that uses it"
        )
    return found
