"""Stops calls that nobody would answer with a preference loss.

Models of transformers take any keyword and leave alone what they do not know. A model whose ``forward`` is no longer
the attached one (Liger's patch replaced it, or the model was pickled) would answer ``preference="dpop"`` with its own
loss, in silence. Hooks on the model and on its trunk turn that into an error. They keep nothing from one call to the
next: what a call asked for is in its arguments, and whether it was answered in its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastdpop.hf import hooks
from fastdpop.hf.forward import attachment_of
from fastdpop.hf.output import PreferenceModelOutput


def add_guards(model: Any) -> None:
    """PEFT calls ``forward`` of the model directly, where hooks of the model do not run: those of the trunk do."""
    hooks.add(model, after=_refuse_unanswered, with_kwargs=True)
    if _trunk(model) is not None:
        hooks.add(_trunk(model), before=_refuse_passed_on, with_kwargs=True)


def remove_guards(model: Any) -> None:
    """Undo :func:`add_guards`, also for a copy of the model."""
    for module in filter(None, (model, _trunk(model))):
        hooks.remove(module, (_refuse_unanswered, _refuse_passed_on))


def guarded(model: nn.Module) -> bool:
    """Whether a model has the guards of one that was attached, and not detached since."""
    return _refuse_unanswered in model._forward_hooks.values()


def _trunk(model: Any) -> Any:
    """The model inside the model, or None."""
    trunk = getattr(model, "base_model", model)
    return None if trunk is model else trunk


def _refuse_unanswered(model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
    name = _ours(kwargs)
    if name is None or isinstance(output, PreferenceModelOutput):
        return
    # A tuple (return_dict=False) does not tell where it comes from.
    if not isinstance(output, tuple) or attachment_of(model) is None:
        raise _unread(name, model)


def _refuse_passed_on(trunk: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    name = _ours(kwargs)
    if name is not None:
        raise _unread(name, trunk)


def _ours(kwargs: Mapping[str, Any]) -> str | None:
    return next((name for name in ("preference", "return_logps") if kwargs.get(name)), None)


def _unread(name: str, module: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"{name} reached {type(module).__name__} unread: forward was replaced after fastdpop.attach, "
        "or the model was pickled. Apply Liger and other patches first, then attach"
    )
