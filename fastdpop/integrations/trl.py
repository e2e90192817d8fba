"""TRL's ``DPOTrainer`` on fastdpop's loss: DPOP, and every loss that TRL has, without logits.

    fastdpop.patch_trl()
    trainer = DPOTrainer(model, args=DPOConfig(loss_type="dpop", dpop_lambda=50.0, beta=0.3), ...)

or :class:`FastDPOTrainer`, which changes nothing outside itself. What TRL's trainer does around the loss stays TRL's:
data, references, logging, checkpoints. Its step is replaced: the reference's log-probs first, then one call of the
attached model (:mod:`fastdpop.hook`), so that the loss is computed inside ``model.forward``, where DDP, FSDP and
accelerate expect it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import re
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop import checks, engines, losses
from fastdpop.api import LOGGED
from fastdpop.losses.base import PreferenceLoss

OLDEST, NEWEST = (0, 29), (1, 16)
"""The versions of TRL, by their first two numbers, that this module serves."""


def check_version(version: str) -> None:
    """
    Raises:
        ImportError: this version of TRL is not served.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    if not OLDEST <= release <= NEWEST:
        oldest, newest, next_one = "0.29", "1.16", "1.17"
        raise ImportError(
            f"trl is {version}, expected {oldest} to {newest}: pip install 'trl>={oldest},<{next_one}', "
            "or call fastdpop.attach in a loop of your own"
        )


try:
    import trl
except ImportError as error:
    raise ImportError(
        "fastdpop's TRL integration needs trl: pip install 'fastdpop[trl]'"
    ) from error
check_version(trl.__version__)

from accelerate.utils import is_peft_model  # noqa: E402
from datasets import Dataset  # noqa: E402
from datasets.fingerprint import Hasher  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer.dpo_config import DPOConfig  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.utils import use_adapter  # noqa: E402

from fastdpop.hook import attach, is_attached  # noqa: E402
from fastdpop.integrations import trl_cpo, trl_online  # noqa: E402

Inputs = Mapping[str, Any]

DEFAULT_LAMBDA = losses.DPOP().lam
_HELP = (
    "DPOP's lambda (loss_type 'dpop'): the weight of its penalty, inside beta. The paper takes 50."
)


@dataclass
class FastDPOConfig(DPOConfig):
    """TRL's ``DPOConfig`` with DPOP's lambda.

    Attributes:
        dpop_lambda: weight of the penalty in ``loss_type="dpop"``, 0 or above; its beta is ``beta``.

    Raises:
        ValueError, TypeError: `dpop_lambda` is not a finite number, 0 or above.
    """

    dpop_lambda: float = field(default=DEFAULT_LAMBDA, metadata={"help": _HELP})

    def __post_init__(self) -> None:
        _check_lambda(self.dpop_lambda)
        super().__post_init__()


class _AttachedWhenSet:
    """A trainer's attribute that holds a model: what is assigned is attached, before accelerate wraps it.

    Reading and the place of the value, the instance, are those of a plain attribute.
    """

    def __init__(self, name: str, take: Callable[[Any, Any], None] | None = None) -> None:
        self.name = name
        self.take = take

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        try:
            return vars(trainer)[self.name]
        except KeyError:
            raise AttributeError(
                f"{type(trainer).__name__!r} object has no attribute {self.name!r}"
            ) from None

    def __set__(self, trainer: Any, model: Any) -> None:
        vars(trainer)[self.name] = model
        # Before there is an accelerator, Trainer holds the model for a moment only, not yet on its device.
        if "accelerator" in vars(trainer) and isinstance(model, nn.Module):
            (self.take or _take)(trainer, model)

    def __delete__(self, trainer: Any) -> None:
        del vars(trainer)[self.name]


class FastDPOTrainer(DPOTrainer):
    """TRL's ``DPOTrainer`` whose step is fastdpop's. It takes the same arguments, and

    Args:
        engine, workspace_bytes: as in :func:`fastdpop.attach`.

    ``args`` may be a ``DPOConfig`` or a :class:`FastDPOConfig`. Everything that ``DPOTrainer`` logs is logged, and
    ``penalty``, DPOP's hinge in nats.

    Raises:
        ValueError: the data are images, the loss types are not known or do not go together, or a setting asks for
            another implementation of the loss.
        RuntimeError: the model has no output embedding that can be read, as when it is quantised.
    """

    model = _AttachedWhenSet("model")
    ref_model = _AttachedWhenSet("ref_model")

    def __init__(
        self, *args: Any, engine: str = "auto", workspace_bytes: int | None = None, **kwargs: Any
    ) -> None:
        self._fastdpop = _settings(engine, workspace_bytes)
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: Inputs, return_outputs: bool) -> Any:
        return _step(self, model, inputs, return_outputs)

    def compute_ref_log_probs(self, *model_and_inputs: Any) -> tuple[Tensor, Tensor]:
        return _precomputed(self, *model_and_inputs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return super()._precompute_ref_logps(_with_own_cache(self, dataset), name, batch_size)


# ---- the loss -----------------------------------------------------------------------------------

_SHARED = ("beta", "divergence", "alpha")
_TAKES: dict[str, tuple[str, ...]] = {
    "dpop": ("beta", "lam", "label_smoothing"),
    "sigmoid": _SHARED,
    "sigmoid_norm": _SHARED,
    "hinge": _SHARED,
    "ipo": _SHARED,
    "exo_pair": (*_SHARED, "label_smoothing"),
    "robust": (*_SHARED, "label_smoothing"),
    "discopop": (*_SHARED, "tau"),
    "nca_pair": ("beta",),
    "bco_pair": ("beta",),
    "sppo_hard": ("beta",),
    "apo_zero": ("beta",),
    "apo_down": ("beta",),
    "aot": ("beta", "label_smoothing"),
    "aot_unpaired": ("beta", "label_smoothing"),
    "sft": (),
}
"""The losses of TRL and DPOP, under TRL's names, and the options that each of them reads there."""
LOSS_TYPES = tuple(_TAKES)

_DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}


def preference(trainer: Any) -> PreferenceLoss:
    """The loss that a ``DPOTrainer``'s settings ask for, as fastdpop's.

    Raises:
        ValueError: a loss type or divergence is not known, or some of the settings do not go together.
    """
    divergence = str(trainer.f_divergence_type)
    checks.choice("f_divergence_type", divergence, tuple(_DIVERGENCES))
    plain = divergence == "reverse_kl"
    alpha = trainer.f_alpha_divergence_coef if divergence == "alpha_divergence" else None
    options = {
        "beta": trainer.beta,
        "lam": getattr(trainer.args, "dpop_lambda", DEFAULT_LAMBDA),
        "label_smoothing": trainer.label_smoothing,
        "tau": trainer.args.discopop_tau,
        "divergence": _DIVERGENCES[divergence],
        "alpha": alpha,
    }
    terms = []
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        checks.choice("loss_type", name, tuple(_TAKES))
        if not plain and name != "sft" and "divergence" not in _TAKES[name]:
            raise ValueError(
                f"f_divergence_type is {divergence!r}, expected 'reverse_kl' with loss_type {name!r}: "
                "it is no function of the difference of two scores"
            )
        terms.append(weight * losses.get(name, **{o: options[o] for o in _TAKES[name]}))
    loss = functools.reduce(lambda total, term: total + term, terms)
    if trainer.use_weighting:
        loss = losses.wpo_weighted(loss)
    if trainer.ld_alpha is None:
        return loss
    if "sft" in trainer.loss_types:
        raise ValueError(
            f"ld_alpha is {trainer.ld_alpha}, expected None with loss_type 'sft', which TRL computes from whole "
            "completions: train with one of the two, or without fastdpop (fastdpop.unpatch_trl())"
        )
    return losses.length_desensitised(loss, trainer.ld_alpha)


# ---- the step -----------------------------------------------------------------------------------

_NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
_IMAGES = ("pixel", "image", "video")


def _step(trainer: Any, model: nn.Module, inputs: Inputs, return_outputs: bool) -> Any:
    """``DPOTrainer._compute_loss``: the loss, with metrics noted in the trainer."""
    call, labels = _call(trainer, inputs)
    # Before the policy's pass: where a pair's loss is known at once, a trained head costs 6 units instead of 8.
    if trainer.precompute_ref_logps:
        ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    else:
        ref_logps = _reference(trainer, trainer.ref_model, call, labels)
    routes = bool(getattr(trainer, "aux_loss_enabled", False))
    outputs = model(
        **call,
        **({"output_router_logits": True} if routes else {}),
        labels=labels,
        preference=preference(trainer),
        ref_logps=ref_logps,
        preference_options={"statistics": LOGGED},
        router_loss_weight=float(trainer.router_aux_loss_coef) if routes else 0.0,
    )
    loss = outputs.loss
    with torch.no_grad():
        _log(trainer, inputs, outputs, ref_logps, routes)
        if return_outputs:  # the logits, of another pass, for those who ask for them
            outputs = model(**call)
    return (loss, outputs) if return_outputs else loss


def _call(trainer: Any, inputs: Inputs) -> tuple[dict[str, Any], Tensor]:
    """The model's arguments and labels, -100 outside completions."""
    for name in inputs:
        if name.startswith(_IMAGES):
            raise ValueError(
                f"the batch contains {name!r}, expected text only: train on images without fastdpop "
                "(trl.DPOTrainer, after fastdpop.unpatch_trl())"
            )
    call = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
    completion_mask = inputs["completion_mask"]
    if hasattr(trainer, "_truncate_inputs"):  # TRL 0.29: not yet the collator's work
        names = ("input_ids", "attention_mask")
        *kept, completion_mask = trainer._truncate_inputs(
            *(call[name] for name in names), completion_mask
        )
        call |= zip(names, kept, strict=True)
    return call | {"use_cache": False}, call["input_ids"].masked_fill(completion_mask == 0, -100)


def _reference(
    trainer: Any, model: nn.Module | None, call: dict[str, Any], labels: Tensor
) -> Tensor:
    """The reference's log-probs, ``(2B,)``: of the adapter "ref", of no adapter, or of `model`."""
    adapter: Any = contextlib.nullcontext()
    if trainer.ref_model is None and is_peft_model(trainer.model):
        policy = trainer.accelerator.unwrap_model(trainer.model)
        adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        model = model or trainer.model
    assert model is not None  # TRL keeps one where there is no adapter
    weighed = None if trainer.ld_alpha is None else {"ld_alpha": trainer.ld_alpha}
    checkpointing = disable_gradient_checkpointing(
        trainer.model, trainer.args.gradient_checkpointing_kwargs
    )
    with torch.no_grad(), checkpointing, adapter, trainer.accelerator.autocast():
        outputs = model(**call, labels=labels, return_logps=True, preference_options=weighed)
    return outputs.logps


def _precomputed(trainer: Any, *model_and_inputs: Any) -> tuple[Tensor, Tensor]:
    """``DPOTrainer.compute_ref_log_probs``, which takes the model too since TRL 1.9."""
    *model, inputs = model_and_inputs
    given = model[0] if model else trainer.ref_model or trainer.model
    chosen, rejected = _reference(trainer, given, *_call(trainer, inputs)).chunk(2)
    return chosen, rejected


def _with_own_cache(trainer: Any, dataset: Any) -> Any:
    """The data set under a fingerprint by which TRL does not find log-probs cached by another computation."""
    if isinstance(dataset, Dataset):
        args = trainer.args
        same = (args.max_length, args.truncation_mode, args.ld_alpha, args.bf16, args.fp16)
        dataset = copy.copy(dataset)
        dataset._fingerprint = Hasher.hash((dataset._fingerprint, "fastdpop", same))
    return dataset


def _log(trainer: Any, inputs: Inputs, outputs: Any, ref_logps: Tensor, routes: bool) -> None:
    """Everything that TRL logs, by its definitions, and the penalty."""
    mode = "train" if trainer.model.training else "eval"
    metrics = trainer._metrics[mode]
    lengths = outputs.lengths.to(outputs.entropy.dtype)
    halves = {
        name: (value * lengths).view(2, -1).sum(1)
        for name, value in {
            "entropy": outputs.entropy,
            "logits": outputs.mean_logits,
            "correct": outputs.token_accuracy,
            "tokens": torch.ones_like(lengths),
        }.items()
    }
    ref_chosen, ref_rejected = ref_logps.to(outputs.chosen_logps).chunk(2)
    chosen_rewards = trainer.beta * (outputs.chosen_logps - ref_chosen)
    rejected_rewards = trainer.beta * (outputs.rejected_logps - ref_rejected)
    by_pair = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": outputs.chosen_logps,
        "logps/rejected": outputs.rejected_logps,
        "penalty": outputs.penalty,
    }
    if routes:
        by_pair["aux_loss"] = outputs.aux_loss.to(chosen_rewards).expand_as(chosen_rewards)

    # Two exchanges between processes, whatever the number of metrics.
    gather = trainer.accelerator.gather
    sums = torch.stack([*halves.values(), inputs["attention_mask"].sum().to(lengths).expand(2)])
    totals = dict(zip([*halves, "seen"], gather(sums[None]).sum(0).tolist(), strict=True))
    means = gather(torch.stack(list(by_pair.values()), dim=1)).mean(0).tolist()

    def mean(total: float, count: float) -> float:
        return total / count if count > 0 else 0.0

    (chosen_tokens, rejected_tokens), logits = totals["tokens"], totals["logits"]
    if mode == "train":
        trainer._total_train_tokens += int(totals["seen"][0]) // getattr(trainer, "_tp_size", 1)
    metrics["num_tokens"] = [trainer._total_train_tokens]
    for name, value in {
        "entropy": mean(sum(totals["entropy"]), chosen_tokens + rejected_tokens),
        "logits/chosen": mean(logits[0], chosen_tokens),
        "logits/rejected": mean(logits[1], rejected_tokens),
        "mean_token_accuracy": mean(totals["correct"][0], chosen_tokens),
        **dict(zip(by_pair, means, strict=True)),
    }.items():
        metrics[name].append(value)


# ---- the trainer's models -----------------------------------------------------------------------

_taken: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that were attached here: what TRL wraps around their forward hides that from `is_attached`."""


@dataclass
class _Settings:
    """How models are attached."""

    engine: str = "auto"
    workspace_bytes: int | None = None


def _settings(engine: str, workspace_bytes: int | None) -> _Settings:
    if engine != "auto":
        engines.get(engine)
    checks.workspace(workspace_bytes, engines.DEFAULT_WORKSPACE_BYTES)
    return _Settings(engine, workspace_bytes)


def _take(trainer: Any, model: Any) -> None:
    """Attach a model that a trainer was given; refuse what fastdpop cannot train."""
    if not _is_wrapper(model):
        _check(trainer)
        _attach(trainer, model)


def _take_for_cpo(trainer: Any, model: Any) -> None:
    """The same for CPO; what fastdpop cannot train is left to TRL."""
    if not _is_wrapper(model) and trl_cpo.serves(trainer):
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            _check_devices(trainer)
            _attach(trainer, model)


def _take_for_online(trainer: Any, model: Any) -> None:
    """The same for online DPO, whose reference is there already, and not yet wrapped."""
    if not _is_wrapper(model) and trl_online.serves(trainer):
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            _check_devices(trainer)
            if trainer.ref_model is not None:
                _attach(trainer, trainer.ref_model)
            _attach(trainer, model)
            return
        vars(trainer).pop("_fastdpop", None)


def _attach(trainer: Any, model: Any) -> None:
    settings = vars(trainer).get("_fastdpop", _patched_settings)
    inner = model.get_base_model() if is_peft_model(model) else model
    # The second condition: not detached since.
    if not is_attached(model) and not (inner in _taken and "forward" in vars(inner)):
        head = model.get_output_embeddings()
        whole = not (trainer.is_fsdp_enabled or head is None or head.weight.is_meta)
        try:
            attach(
                model,
                engine=settings.engine,
                workspace_bytes=settings.workspace_bytes,
                check=whole,
            )
        except (RuntimeError, TypeError) as error:
            raise type(error)(
                f"{error}. To train this model without fastdpop, use trl.DPOTrainer after fastdpop.unpatch_trl()"
            ) from error
    _taken.add(inner)
    vars(trainer)["_fastdpop"] = settings


def _is_wrapper(model: Any) -> bool:
    """Of DDP or an engine: the model inside was a trainer's before."""
    return isinstance(getattr(model, "module", None), nn.Module)


def _check(trainer: Any) -> None:
    if trainer._is_vision_dataset:
        raise ValueError(
            "train_dataset holds images, expected text only: train on images without fastdpop "
            "(trl.DPOTrainer, after fastdpop.unpatch_trl())"
        )
    if getattr(trainer, "use_liger_kernel", False):
        raise ValueError(
            "use_liger_kernel is True, expected False: before TRL 1.15 it replaces the loss that fastdpop computes"
        )
    _check_devices(trainer)
    preference(trainer)  # what does not go together fails before training starts


def _check_devices(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process would be served by DataParallel, expected one process a GPU: "
            "start with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "zero_stage is 3, expected 1 or 2: ZeRO-3 takes the head's weight away before the loss has read it. "
            "FSDP with the head in the root group also works"
        )


# ---- patching -----------------------------------------------------------------------------------

_patched_settings = _Settings()
_undo: list[Callable[[], None]] = []
_patched: list[type] = []
"""Classes of trainers that are patched, DPOTrainer and its subclasses apart."""


def patch_trl(*, engine: str = "auto", workspace_bytes: int | None = None) -> None:
    """Let TRL's ``DPOTrainer`` compute its losses with fastdpop, and ``DPOConfig`` know DPOP.

    Afterwards ``DPOConfig`` takes ``loss_type="dpop"``, alone or in a list, and ``dpop_lambda`` (50), also from the
    command line; every trainer made from then on, of a subclass too, computes its log-probs and losses without logits.
    A trainer that exists already is left alone. The experimental ``CPOTrainer`` and ``OnlineDPOTrainer`` are patched
    too, if their modules have been imported. Patching again changes the settings for trainers made later.

    Args:
        engine, workspace_bytes: as in :func:`fastdpop.attach`.

    Raises:
        ImportError: TRL is not installed, or of a version that is not served.
        RuntimeError: one of its trainers is running.
        ValueError, TypeError: there is no such engine, or the workspace is not a positive int.
    """
    global _patched_settings
    settings = _settings(engine, workspace_bytes)
    check_version(trl.__version__)
    _refuse_while_running("patch_trl")
    _patched_settings = settings
    if not _undo:
        _patch_config()
        _patch_trainer()
    # Importing them here would show a warning to those who do not use them.
    for module, name, patch in (
        ("cpo.cpo_trainer", "CPOTrainer", _patch_cpo),
        ("online_dpo.online_dpo_trainer", "OnlineDPOTrainer", _patch_online),
    ):
        kind = getattr(sys.modules.get(f"trl.experimental.{module}"), name, None)
        if kind is not None and kind not in _patched:
            _patched.append(kind)
            patch(kind)


def unpatch_trl() -> None:
    """Undo :func:`patch_trl` exactly. Without a patch, nothing happens.

    A model that a trainer attached stays attached, which changes nothing for calls without fastdpop's arguments.

    Raises:
        RuntimeError: a trainer is running.
    """
    if _undo:
        _refuse_while_running("unpatch_trl")
    while _undo:
        _undo.pop()()
    _patched.clear()


def _refuse_while_running(function: str) -> None:
    """The stacks of all threads tell which trainer is at work."""
    for frame in sys._current_frames().values():
        at: Any = frame
        while at is not None:
            if at.f_code.co_name in ("train", "evaluate", "predict"):
                trainer = at.f_locals.get("self")
                if isinstance(trainer, (DPOTrainer, *_patched)):
                    raise RuntimeError(
                        f"{function} is called while a {type(trainer).__name__} is running {at.f_code.co_name}(): "
                        "call it before, or after"
                    )
            at = at.f_back


def _set(owner: type, name: str, value: Any) -> None:
    """Set an attribute of a class, to be undone."""
    before = vars(owner).get(name, MISSING)
    setattr(owner, name, value)

    def undo() -> None:
        if before is MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    _undo.append(undo)


def _patch_config() -> None:
    """Make `dpop_lambda` a field of DPOConfig itself, where parsers, serialisers and subclasses look for fields."""
    own_init = DPOConfig.__init__
    signature = inspect.signature(own_init)
    (new,) = (f for f in fields(FastDPOConfig) if f.name == "dpop_lambda")

    @functools.wraps(own_init)
    def init(self: Any, *args: Any, dpop_lambda: float = DEFAULT_LAMBDA, **kwargs: Any) -> None:
        _check_lambda(dpop_lambda)
        self.dpop_lambda = dpop_lambda
        own_init(self, *args, **kwargs)

    parameter = inspect.Parameter(
        new.name, inspect.Parameter.KEYWORD_ONLY, default=new.default, annotation=float
    )
    init.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), parameter]
    )
    _set(DPOConfig, "__init__", init)
    _set(DPOConfig, "dpop_lambda", new.default)
    _set(DPOConfig, "__annotations__", {**vars(DPOConfig)["__annotations__"], new.name: float})
    known = {**vars(DPOConfig)["__dataclass_fields__"], new.name: new}
    _set(DPOConfig, "__dataclass_fields__", known)


def _patch_trainer() -> None:
    own_step = DPOTrainer._compute_loss
    own_reference = DPOTrainer.compute_ref_log_probs
    own_precompute = DPOTrainer._precompute_ref_logps

    # A trainer made before the patch has models that are not attached.
    @functools.wraps(own_step)
    def step(self: Any, model: nn.Module, inputs: Inputs, return_outputs: bool) -> Any:
        own = _step if "_fastdpop" in vars(self) else own_step
        return own(self, model, inputs, return_outputs)

    @functools.wraps(own_reference)
    def reference(self: Any, *model_and_inputs: Any) -> Any:
        own = _precomputed if "_fastdpop" in vars(self) else own_reference
        return own(self, *model_and_inputs)

    @functools.wraps(own_precompute)
    def precompute(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        if "_fastdpop" in vars(self):
            dataset = _with_own_cache(self, dataset)
        return own_precompute(self, dataset, name, batch_size)

    for name in ("model", "ref_model"):
        _set(DPOTrainer, name, _AttachedWhenSet(name))
    _set(DPOTrainer, "_compute_loss", step)
    _set(DPOTrainer, "compute_ref_log_probs", reference)
    _set(DPOTrainer, "_precompute_ref_logps", precompute)


def _patch_cpo(kind: Any) -> None:
    own_step = kind.get_batch_loss_metrics

    @functools.wraps(own_step)
    def step(self: Any, model: nn.Module, batch: Inputs, train_eval: str = "train") -> Any:
        own = trl_cpo.step if "_fastdpop" in vars(self) else own_step
        return own(self, model, batch, train_eval)

    _set(kind, "model", _AttachedWhenSet("model", _take_for_cpo))
    _set(kind, "get_batch_loss_metrics", step)


def _patch_online(kind: Any) -> None:
    own_forward = kind._forward

    @functools.wraps(own_forward)
    def forward(self: Any, model: nn.Module, *batch: Any, vision_inputs: Any = None) -> Any:
        *texts, images = batch if len(batch) == 5 else (*batch, vision_inputs)
        logps = None
        if "_fastdpop" in vars(self) and images is None:
            logps = trl_online.completion_logps(self, model, *texts)
        return own_forward(self, model, *texts, images) if logps is None else logps

    _set(kind, "model", _AttachedWhenSet("model", _take_for_online))
    _set(kind, "_forward", forward)


def _check_lambda(value: Any) -> None:
    message = f"dpop_lambda is {value!r}, expected a finite number >= 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message)
    if not math.isfinite(value) or value < 0:
        raise ValueError(message)
