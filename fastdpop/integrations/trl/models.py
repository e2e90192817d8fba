"""The models of a trainer: attached when they are assigned, or refused with what to do instead."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn

from fastdpop import checks, engines
from fastdpop.call import Loss
from fastdpop.choices import EngineName
from fastdpop.hf import attach
from fastdpop.hf.forward import Attachment, attachment_of
from fastdpop.hf.wrappers import wrapped
from fastdpop.integrations.trl import batch, cpo, first_batch, online
from fastdpop.integrations.trl.config import shares_prefixes, takes_global_batch, value_names
from fastdpop.integrations.trl.loss import check_given, check_values, preference
from fastdpop.integrations.trl.process import sharding_asked
from fastdpop.losses import PreferenceLoss, as_loss


@dataclass
class Settings:
    """How a trainer computes. One whose ``_fastdpop`` this is computes with fastdpop.

    Attributes:
        engine, workspace_bytes: as in :func:`fastdpop.attach`.
        loss: in the place of the config's; None: the config's.
        share_prefixes: as in :func:`fastdpop.attach`; until a trainer has its model, if its arguments do not say.
        global_batch: losses are those of all processes' pairs; likewise.
    """

    engine: EngineName = "auto"
    workspace_bytes: int | None = None
    loss: PreferenceLoss | None = None
    share_prefixes: bool = False
    global_batch: bool = False


def checked_settings(
    engine: EngineName,
    workspace_bytes: int | None,
    loss: Loss | None = None,
    share_prefixes: bool = False,
    global_batch: bool = False,
) -> Settings:
    """
    Raises:
        ValueError, TypeError: there is no such engine, the workspace is not a positive int, the loss is none, or
            `share_prefixes` or `global_batch` is neither True nor False.
    """
    own = None if loss is None else as_loss(loss)
    if engine != "auto":
        engines.get(engine)
    checks.workspace(workspace_bytes, engines.DEFAULT_WORKSPACE_BYTES)
    checks.flag("share_prefixes", share_prefixes)
    checks.flag("global_batch", global_batch)
    return Settings(engine, workspace_bytes, own, share_prefixes, global_batch)


def on_fastdpop(trainer: Any) -> bool:
    """Whether a trainer computes with fastdpop: it is a ``FastDPOTrainer``, or was made while TRL was patched."""
    return "_fastdpop" in vars(trainer)


class UnfitModel(RuntimeError):
    """A model that :func:`fastdpop.attach` refuses."""


class Held:
    """A trainer's attribute that a class looks at when it is assigned.

    Reading and the place of the value, the instance, are those of a plain attribute.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        try:
            return vars(trainer)[self.name]
        except KeyError:
            raise AttributeError(
                f"{type(trainer).__name__!r} object has no attribute {self.name!r}"
            ) from None

    def __set__(self, trainer: Any, value: Any) -> None:
        vars(trainer)[self.name] = value

    def __delete__(self, trainer: Any) -> None:
        del vars(trainer)[self.name]


class AttachedWhenSet(Held):
    """A trainer's attribute that holds a model: what is assigned is attached, before accelerate wraps it."""

    def __init__(self, name: str, take: Callable[[Any, Any], None] | None = None) -> None:
        super().__init__(name)
        self.take = take or _take

    def __set__(self, trainer: Any, model: Any) -> None:
        super().__set__(trainer, model)
        # Before there is an accelerator, Trainer holds the model for a moment only, not yet on its device. The model
        # inside a wrapper was a trainer's before.
        if (
            on_fastdpop(trainer)
            and "accelerator" in vars(trainer)
            and isinstance(model, nn.Module)
            and wrapped(model) is None
        ):
            self.take(trainer, model)


def _take(trainer: Any, model: Any) -> None:
    """Attach a model that a trainer was given; refuse what fastdpop cannot train."""
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
    # What does not go together fails before training starts.
    first_batch.wanted()
    if trainer._fastdpop.loss is not None:
        check_given(trainer._fastdpop.loss, trainer.args)
    check_values(preference(trainer), value_names(trainer.args))
    wide = takes_global_batch(trainer.args, trainer._fastdpop.global_batch)
    trainer._fastdpop = replace(trainer._fastdpop, global_batch=wide)
    batch.check(trainer)
    _attach(trainer, model)


class ToldOtherwise(ValueError):
    """A model that its owner attached in one way, and a trainer that was told another."""


@contextlib.contextmanager
def _left_to_trl() -> Iterator[None]:
    """What fastdpop cannot train is no error."""
    try:
        yield
    except ToldOtherwise:
        raise
    except (RuntimeError, TypeError, ValueError):
        pass


def take_for_cpo(trainer: Any, model: Any) -> None:
    """The same for CPO; what fastdpop cannot train is left to TRL."""
    if cpo.serves(trainer):
        with _left_to_trl():
            _check_devices(trainer)
            _attach(trainer, model)
            return
    del trainer._fastdpop


def take_for_online(trainer: Any, model: Any) -> None:
    """The same for online DPO, whose reference is there already, and not yet wrapped."""
    if online.serves(trainer):
        with _left_to_trl():
            _check_devices(trainer)
            if trainer.ref_model is not None:
                _attach(trainer, trainer.ref_model)
            _attach(trainer, model)
            return
    del trainer._fastdpop


_taken: weakref.WeakKeyDictionary[nn.Module, tuple[Attachment, bool]] = weakref.WeakKeyDictionary()
"""Models that trainers were given: what TRL wraps around their forward hides that they are attached. And whether they
were attached here, not by their owner."""


def _attach(trainer: Any, model: Any) -> None:
    given = trainer._fastdpop
    shares = shares_prefixes(trainer.args, given.share_prefixes)
    settings = trainer._fastdpop = replace(given, share_prefixes=shares)
    inner = model.get_base_model() if is_peft_model(model) else model
    before, here = _taken.get(inner, (None, False))
    # The second: hidden, and not detached since.
    found = attachment_of(inner) or (before if "forward" in vars(inner) else None)
    if found is None:
        head = model.get_output_embeddings()
        whole = not (trainer.is_fsdp_enabled or head is None or head.weight.is_meta)
        try:
            attach(
                model,
                engine=settings.engine,
                workspace_bytes=settings.workspace_bytes,
                share_prefixes=shares,
                check=whole,
            )
        except (RuntimeError, TypeError) as error:
            raise UnfitModel(
                f"{error}. To train this model without fastdpop, use trl.DPOTrainer after fastdpop.unpatch_trl()"
            ) from error
        found, here = attachment_of(inner), True
        assert found is not None
    elif found is before and here:
        # The latest trainer's.
        found.settings.update(
            engine=settings.engine, workspace_bytes=settings.workspace_bytes, share_prefixes=shares
        )
    else:
        here = False  # its owner's, who decides
        _follow(trainer, found.settings["share_prefixes"])
    _taken[inner] = found, here


def _follow(trainer: Any, shares: bool) -> None:
    """Order data, and have a reference computed, as its owner's model computes.

    Raises:
        ToldOtherwise: the trainer was.
    """
    asked = trainer._fastdpop.share_prefixes or getattr(trainer.args, "share_prefixes", None)
    if asked not in (None, shares):
        raise ToldOtherwise(
            f"share_prefixes is {asked}, expected {shares}, as the model was attached: let the trainer attach it, or "
            f"call fastdpop.attach(model, share_prefixes={asked})"
        )
    trainer._fastdpop = replace(trainer._fastdpop, share_prefixes=shares)


def _check_devices(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process would be served by DataParallel, expected one process per GPU: "
            "start with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    asked = "FSDP" if trainer.args.fsdp else sharding_asked()
    if asked and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        found = trainer.accelerator.distributed_type.value
        raise ValueError(
            f"{asked} is asked for, and accelerate chose {found}, in which each process has a copy of the model: it "
            "shards over GPUs alone. On CPUs `fastdpop train` and `fastdpop trl dpo` do, without --use_cpu"
        )
    layout = getattr(trainer.accelerator, "parallelism_config", None)
    split = getattr(layout, "tp_size", None) or 1
    if split > 1 and trainer.args.precompute_ref_log_probs:
        raise ValueError(
            f"tp_size is {split}, expected 1 with a precomputed reference, whose processes share the pairs: "
            "score the reference in every step (fastdpop train --reference online)"
        )
    for name in ("cp", "sp"):
        size = getattr(layout, f"{name}_size", None) or 1
        if size > 1:
            raise ValueError(
                f"{name}_size is {size}, expected 1: a trainer's loss needs whole sequences. In a loop of your own "
                "fused_preference_loss(cp_group=...) takes parts of them"
            )
