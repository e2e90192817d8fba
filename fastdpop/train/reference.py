"""The weights of a reference that moves in training (TR-DPO, arXiv:2404.09656), in the run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

FILE = "reference.safetensors"


def save(model: nn.Module, folder: Path, writes: bool) -> None:
    """Write the parameters, as they are. To be called in every process, for those that are sharded.

    Args:
        writes: whether this process does.
    """
    found = {}
    for name, parameter in model.named_parameters():
        value = _whole(parameter.detach())
        if writes:
            found[name] = value.contiguous().cpu()
    if writes:
        save_file(found, folder / FILE)


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def load(model: nn.Module, folder: Path) -> None:
    """Give a model the parameters that :func:`save` wrote.

    Raises:
        ValueError: there are none, or of another model.
    """
    if not (folder / FILE).is_file():
        raise ValueError(
            f"{folder} holds no {FILE}: with --sync_ref_model only a checkpoint of such a run can be gone on from"
        )
    found = load_file(folder / FILE)
    parameters: dict[str, Any] = dict(model.named_parameters())
    if found.keys() != parameters.keys():
        other = min(found.keys() ^ parameters.keys())
        raise ValueError(f"{folder / FILE} is of another model: {other} is in one of them only")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = found[name]
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{folder / FILE} is of another model: {name} has shape {tuple(value.shape)}, expected "
                    f"{tuple(parameter.shape)}"
                )
            if isinstance(parameter, DTensor):
                value = value.to(parameter.device_mesh.device_type)
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
