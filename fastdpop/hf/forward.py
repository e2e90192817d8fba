"""The ``forward`` of an attached model: its own code on logits that do not exist, then the fused loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop import checks
from fastdpop.api import fused_logps, fused_preference_loss
from fastdpop.exact import Exact, opened
from fastdpop.hf.head import adapter_columns, output_head
from fastdpop.hf.interception import lazy_logits_from, real_logits_for
from fastdpop.hf.lazy_logits import LazyLogits
from fastdpop.hf.output import PreferenceModelOutput
from fastdpop.hf.self_check import random_state, set_random_state
from fastdpop.hf.sharded import HeadKeptWhole, spread
from fastdpop.hf.sharing import SharedBatch, check_model, padded, shared_batch, tree_batch
from fastdpop.hf.sharing_check import verdict, warn_once
from fastdpop.hf.tree_attention import Unshareable, masks_of
from fastdpop.hf.zero import PartitionedHead, with_whole_head
from fastdpop.losses.base import PairLogps, PreferenceLoss
from fastdpop.output import PreferenceOutput
from fastdpop.rows import IGNORE, default_pairs

Preference = str | PreferenceLoss | Callable[[PairLogps], Tensor]
RefLogps = Tensor | Sequence[Tensor]


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
        preference: Preference | None = None,
        ref_logps: RefLogps | Exact | None = None,
        return_logps: bool = False,
        preference_options: Mapping[str, Any] | None = None,
        router_loss_weight: float | None = None,
        prefix_tree: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        options = preference_options
        if isinstance(options, Mapping):
            options = {name: opened(value) for name, value in options.items()}
        asked = _Asked(
            preference, opened(ref_logps), return_logps, options, router_loss_weight, prefix_tree
        )
        asked.check()
        if preference is None and not return_logps:
            if torch.compiler.is_compiling():
                return original(self, *args, **kwargs)
            with real_logits_for(self):
                return original(self, *args, **kwargs)
        return answer(self, asked, args, kwargs)

    forward.__signature__ = _extended(signature, inspect.signature(forward))  # type: ignore[attr-defined]
    forward.fastdpop = Attachment(vars(model).get("forward"), bound, settings)  # type: ignore[attr-defined]
    return MethodType(forward, model)


_SET_HERE = {"loss", "ref_logps", "bias", "softcap", "logit_scale", "engine", "workspace_bytes"}
_SET_HERE |= {"hidden_index"}
"""Arguments of the fused functions that are no options of a call."""


@dataclass
class _Asked:
    """The arguments of a call that are fastdpop's."""

    preference: Preference | None
    ref_logps: RefLogps | None
    return_logps: bool
    options: Mapping[str, Any] | None
    router_loss_weight: float | None
    prefix_tree: Mapping[str, Tensor] | None

    def check(self) -> None:
        """
        Raises:
            ValueError: arguments are given that do not go together.
        """
        if self.preference is None and self.router_loss_weight is not None:
            raise ValueError(
                "router_loss_weight is given without preference, expected preference= too"
            )
        if self.return_logps:
            for name in ("preference", "ref_logps"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is given with return_logps=True, expected one of the two"
                    )
        elif self.preference is None:
            if self.ref_logps is not None:
                raise ValueError("ref_logps is given without preference, expected preference= too")
            for name, given in (
                ("preference_options", self.options),
                ("prefix_tree", self.prefix_tree),
            ):
                if given is not None:
                    raise ValueError(
                        f"{name} is given without preference, expected preference= too"
                    )

    @torch.compiler.disable
    def check_options(self) -> None:
        """
        Raises:
            TypeError, ValueError: the options are no dict of further arguments of the fused function.
        """
        if self.options is None:
            return
        if not isinstance(self.options, Mapping):
            raise TypeError(
                f"preference_options is a {type(self.options).__name__}, expected a dict"
            )
        checks.flag("share_prefixes", self.options.get("share_prefixes", False))
        function = fused_logps if self.preference is None else fused_preference_loss
        parameters = inspect.signature(function).parameters.values()
        names = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - _SET_HERE
        names |= {"share_prefixes"}
        for name in self.options:
            if name not in names:
                raise ValueError(
                    f"preference_options contains {name!r}, expected names among {sorted(names)}; "
                    "a loss's own options go to losses.get, engine and workspace_bytes to attach"
                )


# Under torch.compile the model's own code is compiled, and nothing of what stands around it.
@torch.compiler.disable(recursive=False)
def _answer(
    original: Callable[..., Any],
    signature: inspect.Signature,
    settings: dict[str, Any],
    model: nn.Module,
    asked: _Asked,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PreferenceModelOutput | tuple[Any, ...]:
    """The model's own forward on lazy logits, and the fused function on what they stand for."""
    asked.check_options()
    call, labels, as_dict = _arguments(model, signature, args, kwargs)
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
        output = _fused(model, outputs, labels, asked, settings, batch)
        whole.for_backward(output)
    return output if as_dict else output.to_tuple()


def _run(
    original: Callable[..., Any], model: nn.Module, call: dict[str, Any], batch: SharedBatch | None
) -> Any:
    """What the model's own forward returns, with lazy logits, on the batch as it is or as a tree."""
    head = output_head(model)
    if batch is None:
        with lazy_logits_from(head, model, adapter_columns(head)):
            return original(model, **call, return_dict=True)
    with lazy_logits_from(head, model, adapter_columns(head)), masks_of(batch.layout):
        return original(model, **batch.call(call), return_dict=True)


@torch.compiler.disable
def _laid_out(
    model: nn.Module,
    signature: inspect.Signature,
    run: Callable[..., Any],
    asked: _Asked,
    settings: Mapping[str, Any],
    call: dict[str, Any],
    labels: Tensor,
) -> tuple[dict[str, Any], SharedBatch | None]:
    """The keywords of the model's forward, and the tree to compute them on; None: as they are."""
    options, own = dict(asked.options or {}), _plain(settings)
    laid_out = asked.prefix_tree is not None
    if not laid_out and not options.get("share_prefixes", settings["share_prefixes"]):
        return call, None

    def logps(sample: dict[str, Any], labels: Tensor, batch: SharedBatch | None) -> Tensor:
        plain = {name: value for name, value in call.items() if isinstance(value, (bool, int))}
        inputs = _inputs(model, run({**plain, **sample}, batch), labels, {}, batch)
        return with_whole_head(fused_logps, {**inputs, **own, "reduction": "token"})

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
    asked: _Asked,
    settings: Mapping[str, Any],
    batch: SharedBatch | None,
) -> PreferenceModelOutput:
    """The loss or the log-probs from what the model returned."""
    options = {k: v for k, v in (asked.options or {}).items() if k != "share_prefixes"}
    inputs = _inputs(model, outputs, labels, options, batch) | _plain(settings) | options
    passed_on = {name: getattr(outputs, name, None) for name in _PASSED_ON}
    if batch is not None and passed_on["hidden_states"] is not None:
        passed_on["hidden_states"] = tuple(map(batch.unshared, passed_on["hidden_states"]))
    if asked.preference is None:
        logps = with_whole_head(fused_logps, inputs)
        shape = labels.shape if options.get("reduction") == "token" else logps.shape
        return PreferenceModelOutput(logps=logps.view(shape), **passed_on)
    inputs |= {"loss": asked.preference, "ref_logps": asked.ref_logps}
    result = with_whole_head(fused_preference_loss, inputs)
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    values["loss"] = _with_router_loss(
        model, result.loss, passed_on["aux_loss"], asked.router_loss_weight
    )
    values["logps"] = _by_sequence(result, options.get("pairs"))
    return PreferenceModelOutput(**values, **passed_on)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are arguments of the fused functions."""
    return {name: value for name, value in settings.items() if name != "share_prefixes"}


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
    model: nn.Module, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Tensor, bool]:
    """Keywords for the model's own forward; the labels, kept from its loss; whether to return a ModelOutput."""
    as_dict = kwargs.pop("return_dict", None)
    call = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            call.update(call.pop(name, {}))
    as_dict = call.pop("return_dict", as_dict)
    if as_dict is None:
        as_dict = getattr(getattr(model, "config", None), "return_dict", True)
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
    }


def _by_sequence(result: PreferenceOutput, pairs: Any) -> Tensor:
    """The ``(S,)`` log-probs of a result, in the order of the batch."""
    logps = result.chosen_logps.new_zeros(len(result.lengths))
    if pairs is None:
        pairs = default_pairs(len(logps), logps.device)
    sequences = torch.as_tensor(pairs, device=logps.device)
    for side, values in enumerate((result.chosen_logps, result.rejected_logps)):
        present = sequences[:, side] >= 0
        logps[sequences[present, side]] = values[present]
    return logps


def _with_router_loss(
    model: nn.Module, loss: Tensor, router_loss: Tensor | None, weight: float | None
) -> Tensor:
    """Add the load-balancing loss as a mixture of experts itself does when it gets labels."""
    if router_loss is None:
        return loss
    if weight is not None:
        return loss + weight * router_loss.to(loss.device)
    config = getattr(model, "config", None)
    text_config = getattr(config, "text_config", None)
    for owner in (model, config, text_config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            coefficient = getattr(owner, name, None)
            if coefficient is not None:
                return loss + coefficient * router_loss.to(loss.device)
    raise RuntimeError(
        f"{type(model).__name__} reports an aux_loss, but no router_aux_loss_coef is found in it or its config"
    )
