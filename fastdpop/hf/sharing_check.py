"""Whether a model computes over a tree what it computes over separate sequences.

A layer that does not read the tree's mask, or that carries a state along the row, computes something else without a sign.
So the first shared call of a model compares the two on a few short sequences of its batch.
"""

from __future__ import annotations

import itertools
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.hf.self_check import undisturbed
from fastdpop.hf.sharing import SharedBatch, shared_batch
from fastdpop.hf.tree_attention import Unshareable, configs, install, installed, original, uninstall
from fastdpop.prefix.tree import PrefixTree
from fastdpop.rows import IGNORE

Logps = Callable[[dict[str, Any], Tensor, SharedBatch | None], Tensor]
"""Log-probs ``(S, T)`` of labels, by the keywords of a padded call and the tree to compute it on, if any."""

ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Allowed median difference of log-probs, over 1 + their mean size, by the coarsest dtype of parameters and autocast.
Some models round to float32 inside whatever their dtype is.
"""
_LENGTH = 32
_STATE = re.compile(
    "mamba|ssm|recurrent|rwkv|lstm|linear_?attn|linearattention|delta|conv|retention|lightning|kda|gla|griffin",
    re.IGNORECASE,
)
"""In the names of layers whose state runs along the sequence."""


@dataclass(frozen=True)
class Verdict:
    """What a model can do: ``"shared"``, ``"packed"`` (side by side, without padding) or ``"padded"``; why not more."""

    mode: str
    reason: str = ""


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Verdict]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def verdict(model: nn.Module, batch: SharedBatch, logps: Logps) -> Verdict:
    """What a model can do in calls such as this one; found out once, on tokens of the `batch`.

    Raises:
        RuntimeError: log-probs over a tree differ from the model's own, and nothing tells why.
    """
    names = tuple(original(c._attn_implementation or "") for c in configs(model))
    key = names, _dtype(model, batch.device.type)
    with _lock:
        known = _known.setdefault(model, {})
        if key not in known:
            known[key] = _find_out(model, batch, logps, key[1])
            if known[key].mode == "padded":
                uninstall(model)
        elif known[key].mode != "padded" and not installed(model):
            install(model)
        return known[key]


_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: nn.Module, reason: str) -> None:
    """Say, once for each model and reason, why its sequences are not shared."""
    with _lock:
        said = _warned.setdefault(model, set())
        if reason in said:
            return
        said.add(reason)
    warnings.warn(f"share_prefixes has no effect: {reason}", stacklevel=2)


def _dtype(model: nn.Module, device: str) -> torch.dtype:
    """The coarsest in which a model computes."""
    found = {p.dtype for p in model.parameters() if p.dtype in ROUNDING}
    if torch.is_autocast_enabled(device):
        found.add(torch.get_autocast_dtype(device))
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _find_out(model: nn.Module, batch: SharedBatch, logps: Logps, dtype: torch.dtype) -> Verdict:
    call, labels = _sample(batch)
    with (
        undisturbed(model, batch.device),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        expected = logps(call, labels, None)
        try:
            install(model)
            shared = shared_batch(call, labels, least=1)
            found = logps(call, labels, shared)
        except (Unshareable, RuntimeError, TypeError, ValueError, IndexError) as error:
            return Verdict("padded", str(error))
        if _agree(found, expected, shared, dtype):
            return Verdict("shared")
        reason = _reason(model, shared.layout.seen)
        if reason is None:
            difference = (found - expected).abs().median().item()
            raise RuntimeError(
                f"log-probs of {type(model).__name__} over a prefix tree differ from its own by {difference:.3g} nats in the median, "
                f"beyond the rounding of {dtype}: leave out share_prefixes, and please report the model"
            )
        try:
            shared = shared_batch(call, labels, packed=True)
            found = logps(call, labels, shared)
        except (Unshareable, RuntimeError, TypeError, ValueError, IndexError):
            return Verdict("padded", reason)
        return Verdict("packed" if _agree(found, expected, shared, dtype) else "padded", reason)


def _sample(batch: SharedBatch) -> tuple[dict[str, Any], Tensor]:
    """A padded call on a few short sequences that branch, and labels that score all their tokens."""
    sequences = [row for row in _sequences(batch.tree) if row]
    one = sequences[0]
    other = next((row for row in sequences if row != one), one)
    common = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), 0)  # noqa: B905
    start = max(0, common - _LENGTH // 2)
    one, other = one[start : start + _LENGTH], other[start : start + _LENGTH]
    half = (len(one) + 1) // 2
    turned = (one[:half] + other[::-1] + one[::-1])[:_LENGTH]
    rows = [one, other, turned, sequences[-1][: _LENGTH // 2], turned[: half + 1] + one[:half]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=batch.device)
    lengths = torch.tensor([len(row) for row in rows], device=batch.device)
    mask = torch.arange(width, device=batch.device) < lengths[:, None]
    call = {"input_ids": ids, "attention_mask": mask.long()}
    return call, ids.masked_fill(~mask, IGNORE)


def _sequences(tree: PrefixTree) -> list[list[int]]:
    tokens: list[int] = tree.input_ids[tree.nodes].tolist()
    bounds: list[int] = tree.offsets.tolist()
    return [tokens[a:b] for a, b in itertools.pairwise(bounds)]


def _agree(found: Tensor, expected: Tensor, batch: SharedBatch, dtype: torch.dtype) -> bool:
    """Whether log-probs differ by rounding only, by the median over the tokens behind the first branch.

    What comes before sees the same in any case. The mean would be that of a few tokens in mixtures of experts, where
    rounding may choose another expert.
    """
    first_leaf = (batch.tree.end == torch.arange(1, len(batch.tree.end) + 1)).nonzero()[0].item()
    behind = (batch.hidden_index[:, :-1] > first_leaf) & ~batch.padding[:, 1:]
    found, expected = (values[:, 1:][behind].double() for values in (found, expected))
    difference = (found - expected).abs()
    allowed = ROUNDING[dtype] * (1.0 + expected.abs().mean())
    return bool(difference.isfinite().all()) and bool(difference.median() <= allowed)


def _reason(model: nn.Module, seen: Collection[nn.Module]) -> str | None:
    """What a model has that does not fit a tree."""
    owner = type(model).__name__
    for module in model.modules():
        kind = type(module).__name__
        if _STATE.search(kind) and kind != "Conv1D":  # GPT-2's linear layers have that name
            return f"{owner} has {kind}, whose state runs along the sequence"
    attention = {
        type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()
    }
    left = sorted(attention - {type(m).__name__ for m in seen})
    if not seen or left:
        return f"{owner} computes attention by itself" + (f" ({left[0]})" if left else "")
    return None
