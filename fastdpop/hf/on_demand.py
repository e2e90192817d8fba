"""A preference loss from one call, whatever was done to the model before."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fastdpop import losses
from fastdpop.call import Loss, RefLogps
from fastdpop.hf.asked import OPTIONS
from fastdpop.hf.attachment import attach, causal_lm
from fastdpop.hf.forward import attachment_of
from fastdpop.hf.guards import guarded
from fastdpop.hf.keywords import check_keywords
from fastdpop.hf.output import PreferenceModelOutput
from fastdpop.hf.wrappers import innermost
from fastdpop.unrounded import Exact

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_ATTACHING = threading.Lock()
_INSTEAD = {
    "preference": "loss=",
    "preference_options": "these options by themselves: **preference_options",
    "return_logps": "fastdpop.attach(model), then model(**batch, return_logps=True).logps",
}
"""Arguments of an attached model's own call that are written otherwise here."""


def _named(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of a model that says so where its batch was not given by keyword."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if len(args) > 1:
            raise TypeError(
                f"{function.__name__} was given a {type(args[1]).__name__} behind the model, expected the batch by "
                f"keyword: {function.__name__}(model, **batch, loss=...)"
            )
        return function(*args, **kwargs)

    return call


@_named
def preference_loss(
    model: nn.Module,
    *,
    loss: Loss,
    ref_logps: RefLogps | Exact | None = None,
    **batch_and_options: Any,
) -> PreferenceModelOutput:
    """A preference loss of a Hugging Face causal language model, without logits.

        out = fastdpop.preference_loss(model, **batch, loss="dpop", ref_logps=ref_logps)
        out.loss.backward()

    The same as ``model(**batch, preference=loss, ref_logps=ref_logps)`` of an attached model, of which a model that is
    not attached takes no notice: it returns its own cross-entropy. This function attaches it at the first call, with
    the defaults of :func:`fastdpop.attach`. Call that yourself, before, for its options (`share_prefixes`, `engine`, a
    group, ``check=False``): they stay as they are.

    Args:
        model: a causal language model, attached or not; or what stands around one: PEFT, DDP, DeepSpeed's engine,
            ``torch.compile``, FSDP2. Its wrapper is what is called. FSDP1 and ``nn.DataParallel`` leave nothing to
            attach to.
        loss: a name such as ``"dpop"``, a loss (``losses.get("dpop", beta=0.1)``) or a function of ``PairLogps``. Its
            own options go into ``losses.get``.
        ref_logps: the reference's log-probs, a pair of ``(B,)`` tensors or one ``(2B,)``, for a loss that reads them.
        batch_and_options: what the model's ``forward`` takes, ``input_ids``, ``attention_mask`` and `labels`, ``(2B,
            T)`` with the chosen sequences first, labels aligned with the ids and -100 where a token is not scored; and
            further arguments of :func:`fused_preference_loss` (``pairs``, ``kl``, ``reduction``, ``statistics``, ...)
            and of an attached model (``share_prefixes``, ``router_loss_weight``, ``prefix_tree``).

    Returns:
        :class:`~fastdpop.hf.PreferenceModelOutput`; its `loss` is differentiable.

    Raises:
        TypeError: `model` is no causal language model, or what is around it hides it; or nothing reads an
            argument, an option of the loss for one.
        ValueError: an argument is not as described; the message names it, its value and what was expected.
        RuntimeError: the model cannot be attached, or was, and its ``forward`` has been replaced since.
    """
    for name, instead in _INSTEAD.items():
        if name in batch_and_options:
            raise ValueError(f"{name} is given to preference_loss, expected {instead}")
    losses.as_loss(loss)
    target = _attached(model)
    options = {name: batch_and_options.pop(name) for name in _options(batch_and_options)}
    check_keywords(target, inspect.signature(target.forward), batch_and_options, loss, "loss")
    if batch_and_options.pop("return_dict", True) is False:
        raise ValueError("return_dict is False, expected True: preference_loss returns no tuple")
    out = model(
        **batch_and_options,
        preference=loss,
        ref_logps=ref_logps,
        preference_options=options or None,
        return_dict=True,
    )
    if not isinstance(out, PreferenceModelOutput):
        raise RuntimeError(
            f"{type(model).__name__} returned a {type(out).__name__}, expected the PreferenceModelOutput of the model "
            "inside it: call the loss on that, or let the wrapper pass keywords and outputs on"
        )
    return out


def _options(given: dict[str, Any]) -> list[str]:
    """Which keywords are the loss's computation's. Labels that were shifted before come under an option's name."""
    return [
        n
        for n in given
        if n in OPTIONS and not (n == "shift_labels" and isinstance(given[n], Tensor))
    ]


@torch.compiler.disable
def _attached(model: Any) -> nn.Module:
    """The model inside `model`, attached now if it was not."""
    with _ATTACHING:  # a check that another thread runs on the model is over then
        target = causal_lm(innermost(model))
        if attachment_of(target) is not None:
            return target
        if guarded(target):
            raise RuntimeError(
                f"the forward of {type(target).__name__} was replaced after fastdpop.attach, or the model was pickled, "
                "expected fastdpop.attach(model) once more, with the options it had"
            )
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise TypeError(
                f"model is a DataParallel over {len(model.device_ids)} devices, whose copies would all use one "
                "device's weights, expected one process per device: DistributedDataParallel"
            )
        attach(innermost(model))
        return target
