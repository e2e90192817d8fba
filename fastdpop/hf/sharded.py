"""Models whose parameters are spread over processes, and a head that stays whole until the loss is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.hf.output import PreferenceModelOutput


@torch.compiler.disable
def spread(model: nn.Module) -> bool:
    """Whether a forward of the model waits for other processes: FSDP, ZeRO-3, tensor parallel."""
    return any(_is_fsdp2(m) or _is_fsdp1(m) for m in model.modules()) or any(
        hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters()
    )


def _is_fsdp2(module: nn.Module) -> bool:
    return hasattr(type(module), "set_reshard_after_forward")


def _is_fsdp1(module: nn.Module) -> bool:
    return hasattr(module, "_fsdp_wrapped_module")


class HeadKeptWhole:
    """A context in which what FSDP2 gathers for a head stays until the loss is computed, after the head has returned.

    At the end it is freed, unless :meth:`for_backward` was told of a loss; then backward frees it. Nothing is gathered
    twice.
    """

    @torch.compiler.disable
    def __init__(self, head: nn.Module) -> None:
        self._modules: list[Any] = [m for m in head.modules() if _is_fsdp2(m)]
        self._frees: list[tuple[Any, Any]] = []
        self._needed = False

    @torch.compiler.disable
    def __enter__(self) -> HeadKeptWhole:
        for module in self._modules:
            for group in _groups(module):
                # Its public setter knows True and False, and a group may keep a part (reshard_after_forward=2).
                self._frees.append((group, group.post_forward_mesh_info))
                group.post_forward_mesh_info = None
        return self

    @torch.compiler.disable
    def __exit__(self, *error: object) -> None:
        frees = False
        for group, before in reversed(self._frees):
            group.post_forward_mesh_info = before
            frees = frees or before is not None
        if frees and not self._needed:
            for module in self._modules:
                module.reshard()

    @torch.compiler.disable
    def for_backward(self, output: PreferenceModelOutput) -> None:
        """Let the graph of an output find the head whole again, also behind another one's backward."""
        for tensor in (output.loss, output.logps):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self._needed = True
                for module in self._modules:
                    tensor.register_hook(_Unshard(module))


class _Unshard:
    """A hook of a tensor's gradient."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, gradient: Tensor) -> None:
        self._module.unshard()


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None)
    return [g for g in (found or [state._fsdp_param_group]) if g is not None]
