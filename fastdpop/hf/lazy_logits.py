"""Logits that are never computed: what a model does to them is noted down instead.

A head returns :class:`LazyLogits` where :mod:`fastdpop.hf.interception` asks it to. The model then scales, caps, casts
and cuts them as it always does; what it returns tells the hidden states, the weight and the transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Index = slice | int


@dataclass(frozen=True, eq=False)
class Product:
    """``z = scale * u``, or ``softcap * tanh(scale * u)``, of ``u = hidden @ weight.T + bias``.

    Attributes:
        hidden: ``(..., H)``, whatever shape the model gave the head.
        weight: ``(V, H)``.
        bias: ``(V,)`` or None.
        owner: class name of the model, for messages.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    owner: str
    scale: float = 1.0
    softcap: float | None = None

    @property
    def logit_scale(self) -> float:
        """The scale as the fused losses take it: ``softcap * tanh(logit_scale * u / softcap)``."""
        return self.scale if self.softcap is None else self.scale * self.softcap

    def times(self, factor: float) -> Product:
        """``factor * z``."""
        if self.softcap is None:
            return replace(self, scale=self.scale * factor)
        return replace(self, softcap=self.softcap * factor)

    def times_by_token(self, factors: Tensor) -> Product | None:
        """``z * factors`` of shape ``(V,)``: rows of the weight are multiplied, in the wider dtype.

        None under a softcap.
        """
        if self.softcap is not None:
            return None
        weight = self.weight * factors[:, None]
        bias = None if self.bias is None else self.bias * factors
        return replace(self, hidden=self.hidden.to(weight.dtype), weight=weight, bias=bias)

    def plus(self, other: Product) -> Product | None:
        """``z`` of the one and of the other, as one product of concatenated hidden states and weights.

        ``h W^T + r (g B^T) = [h, r g] [W, B]^T``, in the dtypes of the first. None under a softcap.
        """
        if self.softcap is not None or other.softcap is not None:
            return None
        ratio = other.scale / self.scale
        hidden = torch.cat([self.hidden, other.hidden.to(self.hidden.dtype) * ratio], dim=-1)
        weight = torch.cat([self.weight, other.weight.to(self.weight.dtype)], dim=1)
        bias = self.bias
        if other.bias is not None:
            scaled = other.bias.to(self.weight.dtype) * ratio
            bias = scaled if bias is None else bias + scaled
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def widened(self, columns: int) -> Product:
        """The same logits from a product that has `columns` more columns, all zero.

        The order in which an engine adds depends on the width, so log-probs are the same bits only at the same width.
        """
        wide = partial(nn.functional.pad, pad=(0, columns))
        return replace(self, hidden=wide(self.hidden), weight=wide(self.weight))

    def cut(self, leading: tuple[Index, ...], vocabulary: slice) -> Product:
        """``z[(*leading, vocabulary)]``: rows of hidden, and rows of the weight."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if any(index != slice(None) for index in leading):
            hidden = hidden[leading]
        if vocabulary.indices(len(weight)) != (0, len(weight), 1):
            weight, bias = weight[vocabulary], None if bias is None else bias[vocabulary]
        return replace(self, hidden=hidden, weight=weight, bias=bias)


class LazyLogits(Tensor):
    """A tensor without storage: the shape and dtype of logits, and the :class:`Product` they stand for.

    Casts, slices, a positive scale, a factor for each token, a sum of two and one tanh give lazy logits again; shape
    and dtype can be read, and ``requires_grad`` is False: the loss is what has a graph. Everything else raises a
    RuntimeError that names the operation and the model.
    """

    product: Product

    @staticmethod
    def __new__(cls, product: Product, dtype: torch.dtype) -> LazyLogits:
        shape = (*product.hidden.shape[:-1], len(product.weight))
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=product.hidden.device)

    def __init__(self, product: Product, dtype: torch.dtype) -> None:
        self.product = product

    def __repr__(self) -> str:  # type: ignore[override]
        shape, dtype = tuple(self.shape), self.dtype
        return f"LazyLogits(shape={shape}, dtype={dtype}, owner={self.product.owner!r})"

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        logits = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyLogits))
        result = _applied(_IN_PLACE.get(name, name), func, logits, args, kwargs)
        if result is None or (name in _IN_PLACE and args[0] is not logits):
            raise _refusal(name, logits)
        if name in _IN_PLACE:
            logits.product = result.product
            return logits
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        raise _refusal(str(func), next(leaf for leaf in leaves if isinstance(leaf, LazyLogits)))


_METADATA = {"shape", "size", "dim", "ndim", "numel", "__len__", "dtype", "device", "layout"}
_METADATA |= {"is_cuda", "is_floating_point", "requires_grad"}
_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"}
_TIMES = {"mul", "multiply", "__mul__", "__rmul__"}
_OVER = {"div", "divide", "true_divide", "__truediv__"}
_PLUS = {"add", "__add__", "__radd__"}
_IN_PLACE = {"mul_": "mul", "multiply_": "mul", "__imul__": "mul", "tanh_": "tanh"}
_IN_PLACE |= {"div_": "div", "divide_": "div", "true_divide_": "div", "__itruediv__": "div"}
_IN_PLACE |= {"add_": "add", "__iadd__": "add"}


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(func.__self__, "__name__", "an attribute") if name == "__get__" else name


def _refusal(operation: str, logits: LazyLogits) -> RuntimeError:
    return RuntimeError(
        f"{logits.product.owner} applies {operation} to its logits, which fastdpop.attach cannot follow: "
        "it knows casts, slices, a positive scale, one factor per token, sums of linear maps and a tanh softcap. "
        "Call fastdpop.fused_preference_loss on the hidden states instead"
    )


def _applied(
    name: str, func: Any, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LazyLogits | None:
    """The logits after one operation, or None when it cannot be followed."""
    first, others, product = args[0] if args else None, args[1:], logits.product
    if name in _CASTS and first is logits:
        # An empty tensor tells the new dtype. The rounding itself is not wanted.
        cast = func(torch.empty(0, dtype=logits.dtype, device=logits.device), *others, **kwargs)
        known = isinstance(cast, Tensor) and cast.is_floating_point()
        return LazyLogits(product, cast.dtype) if known else None
    if kwargs:
        return None
    if name == "tanh" and product.softcap is None:
        return LazyLogits(replace(product, softcap=1.0), logits.dtype)
    if name == "__getitem__":
        index = _whole_index(others[0], logits.dim())
        return None if index is None else LazyLogits(product.cut(*index), logits.dtype)
    if len(others) != 1:
        return None
    other = others[0] if first is logits else first
    if name in _PLUS and isinstance(other, LazyLogits) and other.shape == logits.shape:
        dtype = torch.promote_types(logits.dtype, other.dtype)
        return _lazy(logits.product.plus(other.product), dtype)
    if name in _TIMES and isinstance(other, Tensor) and other.shape == logits.shape[-1:]:
        dtype = torch.promote_types(logits.dtype, other.dtype)
        return _lazy(product.times_by_token(other), dtype)
    factor = _positive(other)
    if factor is not None and name in _TIMES:
        return LazyLogits(product.times(factor), logits.dtype)
    if factor is not None and name in _OVER and first is logits:
        return LazyLogits(product.times(1.0 / factor), logits.dtype)
    return None


def _lazy(product: Product | None, dtype: torch.dtype) -> LazyLogits | None:
    return None if product is None else LazyLogits(product, dtype)


def _positive(value: Any) -> float | None:
    """A positive finite constant. A learned scale is none: its gradient would be lost."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 1 or value.requires_grad:
            return None
        value = value.item()
    if isinstance(value, (int, float)) and math.isfinite(value) and value > 0:
        return float(value)
    return None


def _whole_index(index: Any, dims: int) -> tuple[tuple[Index, ...], slice] | None:
    """An index of slices and integers, split into leading dimensions and vocabulary; None if it holds anything else."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(entry is not ... and type(entry) not in (slice, int) for entry in entries):
        return None
    if not any(entry is ... for entry in entries):
        entries.append(...)
    place = entries.index(...)
    entries[place : place + 1] = [slice(None)] * (dims + 1 - len(entries))
    if len(entries) != dims or not isinstance(entries[-1], slice):
        return None
    return tuple(entries[:-1]), entries[-1]
