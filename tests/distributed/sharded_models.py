"""Small models on which every process has its own batch, and what one process computes from all of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fastdpop.hf import attach
from tests.tiny_models import DPOP, V, tiny

BATCH, LENGTH = 4, 9


def model(name: str = "llama") -> Any:
    """The same in every process, float32."""
    torch.manual_seed(0)
    return tiny(name, dtype=torch.float32)


def own_batch(rank: int) -> dict[str, Tensor]:
    """Chosen and rejected sequences of a process, which have prompts and an end in common with nobody else's."""
    generator = torch.Generator().manual_seed(100 + rank)
    ids = torch.randint(3, V, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2 - rank % 2 :] = 0
    labels = torch.where(mask == 1, ids, -100)
    labels[:, : 2 + rank % 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def references(rank: int) -> Tensor:
    """Of a reference that is another model."""
    generator = torch.Generator().manual_seed(200 + rank)
    return -60 - 10 * torch.rand(BATCH, generator=generator)


def expected(
    whole: Any, ranks: int | None = None, **options: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of every process, and the gradients of their mean, from one process and a model that is whole."""
    one, size = attach(copy.deepcopy(whole)), ranks or dist.get_world_size()
    found = []
    for rank in range(size):
        given = {"preference": DPOP, "ref_logps": references(rank), **options}
        loss = one(**own_batch(rank), **given).loss.mean()
        (loss / size).backward()
        found.append(loss.item())
    gradients = {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}
    return found, gradients


def whole_tensor(value: Any) -> Tensor:
    """Of a DTensor, all of it."""
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found


def assert_gradients(
    sharded: nn.Module, want: dict[str, Tensor], case: str, times: float = 1.0
) -> None:
    """Every gradient on every rank, to 1e-6 of its largest value; then they are forgotten."""
    found = {n: p.grad for n, p in sharded.named_parameters() if p.grad is not None}
    assert {_plain(n) for n in found} == set(want), case
    for name, gradient in found.items():
        wanted = want[_plain(name)] * times
        error = (whole_tensor(gradient) - wanted).abs().max() / wanted.abs().max()
        assert error <= 1e-6, f"{case}: the gradient of {name} is off by {error:.2e}"
    sharded.zero_grad()


def _plain(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


def assert_loss(loss: Tensor, want: float, case: str) -> None:
    assert loss.dtype == torch.float32, case
    assert abs(loss.item() - want) <= 1e-6 * abs(want), (
        f"{case}: loss {loss.item()}, expected {want}"
    )


LAYOUTS = ("root", "root, freed", "tail", "tail, freed", "head", "head, freed")
"""What the head is in a group with."""


def shard(whole: Any, layout: str = "head, freed", *, tied: bool = False, **options: Any) -> Any:
    """FSDP2; every parameter of the model is a DTensor then."""
    frees = layout.endswith("freed")
    target = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    for layer in target.model.layers:
        fully_shard(layer, **options)
    head = target.get_output_embeddings()
    if layout.startswith("tail"):
        embedding = [target.model.embed_tokens] if tied else []
        modules = [target.model.norm, *embedding, head]
        fully_shard(modules, reshard_after_forward=frees, **options)
    elif layout.startswith("head"):
        fully_shard(head, reshard_after_forward=frees, **options)
    fully_shard(whole, reshard_after_forward=frees and layout.startswith("root"), **options)
    assert_sharded(whole)
    return whole


def assert_sharded(module: nn.Module) -> None:
    """That this process holds a part only of every parameter, none of which is whole."""
    parameters: list[Any] = list(module.parameters())
    assert parameters
    for parameter in parameters:
        assert parameter.to_local().numel() < 0.75 * parameter.numel()
