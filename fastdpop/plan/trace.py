"""What a model's layers keep and multiply, measured on tensors that have shapes and no memory.

A forward and a backward pass run under torch's ``FakeTensorMode``: every operator computes the
shapes and types of its results and nothing else, so that a model of any size takes a fraction of a
second a layer, and the model's own code decides what autograd saves. Storages are counted as they
come and go.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Traced:
    """One forward and backward pass of a model without its head.

    Attributes:
        at_head: bytes that live once the forward pass has ended, inside autocast, whose 16-bit
            copies of weights live on till it is left; the last hidden states included.
        saved: the same once autocast is left: what the backward pass starts from.
        peak: the most that lives in the backward pass, without gradients of weights but for those
            that are just computed.
        forward_flop, backward_flop: floating-point operations of matrix products and of causal
            attention; the backward pass includes what checkpointing computes again.
    """

    at_head: float
    saved: float
    peak: float
    forward_flop: float
    backward_flop: float

    def __add__(self, other: Traced) -> Traced:
        return Traced(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))

    def __sub__(self, other: Traced) -> Traced:
        return self + other * -1.0

    def __mul__(self, factor: float) -> Traced:
        return Traced(*(a * factor for a in self.numbers))

    @property
    def numbers(self) -> tuple[float, ...]:
        """All of them, in order."""
        return (self.at_head, self.saved, self.peak, self.forward_flop, self.backward_flop)


def _attention_flop(query: Any, key: Any, value: Any) -> float:
    """Two products over half of the squares, from shapes ``(B, heads, T, width)``."""
    batch, heads, queries, width = query
    return float(batch * heads * queries * key[2] * (width + value[3]))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> float:
    return _attention_flop(query.shape, key.shape, value.shape)


def _attention_backward(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
) -> float:
    """Five products, the first of which computes the scores again."""
    return 2.5 * _attention_flop(query.shape, key.shape, value.shape)


_aten = torch.ops.aten
_ATTENTION: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The operators that attention is on a CPU; they save what FlashAttention saves on a GPU."""


_UNMASKED = "fastdpop_plan_unmasked"


class _Watch(TorchDispatchMode):
    """Bytes that live, the most of them so far, and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flop = 0.0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def ignore(self, tensor: Tensor) -> None:
        """Do not count it: it was there before."""
        self._known[tensor.untyped_storage()] = None

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _ATTENTION:
            self.flop += _ATTENTION[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flop += flop_registry[packet](*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in self._known:
                    self._known[storage] = None
                    size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, size)
        return out


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Operators that do not know a type say so in the log, and in the exception once more; libraries
    warn each other of names that change.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel("CRITICAL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def trace(
    trunk: Any,
    sequences: int,
    length: int,
    *,
    mask: bool,
    autocast: bool,
    checkpointing: bool,
) -> Traced:
    """Run a model without its head forward and backward, on shapes alone.

    Args:
        trunk: a model of transformers on the meta device; it is used up.
        sequences, length: of the batch of embedded tokens.
        mask: the batch is padded, and attention is given a mask ``(B, 1, T, T)``; if not, it is
            plain causal attention.
        autocast: to bfloat16.
        checkpointing: each layer keeps its input, and computes the rest again.

    Raises:
        Exception: whatever the model's code raises on tensors without values.
    """
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        trunk.to_empty(device="cpu").train()
        if not mask:
            _without_masks(trunk.config)
        if checkpointing:
            trunk.gradient_checkpointing_enable({"use_reentrant": False})
        sees = torch.ones(sequences, 1, length, length, dtype=torch.bool) if mask else None
        table = trunk.get_input_embeddings().weight
        watch = _Watch()
        for parameter in trunk.parameters():
            watch.ignore(parameter)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget_gradient)
        with watch:
            # The embedding's gradient is as large as its weight, and stands at the end alone.
            embedded = torch.zeros(sequences, length, table.shape[1], dtype=table.dtype)
            embedded.requires_grad_(table.requires_grad)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                hidden = trunk(inputs_embeds=embedded, attention_mask=sees, use_cache=False)[0]
                at_head, forward_flop = watch.now, watch.flop
            saved = watch.now
            hidden.backward(torch.zeros_like(hidden))
        return Traced(at_head, saved, watch.peak, forward_flop, watch.flop - forward_flop)


def _without_masks(config: Any) -> None:
    """Where attention is torch's own: transformers gives it a mask whenever tensors have no values."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    config = config.get_text_config()
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(_UNMASKED, lambda *_, **__: None)
        config._attn_implementation = _UNMASKED


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None
