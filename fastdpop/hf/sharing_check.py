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
from dataclasses import dataclass, replace
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

_CONVOLUTION = re.compile("Conv1d$")
"""The same, of a kind that stands in audio towers too."""
ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Allowed median difference of log-probs, over 1 + their mean size, by the coarsest dtype of parameters and autocast.
Some models round to float32 inside whatever their dtype is.
"""
_LENGTH = 32
_STATE = re.compile(
    "Mamba|SSM|Ssm|Recurrent|R[Ww][Kk][Vv]|LSTM|Linear_?Att|Delta|ShortConv|Retention|Lightning|KDA"
)
"""In the names of layers whose state runs along the sequence."""


@dataclass(frozen=True)
class Verdict:
    """What a model can do: ``"shared"``, ``"packed"`` (side by side, without padding) or ``"padded"``; why not more."""

    mode: str
    reason: str = ""


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Verdict]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def verdict(model: nn.Module, batch: SharedBatch, logps: Logps, positions: bool) -> Verdict:
    """What a model can do in calls such as this one; found out once, on tokens of the `batch`.

    Args:
        positions: its forward takes ``position_ids``.

    Raises:
        RuntimeError: log-probs over a tree differ from the model's own, and nothing tells why.
    """
    names = tuple(original(c._attn_implementation or "") for c in configs(model))
    key = names, _dtype(model, batch.device.type)
    with _lock:
        known = _known.setdefault(model, {})
        if key not in known:
            known[key] = _find_out(model, batch, logps, key[1], positions)
            if known[key].mode == "padded":
                uninstall(model)
        elif known[key].mode != "padded" and not installed(model):
            install(model)
        return known[key]


def verdict_of(model: nn.Module) -> Verdict | None:
    """What was found out last about a model."""
    with _lock:
        return next(reversed(_known.get(model, {}).values()), None)


_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: nn.Module, reason: str, effect: str = "it has no effect") -> None:
    """Say, once for each model and reason, why its sequences are not shared."""
    with _lock:
        said = _warned.setdefault(model, set())
        if reason in said:
            return
        said.add(reason)
    warnings.warn(f"share_prefixes: {effect}, because {reason}", stacklevel=2)


def _dtype(model: nn.Module, device: str) -> torch.dtype:
    """The coarsest in which a model computes."""
    found = {p.dtype for p in model.parameters() if p.dtype in ROUNDING}
    if torch.is_autocast_enabled(device):
        found.add(torch.get_autocast_dtype(device))
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _find_out(
    model: nn.Module, batch: SharedBatch, logps: Logps, dtype: torch.dtype, positions: bool
) -> Verdict:
    trial = _Trial(model, logps, dtype, *_sample(batch))
    with (
        undisturbed(model, batch.device),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        reason = _state(model)
        if reason is not None:
            exact = positions and trial.fault(packed=True) is None
            return Verdict("packed" if exact else "padded", reason)
        if not positions:
            return Verdict("padded", f"{type(model).__name__} takes no position_ids")
        reason = trial.fault()
        return Verdict("shared" if reason is None else "padded", reason or "")


@dataclass
class _Trial:
    """A padded call on short sequences that branch, and labels that score all their tokens."""

    model: nn.Module
    logps: Logps
    dtype: torch.dtype
    call: dict[str, Any]
    labels: Tensor

    def fault(self, packed: bool = False) -> str | None:
        """What keeps the model from computing them as a tree, or packed side by side; None: nothing.

        Raises:
            RuntimeError: log-probs are not those of separate sequences, and nothing tells why.
        """
        owner = type(self.model).__name__
        batch = shared_batch(self.call, self.labels, least=1, packed=packed)
        try:
            install(self.model)
            found = self.logps(self.call, self.labels, batch)
        except Unshareable as error:
            return str(error)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            own = _own_attention(self.model, batch.layout.seen)
            return own or f"{owner} cannot take a tree for its mask ({error})"
        if packed or batch.layout.seen:
            difference, allowed = self._difference(found, batch)
            if difference <= allowed and not self._leaks(found, batch):
                return None
        reason = _own_attention(self.model, batch.layout.seen) or _state(self.model, _CONVOLUTION)
        if reason is None and not packed:
            raise RuntimeError(
                f"log-probs of {owner} over a prefix tree differ from its own by {difference:.3g} nats in the "
                f"median, expected at most {allowed:.3g} in {self.dtype}: leave out share_prefixes, and please "
                "report the model"
            )
        return reason or "sequences side by side do not stay apart"

    def _difference(self, found: Tensor, batch: SharedBatch) -> tuple[float, float]:
        """The median over the tokens behind the first branch, and what rounding may do.

        What comes before sees the same in any case. The mean would be that of a few tokens in mixtures of experts,
        where rounding may choose another expert.
        """
        behind = self._behind(batch)
        expected = self.logps(self.call, self.labels, None)[behind].double()
        difference = (found[behind].double() - expected).abs().nan_to_num(torch.inf)
        return difference.median().item(), ROUNDING[self.dtype] * (
            1.0 + expected.abs().mean().item()
        )

    def _behind(self, batch: SharedBatch) -> Tensor:
        """Which of the tokens of ``(S, T)`` are predicted from behind the first path through the tree."""
        end = batch.tree.end
        leaf = int((end == torch.arange(1, len(end) + 1)).nonzero()[0])
        behind = torch.zeros_like(batch.padding)
        behind[:, 1:] = (batch.hidden_index[:, :-1] > leaf) & ~batch.padding[:, 1:]
        return behind

    def _leaks(self, found: Tensor, batch: SharedBatch) -> bool:
        """Whether a token of the first path has an effect on those behind it, in the very same computation."""
        end, ids = batch.tree.end, batch.tree.input_ids.clone()
        leaf = int((end == torch.arange(1, len(end) + 1)).nonzero()[0])
        ids[leaf] = ids[0] if ids[leaf] != ids[0] else ids[-1]
        other = replace(batch, tree=replace(batch.tree, input_ids=ids))
        changed = self.logps(self.call, self.labels, other)
        behind = self._behind(batch)
        effect = (changed[behind] - found[behind]).double().abs()
        allowed = 8 * torch.finfo(self.dtype).eps * (1.0 + found[behind].double().abs().mean())
        return bool(effect.max() > allowed)


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


def _state(model: nn.Module, among: re.Pattern[str] = _STATE) -> str | None:
    """The layer of a model whose state runs along the sequence, if it has one."""
    for module in model.modules():
        kind = type(module).__name__
        if module is not model and among.search(kind):
            return f"{type(model).__name__} has {kind}, whose state runs along the sequence"
    return None


def _own_attention(model: nn.Module, seen: Collection[nn.Module]) -> str | None:
    """An attention of the model that does not ask transformers' interface."""
    kinds = {type(m).__name__ for m in model.modules() if "attention" in type(m).__name__.lower()}
    left = sorted(kinds - {type(m).__name__ for m in seen})
    if seen and not left:
        return None
    return f"{type(model).__name__} computes attention by itself" + (
        f" ({left[0]})" if left else ""
    )
