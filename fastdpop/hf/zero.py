"""Models whose parameters DeepSpeed's ZeRO-3 has spread over processes.

A partitioned parameter has no elements. DeepSpeed's hooks gather it around the forward of its own module, gather it
again before that module's backward, and partition it after each. A loss that is computed elsewhere finds nothing, or
has its gradient lost. So the loss is computed inside the forward of the head:

1. While an attached model runs, the head's parameters are stand-ins (:class:`Partitioned`) that have a shape only, and
   DeepSpeed's hooks leave the head alone: lazy logits need no weight. What is done to a stand-in is noted down.
2. :func:`with_whole_head` calls the head once more, with the fused function in the place of its ``forward`` and with
   no hooks but DeepSpeed's. The weight is gathered here, once a forward, and its gradient reduced as any other.

DeepSpeed is never imported unless a parameter is DeepSpeed's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_METADATA = {"shape", "size", "dim", "ndim", "numel", "__len__", "dtype", "device", "layout"}
_METADATA |= {"is_cuda", "is_meta", "is_floating_point", "requires_grad", "__repr__"}


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a parameter as it is when it is not partitioned."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


class Partitioned(Tensor):
    """Stands for a partitioned parameter of a head, or for what a head makes of one; it has a shape and a dtype.

    Attributes:
        read: gives the tensor itself, where its modules have gathered it.
        owners: the modules in whose forward it can be read, by name.
    """

    read: Callable[[], Tensor]
    owners: dict[str, _Owner]

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        device: torch.device,
        read: Callable[[], Tensor],
        owners: dict[str, _Owner],
    ) -> Partitioned:
        return Tensor._make_wrapper_subclass(
            cls, whole_shape(like), dtype=like.dtype, device=device
        )

    def __init__(
        self,
        like: Tensor,
        device: torch.device,
        read: Callable[[], Tensor],
        owners: dict[str, _Owner],
    ) -> None:
        self.read, self.owners = read, owners

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Partitioned(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, Tensor) and kind not in _KNOWN for kind in types):
            return NotImplemented  # lazy logits know what to do
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "an attribute")
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Partitioned)]
        owners = {name: owner for leaf in inputs for name, owner in leaf.owners.items()}
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or name.startswith(("__i", "__set")):
            raise _refusal(name, owners)
        try:
            like = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        except Exception as error:  # it needs the values
            raise _refusal(name, owners) from error
        if not isinstance(like, Tensor):
            raise _refusal(name, owners)

        def read() -> Tensor:
            result: Tensor = func(*tree_map(_read, args), **tree_map(_read, kwargs))
            return result

        return Partitioned(like, inputs[0].device, read, owners)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        raise _refusal(str(func), next(x for x in leaves if isinstance(x, Partitioned)).owners)


_KNOWN = (Tensor, nn.Parameter, Partitioned)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Partitioned):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value.to("meta") if isinstance(value, Tensor) else value


def _read(value: Any) -> Any:
    return value.read() if isinstance(value, Partitioned) else value


def _refusal(operation: str, owners: Mapping[str, _Owner]) -> RuntimeError:
    return RuntimeError(
        f"the output head applies {operation} to its weight ({', '.join(owners)}), which ZeRO-3 has partitioned: "
        "fastdpop can follow what gives a new tensor without reading the values. Train with ZeRO-2 instead"
    )


class PartitionedHead:
    """A context in which a model's head, if ZeRO-3 has partitioned it, has stand-ins for parameters and is not gathered.

    It does nothing for any other head.

    Raises:
        RuntimeError: a module of the head has a parameter that is none of the vocabulary, besides its weight.
    """

    @torch.compiler.disable
    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings()
        self._modules = [] if head is None else _partitioned_modules(head, type(model).__name__)
        self._changes = contextlib.ExitStack()

    @torch.compiler.disable
    def __enter__(self) -> None:
        for name, module, parameters in self._modules:
            hooks = {kind: getattr(module, kind) for kind in _HOOKS}
            owner = {name: _Owner(module, {kind: _only(hooks[kind], True) for kind in _HOOKS})}
            values: dict[str, Any] = {kind: _only(hooks[kind], False) for kind in _HOOKS}
            for key, parameter in parameters.items():
                read = functools.partial(_gathered, f"{key} of {name}", parameter)
                values[key] = Partitioned(parameter, parameter.device, read, owner)
            self._changes.enter_context(_attributes(module, values))

    @torch.compiler.disable
    def __exit__(self, *error: object) -> None:
        self._changes.close()


@dataclass(frozen=True)
class _Owner:
    """A module that has partitioned parameters, and those of its hooks that gather them."""

    module: nn.Module
    hooks: dict[str, Any]

    def call(self, function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """``function(hidden)`` as the module's forward, and no hooks but those."""
        with _attributes(self.module, {"forward": function, **self.hooks}):
            # DeepSpeed's hooks of backward stand on what goes in by position and on what comes out.
            result: Tensor = self.module(hidden)
            return result


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def _only(hooks: Any, gathering: bool) -> Any:
    """Of the hooks those that gather or partition parameters, or all others."""
    return type(hooks)((key, hook) for key, hook in hooks.items() if _gathers(hook) is gathering)


def _gathers(hook: Any) -> bool:
    module = getattr(hook, "__module__", None) or ""
    return module == __name__ or module.split(".")[0] == "deepspeed"


@contextlib.contextmanager
def _attributes(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Give a module attributes of its own, which come before its parameters and its class's."""
    own = vars(module)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)


def _partitioned_modules(
    head: nn.Module, owner: str
) -> list[tuple[str, nn.Module, dict[str, Tensor]]]:
    """The modules of a head that lazy logits go through, with their parameters; none unless ZeRO-3 partitions them.

    Layers of an adapter that do not map onto the vocabulary, and have parameters, compute as ever.
    """
    # In a forward, DeepSpeed gathers what is read by any other way.
    found = [
        (name, module, {key: p for key, p in module._parameters.items() if p is not None})
        for name, module in head.named_modules(prefix=f"the head of {owner}")
    ]
    weight = next((own["weight"] for _, _, own in found if "weight" in own), None)
    if weight is None or not hasattr(weight, "ds_id"):
        return []
    vocabulary = whole_shape(weight)[:1]
    chosen = []
    for name, module, own in found:
        other = [key for key, p in own.items() if whole_shape(p)[:1] != vocabulary]
        if len(other) < len(own) and other:
            raise RuntimeError(
                f"{name} has a parameter {other[0]} {tuple(whole_shape(own[other[0]]))} besides its weight, which "
                "fastdpop cannot gather under ZeRO-3: train with ZeRO-2"
            )
        if not other:
            chosen.append((name, module, own))
    return chosen


def _gathered(path: str, parameter: Tensor) -> Tensor:
    if parameter.shape != whole_shape(parameter):
        raise RuntimeError(
            f"{path} is partitioned by ZeRO-3, and nothing gathers it: call the model after deepspeed.initialize, and "
            "let no part of the head be a leaf module of ZeRO-3"
        )
    return parameter


@torch.compiler.disable
def refuse_plain_call(model: Any) -> None:
    """
    Raises:
        RuntimeError: the model's head has stand-ins now.
    """
    modules = model.get_output_embeddings().modules()
    if any(isinstance(value, Partitioned) for m in modules for value in vars(m).values()):
        raise RuntimeError(
            f"{type(model).__name__} is called for its own logits in the middle of a call with preference or "
            "return_logps, which ZeRO-3 does not allow: call it before or after"
        )


def with_whole_head(function: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    """``function(**inputs)``, in the forward of the modules whose parameters `inputs` has stand-ins for.

    Args:
        function: of `hidden` and others; returns a tensor, or a dataclass of which `loss` alone is differentiable.

    Raises:
        RuntimeError: nothing gathers the parameters.
    """
    owners: dict[str, _Owner] = {}
    for value in inputs.values():
        if isinstance(value, Partitioned):
            owners |= value.owners
    if not owners:
        return function(**inputs)
    results: list[Any] = []

    def innermost(hidden: Tensor) -> Tensor:
        whole = {name: _read(value) for name, value in inputs.items()}
        results.append(function(**{**whole, "hidden": hidden}))
        tensor: Tensor = results[0] if isinstance(results[0], Tensor) else results[0].loss
        return tensor

    call: Callable[[Tensor], Tensor] = innermost
    for owner in owners.values():
        call = functools.partial(owner.call, call)
    tensor = call(inputs["hidden"])
    result = results[0]
    return tensor if isinstance(result, Tensor) else dataclasses.replace(result, loss=tensor)


@contextlib.contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Let a model run, without gradients, that is partitioned and that DeepSpeed has not initialized yet.

    Each module's own parameters are gathered for its forward, in all processes.
    """
    gathered: dict[nn.Module, list[Any]] = {}

    def before(module: nn.Module, args: Any) -> None:
        own = [p for p in module._parameters.values() if p is not None]
        gathered[module] = [p for p in own if p.shape != whole_shape(p)]
        if gathered[module]:
            gathered[module][0].all_gather(param_list=gathered[module])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        parameters = gathered.pop(module, [])
        if parameters:
            parameters[0].partition(param_list=parameters)

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            own = [p for p in module._parameters.values() if p is not None]
            hooked = any(map(_gathers, module._forward_pre_hooks.values()))
            if not hooked and any(hasattr(p, "ds_id") for p in own):
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
        try:
            yield
        finally:
            for module in list(gathered):  # of a forward that failed
                after(module, None, None)


_lock = threading.Lock()
_uses = 0
_replaced: Any = None


@contextlib.contextmanager
def torch_linear() -> Iterator[None]:
    """Let ``torch.nn.functional.linear`` be torch's own, whose calls can be seen.

    ZeRO-3 replaces it for the whole process, for good (``memory_efficient_linear``).
    """
    global _uses, _replaced
    with _lock:
        _uses += 1
        if _gathers(nn.functional.linear):
            _replaced, nn.functional.linear = nn.functional.linear, vars(torch._C._nn)["linear"]
    try:
        yield
    finally:
        with _lock:
            _uses -= 1
            if not _uses and _replaced is not None:
                nn.functional.linear, _replaced = _replaced, None
