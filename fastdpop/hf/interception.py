"""Lets an output head return lazy logits, for the length of one call and for that call alone.

A head that is watched has two hooks. They look at a context variable, which is set only inside
:func:`lazy_logits_from`: any other call of the same head, in another thread for one, runs as ever.
Between the hooks the head runs its own code, in which linear maps onto the vocabulary are noted
down instead of computed.

``torch.compile`` cannot read context variables, so that looking would split every graph at the
head. It can read a global: while no call at all wants lazy logits, compiled code does not look.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdpop.hf import hooks
from fastdpop.hf.lazy_logits import LazyLogits, Product
from fastdpop.hf.zero import Partitioned, refuse_plain_call, torch_linear


class _LinearMaps(TorchFunctionMode):
    """Lets every linear map onto `vocabulary` tokens return lazy logits."""

    def __init__(self, vocabulary: int, owner: str) -> None:
        super().__init__()
        self.vocabulary, self.owner = vocabulary, owner

    @torch.compiler.disable
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.linear:
            return func(*args, **kwargs)
        return self._linear(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(weight) != self.vocabulary:
            return nn.functional.linear(input, weight, bias)
        if type(weight) not in (Tensor, nn.Parameter, Partitioned):
            raise RuntimeError(
                f"the weight of {self.owner}'s head is a {type(weight).__name__} during forward, "
                "expected a plain tensor: keep the head unsharded and unquantised"
            )
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return LazyLogits(Product(input, weight, bias, self.owner), dtype)


@dataclass(eq=False)
class _Interception:
    """One call of `model` that wants lazy logits of `head`."""

    model: Any
    head: Any
    columns: int
    # Contexts are copied, into tasks and into other threads, and outlive the call.
    thread: int = field(default_factory=threading.get_ident)
    over: bool = False
    noting: contextlib.ExitStack | None = None  # while the head runs

    @property
    def owner(self) -> str:
        """Class name of the model, for messages."""
        return type(self.model).__name__

    @property
    def under_way(self) -> bool:
        """Whether it is, in this thread."""
        return not self.over and self.thread == threading.get_ident()

    def begin(self) -> None:
        self.end()  # of a run that failed, if the model goes on after that
        self.noting = contextlib.ExitStack()
        self.noting.enter_context(torch_linear())
        self.noting.enter_context(_LinearMaps(len(self.head.weight), self.owner))

    def end(self) -> None:
        """Also after an error inside the head, whose second hook then does not run."""
        if self.noting is not None:
            self.noting.close()
            self.noting = None

    def checked(self, logits: Any) -> LazyLogits:
        """What the head returned, as wide as the caller asked for."""
        if not isinstance(logits, LazyLogits):
            raise RuntimeError(
                f"the head of {self.owner} is a {type(self.head).__name__} that computes its logits by itself, "
                "expected torch.nn.functional.linear: keep the head unquantised, or call "
                "fastdpop.fused_preference_loss on the hidden states"
            )
        missing = self.head.weight.shape[1] + self.columns - logits.product.weight.shape[1]
        if missing > 0:
            logits.product = logits.product.widened(missing)
        return logits


_UNDER_WAY: ContextVar[tuple[_Interception, ...]] = ContextVar("fastdpop_lazy_logits", default=())
"""The calls that want lazy logits in this context, the innermost last."""

_lock = threading.Lock()
_count = 0
_anywhere = False
"""Whether such a call is under way in any thread: for compiled code only, see above."""


@contextlib.contextmanager
def lazy_logits_from(head: Any, model: Any, columns: int = 0) -> Iterator[None]:
    """Let a head return lazy logits to whoever calls it inside, in this thread.

    Args:
        head: a module with a ``(V, H)`` ``weight``; it may be more than a linear map. It is watched
            from then on (:func:`watch`).
        model: whose head it is.
        columns: widen every product to at least so many columns more than the weight has.
    """
    watch(head)
    call = _new_call(model, head, columns)
    token = _UNDER_WAY.set((*_UNDER_WAY.get(), call))
    _note(+1)
    try:
        yield
    finally:
        _note(-1)
        call.over = True
        call.end()
        _UNDER_WAY.reset(token)


@torch.compiler.disable
def _new_call(model: Any, head: Any, columns: int) -> _Interception:
    return _Interception(model, head, columns)


@contextlib.contextmanager
def real_logits_for(model: Any) -> Iterator[None]:
    """Let a plain call of a model that comes in the middle of another call of it (from a hook, for
    one) have real logits.
    """
    calls = _UNDER_WAY.get()
    others = tuple(call for call in calls if call.model is not model)
    if len(others) == len(calls):
        yield
        return
    refuse_plain_call(model)
    token = _UNDER_WAY.set(others)
    try:
        yield
    finally:
        _UNDER_WAY.reset(token)


def _note(change: int) -> None:
    global _count, _anywhere
    with _lock:
        _count += change
        _anywhere = _count > 0


@torch.compiler.disable
def watch(head: nn.Module) -> None:
    """Give a head the hooks that :func:`lazy_logits_from` needs, once; by themselves they do nothing."""
    hooks.add(head, before=_begin, after=_end)


def unwatch(head: nn.Module) -> None:
    """Undo :func:`watch`."""
    hooks.remove(head, (_begin, _end))


def _begin(head: nn.Module, args: Any) -> None:
    if _anywhere or not torch.compiler.is_compiling():
        _begin_noting(head)


def _end(head: nn.Module, args: Any, output: Any) -> Any:
    if _anywhere or not torch.compiler.is_compiling():
        return _noted(head, output)
    return None


def _call_of(head: nn.Module) -> _Interception | None:
    calls = reversed(_UNDER_WAY.get())
    return next((call for call in calls if call.head is head and call.under_way), None)


@torch.compiler.disable
def _begin_noting(head: nn.Module) -> None:
    call = _call_of(head)
    if call is not None:
        call.begin()


@torch.compiler.disable
def _noted(head: nn.Module, output: Any) -> Any:
    call = _call_of(head)
    if call is None:
        return None
    call.end()
    return call.checked(output)
