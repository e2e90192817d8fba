"""Preference losses inside a Hugging Face model's own ``forward``.

    fastdpop.attach(model)
    out = model(input_ids=ids, labels=labels, preference="dpop", ref_logps=ref_logps)
    out.loss.backward()

A loss computed in ``forward`` is seen by everything around the model: DDP, FSDP, accelerate, PEFT. No architecture
is patched by name. The model runs its own code on logits that do not exist (:mod:`fastdpop.lazy_logits`), and the fused
loss takes over from the hidden states, the weight and the transform that they stand for.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdpop import checks, engines
from fastdpop.api import fused_logps, fused_preference_loss
from fastdpop.lazy_logits import LazyLogits, lazy_logits_from
from fastdpop.losses.base import PairLogps, PreferenceLoss
from fastdpop.output import PreferenceOutput

try:
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    raise ImportError("fastdpop.attach needs transformers: pip install 'fastdpop[hf]'") from error

Preference = str | PreferenceLoss | Callable[[PairLogps], Tensor]
RefLogps = Tensor | Sequence[Tensor]
Model = TypeVar("Model", bound=nn.Module)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Allowed difference of log-probs in the self-check, over 1 + the largest logit, by the logits' coarsest dtype."""


@dataclass
class PreferenceModelOutput(ModelOutput):
    """What an attached model returns for ``preference=`` or ``return_logps=True``.

    Attributes:
        loss: differentiable loss, the model's own router loss included (mixtures of experts).
        logps: ``(S,)`` log-probs of the sequences in nats, in the order of the batch, 0 for one that no pair uses.
            Differentiable unless there is a loss. Shaped as the labels for ``reduction="token"``.
        aux_loss: the router loss as the model reports it, before its coefficient.
        hidden_states, attentions: the model's, if asked for.

    The others are those of :class:`~fastdpop.PreferenceOutput`; all are None without ``preference=``.
    """

    loss: Tensor | None = None
    logps: Tensor | None = None
    losses: Tensor | None = None
    chosen_logps: Tensor | None = None
    rejected_logps: Tensor | None = None
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    margins: Tensor | None = None
    accuracy: Tensor | None = None
    penalty: Tensor | None = None
    lengths: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    token_accuracy: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def attach(
    model: Model, *, engine: str = "auto", workspace_bytes: int | None = None, check: bool = True
) -> Model:
    """Let a Hugging Face causal language model's ``forward`` compute preference losses, without logits.

    ``forward`` then also accepts, by keyword:

    - ``preference``: a loss's name, a loss (``losses.get("dpop", beta=0.3, lam=50.0)``) or a function of
      ``PairLogps``. The batch is ``(2B, T)``, chosen sequences first; `labels` are aligned with the ids, -100 where a
      token is not scored.
    - ``ref_logps``: the reference's log-probs, a pair of ``(B,)`` tensors or one ``(2B,)``.
    - ``return_logps=True``, instead of ``preference``: log-probs only, differentiable where gradients are on.
    - ``router_loss_weight``: the weight of a mixture of experts' router loss; its config's by default.
    - ``preference_options``: a dict of further arguments of :func:`fused_preference_loss` (``pairs``, ``kl``,
      ``reduction``, ``statistics``, ...) or, with ``return_logps``, of :func:`fused_logps`. With ``cu_seqlens`` the ids
      are ``(1, positions)``.

    Such calls return a :class:`~fastdpop.hook.PreferenceModelOutput`; all others are as before. Parameters,
    ``state_dict``, ``generate`` and saving are untouched. A deep copy is attached too, an unpickled one is not.

    Args:
        model: the model, or a PEFT model around it (the inner model is attached). Attach before wrapping or compiling.
        engine, workspace_bytes: as in :func:`fused_preference_loss`, for all calls.
        check: run the model on ten tokens and compare with its own logits. Pass False for a model that cannot run yet:
            on the meta device, or sharded when not every rank attaches. What fastdpop cannot follow is an error then
            too, at the first call; only a model that is inconsistent in itself goes unnoticed.

    Returns:
        The same model. Attaching again replaces engine and workspace.

    Raises:
        TypeError: `model` is not a causal language model, or is wrapped or compiled.
        ValueError: there is no such engine, or the model to check is on the meta device.
        RuntimeError: the head has no floating-point weight, head or model do to the logits what fastdpop cannot follow,
            or its log-probs differ from fastdpop's.
    """
    target = _causal_lm(model)
    if engine != "auto":
        engines.get(engine)
    checks.workspace(workspace_bytes, engines.DEFAULT_WORKSPACE_BYTES)
    head = _output_head(target)
    if check and head.weight.is_meta:
        raise ValueError("check is True, expected False for a model on the meta device")
    settings = {"engine": engine, "workspace_bytes": workspace_bytes}
    attachment = _attachment(target)
    new = attachment is None or attachment.settings != settings
    if new:
        detach(target)
        target.forward = _attached_forward(target, settings)
        _add_guards(target)
    if check:
        try:
            _check_itself(target, head)
        except BaseException:
            if new:
                detach(target)
            raise
    return model


def detach(model: Model) -> Model:
    """Undo :func:`attach` exactly. A model that is not attached is left alone.

    Raises:
        RuntimeError: ``forward`` was wrapped again after `attach`, for example by accelerate.
    """
    target = _causal_lm(model)
    attachment = _attachment(target)
    if attachment is None:
        _remove_guards(target)
        return model
    if hasattr(target.forward, "__wrapped__"):
        raise RuntimeError(
            f"the forward of {type(target).__name__} was wrapped after fastdpop.attach: unwrap it first "
            "(accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    _remove_guards(target)
    del target.forward
    previous = attachment.previous
    if attachment.bound and previous is not None and previous.__self__ is not target:
        # In a deep copy of an attached model the method still belongs to the model that was copied.
        previous = MethodType(previous.__func__, target)
    if previous is not None:
        target.forward = previous
    return model


@dataclass(frozen=True)
class _Attachment:
    """What `attach` replaced and was told; an attribute of the function it puts in the place of ``forward``."""

    previous: Any  # the instance's own forward (other libraries set one), None for the class's
    bound: bool  # it was a method of the model
    settings: dict[str, Any]


def is_attached(model: nn.Module) -> bool:
    """Whether the model, or the one inside a PEFT model, is attached."""
    return _attachment(_causal_lm(model)) is not None


def _attachment(model: nn.Module) -> _Attachment | None:
    forward = model.forward
    while hasattr(forward, "__wrapped__"):  # wrappers copy attributes: only the innermost counts
        forward = forward.__wrapped__
    return getattr(forward, "fastdpop", None)


def _trunk(model: Any) -> Any:
    """The model inside the model, or None."""
    trunk = getattr(model, "base_model", model)
    return None if trunk is model else trunk


def _add_guards(model: Any) -> None:
    """Stop calls that a later patch of ``forward`` (Liger's, for one) would answer without a preference loss.

    PEFT calls ``forward`` of the model directly, where hooks of the model do not run: those of the trunk do.
    """
    model.register_forward_pre_hook(_note_arguments, with_kwargs=True)
    model.register_forward_hook(_refuse_unread, with_kwargs=True)
    if _trunk(model) is not None:
        _trunk(model).register_forward_pre_hook(_refuse_passed_on, with_kwargs=True)


def _remove_guards(model: Any) -> None:
    for module in filter(None, (model, _trunk(model))):
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, kind)
            for key in [key for key, hook in hooks.items() if hook in _GUARDS]:
                del hooks[key]
                del getattr(module, f"{kind}_with_kwargs")[key]
        vars(module).pop(_UNREAD, None)


_UNREAD = "_fastdpop_unread"
"""Attribute of a model: the argument of the present call that the attached ``forward`` has not read yet."""


def _ours(kwargs: Mapping[str, Any]) -> str | None:
    return next((name for name in ("preference", "return_logps") if kwargs.get(name)), None)


def _note_arguments(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    vars(model)[_UNREAD] = _ours(kwargs)


def _refuse_unread(model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
    name = vars(model).pop(_UNREAD, None)
    if name is not None:
        raise _unread(name, model)


def _refuse_passed_on(trunk: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    name = _ours(kwargs)
    if name is not None:
        raise _unread(name, trunk)


def _unread(name: str, module: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"{name} reached {type(module).__name__} unread: forward was replaced after fastdpop.attach, "
        "or the model was pickled. Apply Liger and other patches first, then attach"
    )


_GUARDS = (_note_arguments, _refuse_unread, _refuse_passed_on)


def _causal_lm(model: Any) -> Any:
    """The model to attach to; inside a PEFT model, the one it adapts."""
    name = type(model).__name__
    if name == "OptimizedModule" or (
        hasattr(model, "module") and isinstance(model.module, nn.Module)
    ):
        raise TypeError(
            f"model is a {name}, expected the model inside it: attach before wrapping or compiling"
        )
    target = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(target, nn.Module) or not hasattr(target, "get_output_embeddings"):
        raise TypeError(f"model is a {name}, expected a Hugging Face causal language model")
    return target


def _output_head(model: Any) -> Any:
    """The output embedding: a module with a weight, which may do more than multiply by it (an adapter, a scale)."""
    owner, head = type(model).__name__, model.get_output_embeddings()
    if head is None:
        raise RuntimeError(f"{owner} has no output embedding: get_output_embeddings() is None")
    name = next((name for name, module in model.named_modules() if module is head), "the head")
    weight = getattr(head, "weight", None)
    if "forward" in vars(head):
        advice = "its forward is replaced (offloading?): keep it on one device, without hooks"
    elif not isinstance(weight, Tensor) or weight.dim() != 2:
        advice = (
            "expected a module with a weight (vocabulary, width), or call fastdpop.fused_preference_loss "
            "on the hidden states"
        )
    elif not weight.is_floating_point():
        advice = f"its weight is {weight.dtype}, expected floating-point: leave the head out of the quantisation"
    else:
        return head
    kind = type(head).__name__
    raise RuntimeError(f"{name} of {owner} is a {kind} that fastdpop cannot read: {advice}")


def _adapter_columns(head: Any) -> int:
    """Columns that the active LoRA adapters of a head add to its weight, also while they are disabled.

    A reference computed with the adapter disabled then adds in the same order as the policy, so that the two are equal
    to the bit before the first step.
    """
    ranks = getattr(head, "r", None)
    if not isinstance(ranks, dict) or getattr(head, "merged", False):
        return 0
    return sum(ranks[name] for name in head.active_adapters if name in ranks)


# ---- the call -----------------------------------------------------------------------------------


def _attached_forward(model: Any, settings: dict[str, Any]) -> MethodType:
    """A bound ``forward`` that knows the model by its binding only, so that a copy of the model binds its own."""
    before = model.forward
    signature = inspect.signature(before)
    bound = getattr(before, "__self__", None) is model
    if bound:
        original = before.__func__
    else:

        def original(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return before(*args, **kwargs)

    def forward(
        self: nn.Module,
        *args: Any,
        preference: Preference | None = None,
        ref_logps: RefLogps | None = None,
        return_logps: bool = False,
        preference_options: Mapping[str, Any] | None = None,
        router_loss_weight: float | None = None,
        **kwargs: Any,
    ) -> Any:
        if preference is None and router_loss_weight is not None:
            raise ValueError(
                "router_loss_weight is given without preference, expected preference= too"
            )
        vars(self).pop(_UNREAD, None)
        if preference is None and not return_logps:
            if ref_logps is not None or preference_options is not None:
                name = "preference_options" if ref_logps is None else "ref_logps"
                raise ValueError(f"{name} is given without preference, expected preference= too")
            return original(self, *args, **kwargs)
        if return_logps and (preference is not None or ref_logps is not None):
            name = "preference" if preference is not None else "ref_logps"
            raise ValueError(f"{name} is given with return_logps=True, expected one of the two")
        options = _options(
            preference_options, fused_logps if return_logps else fused_preference_loss
        )
        call, labels, as_dict = _arguments(self, signature, args, kwargs)
        head = _output_head(self)
        with lazy_logits_from(head, type(self).__name__, _adapter_columns(head)):
            outputs = original(self, **call, return_dict=True)
        inputs = _inputs(self, outputs, labels, options) | settings | options
        passed_on = {name: getattr(outputs, name, None) for name in _PASSED_ON}
        if preference is None:
            logps = fused_logps(**inputs)
            shape = labels.shape if options.get("reduction") == "token" else logps.shape
            output = PreferenceModelOutput(logps=logps.view(shape), **passed_on)
        else:
            result = fused_preference_loss(**inputs, loss=preference, ref_logps=ref_logps)
            values = {field.name: getattr(result, field.name) for field in fields(result)}
            values["loss"] = _with_router_loss(
                self, result.loss, passed_on["aux_loss"], router_loss_weight
            )
            values["logps"] = _by_sequence(result, options.get("pairs"))
            output = PreferenceModelOutput(**values, **passed_on)
        return output if as_dict else output.to_tuple()

    forward.__signature__ = _extended(signature, inspect.signature(forward))  # type: ignore[attr-defined]
    forward.fastdpop = _Attachment(vars(model).get("forward"), bound, settings)  # type: ignore[attr-defined]
    return MethodType(forward, model)


_PASSED_ON = ("aux_loss", "hidden_states", "attentions")


def _extended(own: inspect.Signature, ours: inspect.Signature) -> inspect.Signature:
    """The model's signature, `self` and our keywords added: Trainer and ``generate`` read it."""
    added = [p for p in ours.parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = [ours.parameters["self"], *own.parameters.values()]
    last = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    cut = len(parameters) - last
    return own.replace(parameters=[*parameters[:cut], *added, *parameters[cut:]])


def _options(given: Mapping[str, Any] | None, function: Callable[..., Any]) -> dict[str, Any]:
    """The further arguments of the fused function that a caller may give."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"preference_options is a {type(given).__name__}, expected a dict")
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - _SET_BY_HOOK
    for name in given:
        if name not in names:
            raise ValueError(
                f"preference_options contains {name!r}, expected names among {sorted(names)}; "
                "a loss's own options go to losses.get, engine and workspace_bytes to attach"
            )
    return dict(given)


_SET_BY_HOOK = {"loss", "ref_logps", "bias", "softcap", "logit_scale", "engine", "workspace_bytes"}


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
            f"labels is {labels!r}, expected a tensor of token ids, -100 where not scored"
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
    model: nn.Module, outputs: Any, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of the fused function, read from the lazy logits that the model returned."""
    owner, logits = type(model).__name__, getattr(outputs, "logits", None)
    if not isinstance(logits, LazyLogits):
        found = type(logits).__name__
        raise RuntimeError(f"{owner} returned logits of type {found}, expected what its head gave")
    product = logits.product
    hidden = product.hidden
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}, "
            f"the positions of {owner}'s logits"
        )
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
        "softcap": product.softcap,
        "logit_scale": product.logit_scale,
    }


def _by_sequence(result: PreferenceOutput, pairs: Any) -> Tensor:
    """The ``(S,)`` log-probs of a result, in the order of the batch."""
    if pairs is None:
        return torch.cat([result.chosen_logps, result.rejected_logps])
    logps = result.chosen_logps.new_zeros(len(result.lengths))
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


# ---- the self-check -----------------------------------------------------------------------------


def _check_itself(model: Any, head: Any) -> None:
    """Compare the log-probs of ten tokens with those of the model's own logits."""
    owner, device = type(model).__name__, head.weight.device
    vocabulary = min(len(head.weight), len(model.get_input_embeddings().weight))
    ids = (torch.arange(3, 13, device=device) % vocabulary).view(2, 5)
    cacheless = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    dtypes: list[torch.dtype] = []
    with _undisturbed(model, device), torch.no_grad():
        watch = head.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
        try:
            logits = model(input_ids=ids, return_dict=True, **cacheless).logits
        except Exception as error:
            raise RuntimeError(
                f"{owner} does not run on token ids alone, so it cannot be checked: pass check=False "
                f"({type(error).__name__}: {error})"
            ) from error
        finally:
            watch.remove()
        options = {"reduction": "token"}
        output = model(input_ids=ids, labels=ids, return_logps=True, preference_options=options)
    every = logits.cpu().double().log_softmax(-1)[:, :-1]
    own = every.gather(-1, ids[:, 1:, None].cpu())[..., 0]
    difference = (own - output.logps[:, 1:].cpu().double()).abs().max().item()
    largest = logits[logits.isfinite()].abs().max().item()
    # What the head gave may have been cast up since, by autocast or by the model.
    tolerance = max(TOLERANCE[dtype] for dtype in (logits.dtype, *dtypes)) * (1.0 + largest)
    if not difference <= tolerance:
        raise RuntimeError(
            f"log-probs from {owner}'s own logits and from fastdpop differ by {difference:.3g}, "
            f"expected at most {tolerance:.3g}: it does something to its logits that fastdpop.attach does not see"
        )


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, with every module's mode and the random state restored at the end."""
    modes = {module: module.training for module in model.modules()}
    accelerators = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(accelerators, device_type=kind):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
