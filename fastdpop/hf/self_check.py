"""Comparing an attached model with its own logits."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.hf import tensor_parallel
from fastdpop.hf.unfit import failed, sees_what_it_predicts
from fastdpop.hf.zero import gathering, whole_shape

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Allowed difference of log-probs, over 1 + the largest logit, by the logits' coarsest dtype."""


def check(model: Any, head: Any) -> None:
    """Compare the log-probs of a few tokens with those of the model's own logits, and leave no trace.

    Raises:
        TypeError: another last token moves what the model says of those before it.
        RuntimeError: the model does not run on token ids alone, or the log-probs differ.
    """
    owner, device = type(model).__name__, head.weight.device
    embeddings = model.get_input_embeddings()
    vocabulary = min(whole_shape(module.weight)[0] for module in (head, embeddings))
    # Where sequences may be split over the processes that a head is, their parts are of one size.
    parts = head.weight.device_mesh.size() if tensor_parallel.is_split(head.weight) else 1
    length = -(-5 // parts) * parts
    ids = (torch.arange(3, 3 + 2 * length, device=device) % vocabulary).view(2, length)
    others = ids.clone()
    others[:, -1] = (others[:, -1] + 1) % vocabulary
    cacheless = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    dtypes: list[torch.dtype] = []

    def own_logits(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, return_dict=True, **cacheless).logits
        return tensor_parallel.whole(found)

    with undisturbed(model, device), torch.no_grad(), gathering(model):
        watch = head.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
        try:
            logits, behind = own_logits(ids), own_logits(others)
        except Exception as error:
            raise RuntimeError(failed(model, device, error)) from error
        finally:
            watch.remove()
        options = {"reduction": "token", "share_prefixes": False}
        output = model(input_ids=ids, labels=ids, return_logps=True, preference_options=options)
    if tensor_parallel.is_split(head.weight) and logits.shape[-1] < vocabulary:
        raise RuntimeError(
            f"{owner} gives logits of {logits.shape[-1]} of its {len(head.weight)} tokens, so it cannot be checked: "
            "pass check=False"
        )
    finite = logits[logits.isfinite()]
    if len(finite) == 0:
        raise RuntimeError(
            f"{owner} gives no finite logits for token ids alone, so it cannot be checked: load its "
            "weights first, or pass check=False"
        )
    every = logits.cpu().double().log_softmax(-1)[:, :-1]
    own = every.gather(-1, ids[:, 1:, None].cpu())[..., 0]
    difference = (own - output.logps[:, 1:].cpu().double()).abs().max().item()
    largest = finite.abs().max().item()
    # What the head gave may have been cast up since, by autocast or by the model.
    tolerance = max(TOLERANCE[dtype] for dtype in (logits.dtype, *dtypes)) * (1.0 + largest)
    if not difference <= tolerance:
        raise RuntimeError(
            f"log-probs from {owner}'s own logits and from fastdpop differ by {difference:.3g}, "
            f"expected at most {tolerance:.3g}: it does something to its logits that fastdpop.attach does not see"
        )
    moved = (behind - logits)[:, :-1].abs().nan_to_num(0.0).max().item()
    rounding = max(map(_rounding, (logits.dtype, *dtypes)))
    if moved > min(tolerance, rounding * (1.0 + largest)):
        raise TypeError(sees_what_it_predicts(owner))


def _rounding(dtype: torch.dtype) -> float:
    """By how much a logit of a causal model may move with what is behind it: other rows of a product may be rounded
    otherwise.
    """
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by a newer name, which this one does not know
        exact = False
    return 64 * torch.finfo(dtype).eps if exact else math.inf


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, with every module's mode, buffers and plain attributes and the random state restored at the end.

    Rotary embeddings note in an attribute how long the sequences were that they have seen.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    notes = [
        (module, {name: v for name, v in vars(module).items() if isinstance(v, _PLAIN)})
        for module in modes
    ]
    random = random_state(device)
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, values in notes:
            vars(module).update(values)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        set_random_state(random)


_PLAIN = (bool, int, float, str, type(None), Tensor)
RandomState = tuple[torch.device, Tensor, Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """The random state of the CPU and of an accelerator."""
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return device, torch.get_rng_state(), own


def set_random_state(state: RandomState) -> None:
    """Go back to what :func:`random_state` found."""
    device, of_cpu, own = state
    torch.set_rng_state(of_cpu)
    if own is not None:
        torch.get_device_module(device).set_rng_state(own, device)
