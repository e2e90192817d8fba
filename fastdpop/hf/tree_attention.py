"""Attention over a prefix tree for models that compute it through transformers' interfaces.

Every layer's mask is made by the mask interface and read by the attention interface, by the name in the model's
config. :func:`install` gives that name a second meaning: where the mask is a tree, attention is :func:`tree_attention`,
else all is as before. So nothing has to be known at the time of the attention but its own arguments, and layers that
are computed again in the backward pass (gradient checkpointing) find the structure where they found it before.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdpop.prefix.attention import tree_attention
from fastdpop.prefix.tree import sees

_PREFIX = "fastdpop_"
_WINDOW = "sliding_window_overlay.<locals>.inner_mask"
_WITHOUT_EFFECT = {"position_ids", "cache_position", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"}
"""Tensors that attention is given and that say no more than the tree, or nothing to it."""


class Unshareable(Exception):
    """Sequences cannot share prefixes in this call or model. The message completes "... because"."""


@dataclass
class Layout:
    """A tree on its way through a model.

    Attributes:
        mask: ``(1, 1, 2, N)`` int64 on the CPU: `end` and position of every token.
        seen: the modules that have computed attention over it.
    """

    mask: Tensor
    seen: set[nn.Module] = field(default_factory=set)


_LAYOUT: ContextVar[Layout | None] = ContextVar("fastdpop_prefix_tree", default=None)


@contextlib.contextmanager
def masks_of(layout: Layout | None) -> Iterator[None]:
    """Have the masks that are made inside, in this thread, say the tree's structure."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


# ---- the names in a model's configs -------------------------------------------------------------


class _Name(str):
    """An implementation's name that is pickled and copied as the original's, which every process knows."""

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (original(self),)


def original(name: str) -> str:
    """The implementation under an installed one."""
    return name.removeprefix(_PREFIX)


def configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The configs that a model's modules read."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in found.values() if isinstance(c, PreTrainedConfig)]


def installed(model: nn.Module) -> bool:
    """Whether all of a model's attention can take a tree."""
    return all((c._attn_implementation or _PREFIX).startswith(_PREFIX) for c in configs(model))


def install(model: nn.Module) -> None:
    """Let a model's attention take a tree for its mask."""
    for config in configs(model):
        name = config._attn_implementation
        if name is None or name.startswith(_PREFIX):
            continue
        if name != "eager" and not _is_transformers_own(name):
            raise Unshareable(
                f"its attention implementation {name!r} is not one of transformers' own"
            )
        AttentionInterface.register(_PREFIX + name, functools.partial(_attention, name))
        AttentionMaskInterface.register(_PREFIX + name, functools.partial(_mask, name))
        config._attn_implementation_internal = _Name(_PREFIX + name)


def _is_transformers_own(name: str) -> bool:
    """What a function of somebody else's does with scores and masks is not known."""
    functions = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    for function in functions:
        while isinstance(function, functools.partial):
            function = function.func
        if not str(getattr(function, "__module__", "")).startswith("transformers."):
            return False
    return True


def uninstall(model: nn.Module) -> None:
    """Undo :func:`install`."""
    for config in configs(model):
        name = config._attn_implementation
        if name is not None and name.startswith(_PREFIX):
            config._attn_implementation_internal = original(name)


# ---- masks --------------------------------------------------------------------------------------


@torch.compiler.disable
def _mask(name: str, *args: Any, **kwargs: Any) -> Any:
    """A mask as transformers asks for it: the tree's, while one is on its way."""
    layout = _LAYOUT.get()
    if layout is None:
        of_original: Any = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(name)
        return None if of_original is None else of_original(*args, **kwargs)
    lengths = (_queries(kwargs), kwargs.get("kv_length"))
    tokens = layout.mask.shape[-1]
    if args or lengths != (tokens, tokens):
        raise Unshareable(
            f"the model makes a mask of {lengths[0]} x {lengths[1]} for {tokens} tokens"
        )
    function, window = kwargs["mask_function"], kwargs.get("local_size")
    parts = _parts(function)
    if parts == [causal_mask_function]:
        return layout.mask
    windows = [part for part in parts if getattr(part, "__qualname__", "") == _WINDOW]
    if (
        window is not None
        and len(parts) == 2
        and len(windows) == 1
        and causal_mask_function in parts
    ):
        if window > int(layout.mask[0, 0, 1].max()):
            return layout.mask
        row = torch.full_like(layout.mask[:, :, :1], window)
        return torch.cat([layout.mask, row], dim=2)
    return _dense(name, layout.mask, function, kwargs)


def _queries(kwargs: dict[str, Any]) -> int | None:
    """How many tokens a mask is asked for; transformers before 5.4 gives their positions instead."""
    positions = kwargs.get("cache_position")
    return kwargs.get("q_length") if positions is None else len(positions)


def _parts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The mask functions that all have to hold, one after the other."""
    if getattr(function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return [function]
    (cell,) = function.__closure__ or ()
    return [part for inner in cell.cell_contents for part in _parts(inner)]


def _dense(name: str, mask: Tensor, function: Callable[..., Any], kwargs: dict[str, Any]) -> Tensor:
    """Any causal mask that is a function of the positions in a sequence, for implementations that read dense ones."""
    positions = kwargs.get("cache_position")
    device = kwargs.get("device") or ("cpu" if positions is None else positions.device)
    end, position = mask[0, 0].to(device)
    place = torch.arange(len(end), device=device)
    below = sees(end, place[:, None], place)
    seen = torch.as_tensor(function(0, 0, position[:, None], position), device=device)
    if bool((seen & (position > position[:, None])).any()):
        raise Unshareable(
            f"its layers attend to more than what stands before a token ({function.__qualname__})"
        )
    if name not in ("sdpa", "eager"):
        raise Unshareable(
            f"attention implementation {name!r} takes no dense mask ({function.__qualname__})"
        )
    allowed = (seen & below)[None, None]
    if name == "sdpa":
        return allowed
    dtype = kwargs.get("dtype") or torch.float32
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


# ---- attention ----------------------------------------------------------------------------------


def _is_tree(mask: Any, tokens: int) -> bool:
    whole = isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.dim() == 4
    return whole and mask.shape[2] in (2, 3) and mask.shape == (1, 1, mask.shape[2], tokens)


def _attention(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An implementation of transformers, and attention over a tree where the mask is one."""
    if not _is_tree(attention_mask, query.shape[2]):
        function = _original_attention(name, module)
        _note(module)
        own: Any = _Named(module, name) if "flash" in name else module
        return function(own, query, key, value, attention_mask, *args, **kwargs)
    if args:
        raise Unshareable(f"{type(module).__name__} gives attention arguments without names")
    return _over_tree(module, query, key, value, attention_mask, **kwargs), None


class _Named:
    """A module whose config names the original implementation: flash attention looks up its kernels by that name."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self.config = module, copy.copy(cast(PreTrainedConfig, module.config))
        self.config._attn_implementation_internal = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _original_attention(name: str, module: nn.Module) -> Callable[..., Any]:
    own: Any = _in_file_of(module, "eager_attention_forward", None)
    interface = _in_file_of(module, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    found: Callable[..., Any] = interface.get(name, own)
    return found


def _in_file_of(module: nn.Module, name: str, default: Any) -> Any:
    """What stands under a name beside a module's class, or beside one that it derives from."""
    files = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    return next((vars(file)[name] for file in files if file and name in vars(file)), default)


def _over_tree(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> Tensor:
    """``(1, N, heads, D)``. `sliding_window` is in the mask already."""
    kind = type(module).__name__
    if dropout:
        raise Unshareable(
            f"{kind} drops out attention weights ({dropout}), which 0 in the model's config turns off"
        )
    if is_causal is False or key.shape[2] != query.shape[2]:
        raise Unshareable(f"{kind} attends to more than what stands before a token")
    for name, argument in others.items():
        if isinstance(argument, Tensor) and name not in _WITHOUT_EFFECT:
            raise Unshareable(f"{kind} gives attention {name}, which a tree cannot carry")
    _note(module)
    output = tree_attention(
        query,
        key,
        value,
        mask,
        scale=1.0 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling),
        softcap=softcap or None,
        sinks=s_aux,
    )
    return output.transpose(1, 2).contiguous()


def _note(module: nn.Module) -> None:
    if not torch.compiler.is_compiling():
        layout = _LAYOUT.get()
        if layout is not None:
            layout.seen.add(module)
