"""The ``forward`` of an attached model: its own code on logits that do not exist, then the fused loss."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.api import fused_logps, fused_preference_loss
from fastdpop.call import Loss, RefLogps
from fastdpop.distributed import Group
from fastdpop.distributed.agreement import Approach, approach
from fastdpop.distributed.parallel import ALONE, Parallel
from fastdpop.hf.asked import Asked
from fastdpop.hf.head import adapter_columns, output_head
from fastdpop.hf.interception import lazy_logits_from, real_logits_for
from fastdpop.hf.keywords import check_keywords, check_plain
from fastdpop.hf.lazy_logits import LazyLogits
from fastdpop.hf.output import PreferenceModelOutput
from fastdpop.hf.results import by_sequence, with_router_loss
from fastdpop.hf.self_check import random_state, set_random_state
from fastdpop.hf.sharded import HeadKeptWhole, spread
from fastdpop.hf.sharing import SharedBatch, check_model, padded, shared_batch, tree_batch
from fastdpop.hf.sharing_check import verdict, warn_once
from fastdpop.hf.tree_attention import Unshareable, masks_of
from fastdpop.hf.unfit import check_ids
from fastdpop.hf.zero import PartitionedHead, with_whole_head
from fastdpop.rows import IGNORE
from fastdpop.unrounded import Exact, opened


@dataclass(frozen=True)
class Attachment:
    """What `attach` replaced and was told; an attribute of the function it puts in the place of ``forward``."""

    previous: Any  # the instance's own forward (other libraries set one), None for the class's
    bound: bool  # it was a method of the model
    settings: dict[str, Any]


def attachment_of(model: nn.Module) -> Attachment | None:
    """What is known about a model whose ``forward`` is an attached one, also inside other libraries' wrappers."""
    forward = model.forward
    while hasattr(forward, "__wrapped__"):  # wrappers copy attributes: only the innermost counts
        forward = forward.__wrapped__
    return getattr(forward, "fastdpop", None)


def attached_forward(model: Any, settings: dict[str, Any]) -> MethodType:
    """A bound ``forward`` that knows the model by its binding only, so that a copy of the model binds its own."""
    before = model.forward
    signature = inspect.signature(before)
    bound = getattr(before, "__self__", None) is model
    if bound:
        original = before.__func__
    else:

        def original(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return before(*args, **kwargs)

    answer = functools.partial(_answer, original, signature, settings)

    def forward(
        self: nn.Module,
        *args: Any,
        preference: Loss | None = None,
        ref_logps: RefLogps | Exact | None = None,
        return_logps: bool = False,
        preference_options: Mapping[str, Any] | None = None,
        router_loss_weight: float | None = None,
        prefix_tree: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        asked = Asked(
            preference,
            opened(ref_logps),
            return_logps,
            opened(preference_options),
            router_loss_weight,
            prefix_tree,
        )
        asked.check()
        if preference is None and not return_logps:
            if torch.compiler.is_compiling():
                return original(self, *args, **kwargs)
            check_plain(self, signature, kwargs)
            with real_logits_for(self):
                return original(self, *args, **kwargs)
        return answer(self, asked, args, kwargs)

    forward.__signature__ = _extended(signature, inspect.signature(forward))  # type: ignore[attr-defined]
    forward.fastdpop = Attachment(vars(model).get("forward"), bound, settings)  # type: ignore[attr-defined]
    return MethodType(forward, model)


# Under torch.compile the model's own code is compiled, and nothing of what stands around it.
@torch.compiler.disable(recursive=False)
def _answer(
    original: Callable[..., Any],
    signature: inspect.Signature,
    settings: dict[str, Any],
    model: nn.Module,
    asked: Asked,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PreferenceModelOutput | tuple[Any, ...]:
    """The model's own forward on lazy logits, and the fused function on what they stand for."""
    with _approach(model, settings, asked.options) as way:
        asked.check_options()
        asked.take_shifted(kwargs)
        call, labels, as_dict = _arguments(model, signature, asked.preference, args, kwargs)
        run = functools.partial(_run, original, model)
        with PartitionedHead(model), HeadKeptWhole(output_head(model)) as whole:
            call, batch = _laid_out(model, signature, run, asked, settings, call, labels)
            random = None if batch is None else random_state(batch.device)
            try:
                outputs = run(call, batch)
            except Unshareable as error:  # met by a layer
                if batch is None or random is None:
                    raise
                if spread(model):  # where no process may run it once more by itself
                    raise RuntimeError(
                        f"share_prefixes: {error}, which the check of the model has not shown: leave out share_prefixes"
                    ) from error
                warn_once(model, str(error))
                set_random_state(random)  # what layers before that one have dropped out
                call, batch = call if asked.prefix_tree is None else padded(batch, call), None
                outputs = run(call, batch)
            output = _fused(model, outputs, labels, asked, settings, batch, way)
            whole.for_backward(output)
    return output if as_dict else output.to_tuple()


@torch.compiler.disable
def _approach(
    model: nn.Module, settings: Mapping[str, Any], options: Any
) -> AbstractContextManager[Approach]:
    """Other ranks wait for this one's part of a loss: they hear of it if that will not come. Those of a model that is
    spread over processes wait in the middle of it, where nobody could tell them.
    """
    if spread(model):
        return approach(ALONE, torch.device("cpu"))
    own = options.get("group") if isinstance(options, Mapping) else None
    group = settings["group"] if own is None else own
    parallel = Parallel.of(group, settings["cp_group"], settings["tp_group"])
    return approach(parallel, next(model.parameters()).device)


def _run(
    original: Callable[..., Any], model: nn.Module, call: dict[str, Any], batch: SharedBatch | None
) -> Any:
    """What the model's own forward returns, with lazy logits, on the batch as it is or as a tree."""
    head = output_head(model)
    if batch is None:
        with lazy_logits_from(head, model, adapter_columns(head)):
            try:
                return original(model, **call, return_dict=True)
            except IndexError as error:
                check_ids(model, call.get("input_ids"), error)
                raise
    with lazy_logits_from(head, model, adapter_columns(head)), masks_of(batch.layout):
        return original(model, **batch.call(call), return_dict=True)


@torch.compiler.disable
def _laid_out(
    model: nn.Module,
    signature: inspect.Signature,
    run: Callable[..., Any],
    asked: Asked,
    settings: Mapping[str, Any],
    call: dict[str, Any],
    labels: Tensor,
) -> tuple[dict[str, Any], SharedBatch | None]:
    """The keywords of the model's forward, and the tree to compute them on; None: as they are."""
    options = dict(asked.options or {})
    laid_out = asked.prefix_tree is not None
    if not laid_out and not options.get("share_prefixes", settings["share_prefixes"]):
        return call, None

    def logps(sample: dict[str, Any], labels: Tensor, batch: SharedBatch | None) -> Tensor:
        plain = {name: value for name, value in call.items() if isinstance(value, (bool, int))}
        inputs = _inputs(model, run({**plain, **sample}, batch), labels, {}, batch)
        given = _with(settings, inputs, fused_logps) | {"reduction": "token"}
        return with_whole_head(fused_logps, given)

    batch, shift = None, options.get("shift_labels", True)
    if asked.prefix_tree is not None:
        batch = tree_batch(asked.prefix_tree, call, labels, shift=shift)
        if options.get("share_prefixes") is False:
            return padded(batch, call), None
    try:
        config = getattr(model, "config", None)
        if call.get("output_attentions", getattr(config, "output_attentions", False)):
            raise Unshareable(
                "output_attentions is set, and a tree has no weights for each sequence"
            )
        if settings["cp_group"] is not None:
            raise Unshareable("cp_group is given, and each process has parts of sequences")
        if options.get("ref_hidden") is not None:
            raise Unshareable("ref_hidden is given, whose states are those of the padded batch")
        if batch is None and options.get("cu_seqlens") is not None:
            raise Unshareable("cu_seqlens is given (fastdpop.pack packs sequences that share)")
        ask = functools.partial(verdict, model, logps, "position_ids" in signature.parameters)
        if spread(model):
            ask(labels.device)  # in every process, whatever its batch
        if batch is None:
            batch = shared_batch(call, labels, shift=shift)
        check_model(model, len(batch.tree.input_ids))
        found = ask(batch.device, batch.tree)
        if found.mode == "packed" and not laid_out:
            warn_once(model, found.reason, packed=True)
            return call, shared_batch(call, labels, packed=True)
        if found.mode != "shared":
            raise Unshareable(found.reason)
    except Unshareable as error:
        warn_once(model, str(error))
        return (padded(batch, call) if laid_out and batch is not None else call), None
    return call, batch


@torch.compiler.disable
def _fused(
    model: nn.Module,
    outputs: Any,
    labels: Tensor,
    asked: Asked,
    settings: Mapping[str, Any],
    batch: SharedBatch | None,
    way: Approach,
) -> PreferenceModelOutput:
    """The loss or the log-probs from what the model returned; from here on the fused function tells other ranks."""
    options = {k: v for k, v in (asked.options or {}).items() if k != "share_prefixes"}
    function = fused_logps if asked.preference is None else fused_preference_loss
    given = _inputs(model, outputs, labels, options, batch)
    _check_split(model, given, settings["tp_group"])
    inputs = _with(settings, given, function) | options
    passed_on = {name: getattr(outputs, name, None) for name in _PASSED_ON}
    if batch is not None and passed_on["hidden_states"] is not None:
        passed_on["hidden_states"] = tuple(map(batch.unshared, passed_on["hidden_states"]))
    way.there = True
    if asked.preference is None:
        logps = with_whole_head(fused_logps, inputs)
        shape = labels.shape if options.get("reduction") == "token" else logps.shape
        return PreferenceModelOutput(logps=logps.view(shape), **passed_on)
    inputs |= {"loss": asked.preference, "ref_logps": asked.ref_logps}
    if "displacement" in options.get("statistics", ()):
        # Behind the state stands what adapters of the head made of it.
        inputs["state_columns"] = output_head(model).weight.shape[1]
    result = with_whole_head(fused_preference_loss, inputs)
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    values["loss"] = with_router_loss(
        model, result.loss, passed_on["aux_loss"], asked.router_loss_weight
    )
    values["logps"] = by_sequence(result)
    return PreferenceModelOutput(**values, **passed_on)


def _check_split(model: Any, inputs: Mapping[str, Any], tp_group: Any) -> None:
    """
    Raises:
        ValueError: a `tp_group` is given, and the head's weight is not a part of the vocabulary, or knows its group.
    """
    if tp_group is None:
        return
    if inputs["tp_group"] is not None:
        raise ValueError(
            "tp_group is given to attach, expected None for a head whose weight is a DTensor: that knows its group"
        )
    config = getattr(model, "config", None)
    text_config = getattr(config, "text_config", None) or config
    vocabulary, rows = getattr(text_config, "vocab_size", None), len(inputs["weight"])
    if Group.of("tp_group", tp_group) is not None and vocabulary and rows >= vocabulary:
        raise ValueError(
            f"tp_group is given to attach, and the head of {type(model).__name__} has {rows} rows, expected this "
            f"rank's part of the vocabulary of {vocabulary}"
        )


def _with(
    settings: Mapping[str, Any], inputs: Mapping[str, Any], function: Callable[..., Any]
) -> dict[str, Any]:
    """The inputs of a fused function, and the settings that it has arguments for."""
    known = inspect.signature(function).parameters
    own = {name: value for name, value in settings.items() if name in known}
    # A head of DTensors has a group of its own.
    return {**inputs, **own, "tp_group": inputs["tp_group"] or settings["tp_group"]}


_PASSED_ON = ("aux_loss", "hidden_states", "attentions")


def _extended(own: inspect.Signature, ours: inspect.Signature) -> inspect.Signature:
    """The model's signature, `self` and our keywords added: Trainer and ``generate`` read it."""
    added = [p for p in ours.parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = [ours.parameters["self"], *own.parameters.values()]
    last = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    cut = len(parameters) - last
    return own.replace(parameters=[*parameters[:cut], *added, *parameters[cut:]])


@torch.compiler.disable
def _arguments(
    model: nn.Module,
    signature: inspect.Signature,
    preference: Loss | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[dict[str, Any], Tensor, bool]:
    """Keywords for the model's own forward; the labels, kept from its loss; whether to return a ModelOutput."""
    as_dict = kwargs.pop("return_dict", None)
    check_keywords(model, signature, kwargs, preference)
    call = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
    as_dict = call.pop("return_dict", as_dict)
    if as_dict is None:
        as_dict = getattr(getattr(model, "config", None), "return_dict", True)
    ids = call.get("input_ids")
    if isinstance(ids, Mapping):
        raise TypeError(
            f"input_ids is a {type(ids).__name__}, expected a tensor of token ids: write model(**batch, ...)"
        )
    if preference is not None and call.get("num_items_in_batch") is not None:
        warnings.warn(
            "num_items_in_batch has no part in a loss of pairs: transformers' Trainer, which gives it, leaves it to "
            "the model to divide by gradient_accumulation_steps. Set trainer.model_accepts_loss_kwargs = False",
            stacklevel=1,  # one place, whichever call it is
        )
    labels = call.pop("labels", None)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"labels is {labels!r}, expected a tensor of token ids, {IGNORE} where not scored"
        )
    for name, value in (("logits_to_keep", 0), ("num_logits_to_keep", 0), ("use_cache", False)):
        given = call.get(name)
        if isinstance(given, Tensor) or given:
            raise ValueError(
                f"{name} is {given!r}, expected {value} with preference or return_logps"
            )
        if name in signature.parameters:
            call[name] = value
    return call, labels, bool(as_dict)


def _inputs(
    model: nn.Module,
    outputs: Any,
    labels: Tensor,
    options: Mapping[str, Any],
    batch: SharedBatch | None,
) -> dict[str, Any]:
    """Arguments of the fused function, read from the lazy logits that the model returned."""
    owner, logits = type(model).__name__, getattr(outputs, "logits", None)
    if not isinstance(logits, LazyLogits):
        found = type(logits).__name__
        raise RuntimeError(f"{owner} returned logits of type {found}, expected what its head gave")
    product = logits.product
    hidden, index = product.hidden, None
    positions = labels.shape if batch is None else (1, len(batch.tree.input_ids))
    if hidden.shape[:-1] != positions:
        raise ValueError(
            f"labels has shape {tuple(positions)}, expected {tuple(hidden.shape[:-1])}, "
            f"the positions of {owner}'s logits"
        )
    if batch is not None:
        hidden, index = hidden[0], batch.hidden_index
    if options.get("cu_seqlens") is not None:
        if len(labels) != 1:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected (1, positions) with cu_seqlens"
            )
        hidden, labels = hidden[0], labels[0]
    return {
        "hidden": hidden,
        "weight": product.weight,
        "bias": product.bias,
        "labels": labels,
        "hidden_index": index,
        "softcap": product.softcap,
        "logit_scale": product.logit_scale,
        "tp_group": product.tp_group,
    }
