"""Patching TRL's own classes, and undoing it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import trl
from torch import nn
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from fastdpop.choices import EngineName
from fastdpop.integrations.trl import cpo, metrics, online, references, told, values
from fastdpop.integrations.trl.config import ADDED, FastDPOConfig, check
from fastdpop.integrations.trl.models import (
    AttachedWhenSet,
    Settings,
    checked_settings,
    on_fastdpop,
    take_for_cpo,
    take_for_online,
)
from fastdpop.integrations.trl.order import by_prompt, without_padding_warning
from fastdpop.integrations.trl.step import Inputs, precomputed, step
from fastdpop.integrations.trl.version import check_version

_settings = Settings()
_undo: list[Callable[[], None]] = []
_patched: list[type] = []
_running: list[tuple[Any, str]] = []
"""Trainers of patched classes that are at work, each with the name of the method."""


def patch_trl(
    *,
    engine: EngineName = "auto",
    workspace_bytes: int | None = None,
    share_prefixes: bool = False,
    global_batch: bool = False,
) -> None:
    """Let TRL's ``DPOTrainer`` compute its losses with fastdpop, and ``DPOConfig`` know DPOP.

    Afterwards ``DPOConfig`` takes ``loss_type="dpop"``, alone or in a list, and ``dpop_lambda`` (the paper's 50), also
    from the command line; every trainer made from then on, of a subclass too, computes its log-probs and losses without
    logits. A trainer that exists already is left alone, also while it trains. The experimental ``CPOTrainer`` and
    ``OnlineDPOTrainer`` are patched too, if their modules have been imported. Patching again changes the settings for
    trainers made later. The patch, and each trainer that it serves, say so in one line: at level INFO of the logger
    "fastdpop", and on stderr where no logging is set up.

    Args:
        engine, workspace_bytes: as in :func:`fastdpop.attach`.
        share_prefixes: as in :func:`fastdpop.attach`, for trainers whose arguments do not say it themselves
            (``DPOConfig(share_prefixes=...)``); pairs of one prompt are then trained on side by side.
        global_batch: as in :class:`FastDPOConfig`, for trainers whose arguments do not say it themselves
            (``DPOConfig(global_batch=...)``); of ``DPOTrainer`` and its subclasses.

    Raises:
        ImportError: TRL is not installed, or of a version that is not served.
        RuntimeError: a trainer of a patched class is running.
        ValueError, TypeError: there is no such engine, the workspace is not a positive int, or `share_prefixes` or
            `global_batch` is neither True nor False.
    """
    global _settings
    settings = checked_settings(
        engine, workspace_bytes, share_prefixes=share_prefixes, global_batch=global_batch
    )
    check_version(trl.__version__)
    _refuse_while_running("patch_trl")
    _settings = settings
    for kind, patch in _classes():
        if kind not in _patched:
            done = len(_undo)
            try:
                _mark_new_trainers(kind)
                _note_running_trainers(kind)
                patch(kind)
            except BaseException:
                while len(_undo) > done:
                    _undo.pop()()
                raise
            _patched.append(kind)
    told.of_patch(_patched)


def unpatch_trl() -> None:
    """Undo :func:`patch_trl` exactly. Without a patch, nothing happens.

    A trainer made under the patch computes as TRL does from then on. A model that a trainer attached stays attached,
    which changes nothing for calls without fastdpop's arguments.

    Raises:
        RuntimeError: a trainer of a patched class is running.
    """
    _refuse_while_running("unpatch_trl")
    while _undo:
        _undo.pop()()
    _patched.clear()


def _classes() -> Iterator[tuple[Any, Callable[[Any], None]]]:
    """What there is to patch. To import the experimental trainers would show their warning to those who use none."""
    yield DPOTrainer, _patch_dpo
    for module, name, patch in (
        ("cpo.cpo_trainer", "CPOTrainer", _patch_cpo),
        ("online_dpo.online_dpo_trainer", "OnlineDPOTrainer", _patch_online),
    ):
        kind = getattr(sys.modules.get(f"trl.experimental.{module}"), name, None)
        if kind is not None:
            yield kind, patch


def _refuse_while_running(function: str) -> None:
    for trainer, method in _running:
        raise RuntimeError(
            f"{function} is called while a {type(trainer).__name__} is running {method}(): "
            "call it before, or after"
        )


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


# ---- what all trainers get ----------------------------------------------------------------------


def _mark_new_trainers(kind: Any) -> None:
    """Only trainers that are made under the patch compute with fastdpop: no other has its models attached."""
    own_init = kind.__init__

    @functools.wraps(own_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own = on_fastdpop(self)  # FastDPOTrainer has its own settings
        vars(self).setdefault("_fastdpop", _settings)
        with without_padding_warning():
            own_init(self, *args, **kwargs)
        if not own:
            told.of_trainer(self)

    _set(kind, "__init__", init)


def _note_running_trainers(kind: Any) -> None:
    """A trainer may not go over from one computation to another between two steps."""
    for name in ("train", "evaluate", "predict"):
        _set(kind, name, _noted(getattr(kind, name), name))


def _noted(own: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(own)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        entry = (self, name)
        _running.append(entry)
        try:
            return own(self, *args, **kwargs)
        finally:
            _running.remove(entry)

    return run


# ---- DPO ----------------------------------------------------------------------------------------


def _patch_dpo(kind: Any) -> None:
    _patch_config()
    own_step = kind._compute_loss
    own_reference = kind.compute_ref_log_probs
    own_precompute = kind._precompute_ref_logps
    own_loop = kind.evaluation_loop
    own_log = kind.log

    @functools.wraps(own_step)
    def compute_loss(self: Any, model: nn.Module, inputs: Inputs, return_outputs: bool) -> Any:
        own = step if on_fastdpop(self) else own_step
        return own(self, model, inputs, return_outputs)

    @functools.wraps(own_reference)
    def reference(self: Any, *model_and_inputs: Any) -> Any:
        own = precomputed if on_fastdpop(self) else own_reference
        return own(self, *model_and_inputs)

    @functools.wraps(own_precompute)
    def precompute(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        own = functools.partial(own_precompute, self)
        if not on_fastdpop(self):
            return own(dataset, name, batch_size)
        return references.with_logps(self, own, dataset, name, batch_size)

    @functools.wraps(own_loop)
    def loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(own_loop, self)
        return (
            metrics.evaluated(self, own, *args, **kwargs)
            if on_fastdpop(self)
            else own(*args, **kwargs)
        )

    @functools.wraps(own_log)
    def log(self: Any, *args: Any, **kwargs: Any) -> None:
        if on_fastdpop(self):
            metrics.fill(self, "train" if self.model.training else "eval")
        own_log(self, *args, **kwargs)

    for name in ("model", "ref_model"):
        _set(kind, name, AttachedWhenSet(name))
    _set(kind, "_compute_loss", compute_loss)
    _set(kind, "compute_ref_log_probs", reference)
    _set(kind, "_precompute_ref_logps", precompute)
    _set(kind, "evaluation_loop", loop)
    _set(kind, "log", log)
    _patch_sampler(kind)
    _patch_data(kind)


def _patch_data(kind: Any) -> None:
    own_prepare = kind._prepare_dataset
    own_columns = kind._set_signature_columns_if_needed

    @functools.wraps(own_prepare)
    def prepare(self: Any, dataset: Any, processing: Any, args: Any, name: str) -> Any:
        if on_fastdpop(self):
            values.check_dataset(dataset, args, name, self._fastdpop.loss)
        return own_prepare(self, dataset, processing, args, name)

    @functools.wraps(own_columns)
    def columns(self: Any) -> None:
        own_columns(self)
        if on_fastdpop(self):
            values.keep_columns(self)

    _set(kind, "data_collator", values.CollatedWithValues("data_collator"))
    _set(kind, "_prepare_dataset", prepare)
    _set(kind, "_set_signature_columns_if_needed", columns)


def _patch_sampler(kind: Any) -> None:
    own_sampler = kind._get_train_sampler

    @functools.wraps(own_sampler)
    def sampler(self: Any, *args: Any) -> Any:
        own = own_sampler(self, *args)
        return by_prompt(self, own, *args) if on_fastdpop(self) else own

    _set(kind, "_get_train_sampler", sampler)


def _patch_config() -> None:
    """Make what FastDPOConfig adds fields of DPOConfig itself, where parsers, serialisers and subclasses look."""
    own_init = DPOConfig.__init__
    signature = inspect.signature(own_init)
    types = get_type_hints(FastDPOConfig)
    new = {f.name: f for f in fields(FastDPOConfig) if f.name in ADDED}

    @functools.wraps(own_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, added in new.items():
            setattr(self, name, kwargs.pop(name, added.default))
        own_init(self, *args, **kwargs)
        check(self)

    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=added.default, annotation=types[name]
        )
        for name, added in new.items()
    ]
    init.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *parameters]
    )
    _set(DPOConfig, "__init__", init)
    for name, added in new.items():
        _set(DPOConfig, name, added.default)
    # Not among the class's own attributes from Python 3.14 on, where they are made when asked for.
    annotations = DPOConfig.__annotations__
    DPOConfig.__annotations__ = {**annotations, **{name: types[name] for name in new}}
    _undo.append(lambda: setattr(DPOConfig, "__annotations__", annotations))
    known = {**vars(DPOConfig)["__dataclass_fields__"], **new}
    _set(DPOConfig, "__dataclass_fields__", known)


# ---- the experimental trainers ------------------------------------------------------------------


def _patch_cpo(kind: Any) -> None:
    own_step = kind.get_batch_loss_metrics

    @functools.wraps(own_step)
    def step(self: Any, model: nn.Module, batch: Inputs, train_eval: str = "train") -> Any:
        own = cpo.step if on_fastdpop(self) else own_step
        return own(self, model, batch, train_eval)

    _set(kind, "model", AttachedWhenSet("model", take_for_cpo))
    _set(kind, "get_batch_loss_metrics", step)
    _patch_sampler(kind)


def _patch_online(kind: Any) -> None:
    own_forward = kind._forward

    @functools.wraps(own_forward)
    def forward(self: Any, model: nn.Module, *batch: Any, vision_inputs: Any = None) -> Any:
        *texts, images = batch if len(batch) == 5 else (*batch, vision_inputs)
        logps = None
        if on_fastdpop(self) and images is None:
            logps = online.completion_logps(self, model, *texts)
        return own_forward(self, model, *texts, images) if logps is None else logps

    _set(kind, "model", AttachedWhenSet("model", take_for_online))
    _set(kind, "_forward", forward)
