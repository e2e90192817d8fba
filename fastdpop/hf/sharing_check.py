"""Whether a model computes over a tree what it computes over separate sequences.

A layer that does not read the tree's mask, or that carries a state along the row, computes something else without a
sign. So the first shared call of a model compares the two on a few short sequences of its batch. Where parameters are
spread over processes the first call that asks for sharing does, in all of them and on the same sequences: a process
whose batch shares nothing must gather parameters for those whose batches do.
"""

from __future__ import annotations

import itertools
import re
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdpop.hf.self_check import undisturbed
from fastdpop.hf.sharded import spread
from fastdpop.hf.sharing import SharedBatch, shared_batch
from fastdpop.hf.tree_attention import Unshareable, configs, install, installed, original, uninstall
from fastdpop.prefix.tree import PrefixTree

Logps = Callable[[dict[str, Any], Tensor, SharedBatch | None], Tensor]
"""Log-probs ``(S, T)`` of labels, by the keywords of a padded call and the tree to compute it on, if any."""

ROUNDING = {
    torch.float64: 1e-6,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
"""Allowed median difference of log-probs, over 1 + their mean size, by the coarsest dtype of parameters and autocast.
Some models round to float32 inside whatever their dtype is. Rows of one token again and again, on which all attention
falls, are rounded most: SmolLM2 in bfloat16 reaches a third of this.
"""
_PRODUCTS = {"tf32": torch.float16, "bf16": torch.bfloat16}
"""The dtype that has the precision of float32 products that are not float32's own."""
_LENGTH, _SHORTEST = 32, 8
"""Tokens of the sequences that are compared: no more than those of the batch, but enough to branch."""
_STATE = re.compile(
    "Mamba|SSM|Ssm|Recurrent|R[Ww][Kk][Vv]|LSTM|Linear_?Att|Delta|ShortConv|Retention|Lightning|KDA"
)
"""In the names of layers whose state runs along the sequence."""
_AROUND = re.compile("(Model|Layer|Norm)$")
"""Parts that are called after such a layer."""
_CONVOLUTION = re.compile("Conv1d$")
"""The same, of a kind that stands in audio towers too."""


@dataclass(frozen=True)
class Verdict:
    """What a model can do: ``"shared"``, ``"packed"`` (side by side, without padding) or ``"padded"``; why not more."""

    mode: str
    reason: str = ""


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Verdict]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def verdict(
    model: nn.Module,
    logps: Logps,
    positions: bool,
    device: torch.device,
    tree: PrefixTree | None = None,
) -> Verdict:
    """What a model can do in calls such as this one; found out once.

    Args:
        positions: its forward takes ``position_ids``.
        device: of the batch.
        tree: of the batch, on whose tokens it is found out. None: on tokens that no batch decides on, for processes
            that must go through the model as often as all others, and in training mode too if that is how it is called.

    Raises:
        RuntimeError: log-probs over a tree differ from the model's own, and nothing tells why.
        Exception: any that the model raises on the batch's tokens without a tree too.
    """
    names = tuple(original(c._attn_implementation or "") for c in configs(model))
    kinds = tuple(type(module) for module in model.modules())
    key = names, kinds, device.type, _dtype(model, device.type), spread(model) and model.training
    with _lock:
        known = _known.setdefault(model, {})
        if key not in known:
            try:
                sample = _sample(_arbitrary(model) if tree is None else _sequences(tree), device)
                trial = _Trial(model, logps, key[3], *sample)
                known[key] = _find_out(trial, positions, in_training=key[-1])
            finally:
                if key not in known or known[key].mode == "padded":
                    uninstall(model)
        elif known[key].mode != "padded" and not installed(model):
            install(model)
        return known[key]


def verdict_of(model: nn.Module) -> Verdict | None:
    """What was found out last about a model."""
    with _lock:
        return next(reversed(_known.get(model, {}).values()), None)


_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: nn.Module, reason: str, *, packed: bool = False) -> None:
    """Say, once for each model and reason, why its sequences are not shared, and what is done instead."""
    with _lock:
        said = _warned.setdefault(model, set())
        kind = re.sub(r"\d+", "", reason)  # whatever the sizes
        if kind in said:
            return
        said.add(kind)
    if packed:
        text = f"share_prefixes only leaves out padding and shares nothing, because {reason}"
    else:
        text = (
            f"share_prefixes has no effect, because {reason}: the batch is computed as without it"
        )
    warnings.warn(text, stacklevel=2)


def _dtype(model: nn.Module, device: str) -> torch.dtype:
    """The coarsest in which a model computes."""
    found = {p.dtype for p in model.parameters() if p.dtype in ROUNDING}
    if torch.is_autocast_enabled(device):
        found.add(torch.get_autocast_dtype(device))
    if torch.float32 in found:
        # Of the backend, which may be asked whichever way it was set.
        backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
        found.add(_PRODUCTS.get(backend.matmul.fp32_precision, torch.float32))
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.bfloat16)


def _find_out(trial: _Trial, positions: bool, in_training: bool) -> Verdict:
    model = trial.model
    training = [module for module in model.modules() if module.training] if in_training else []
    with (
        undisturbed(model, trial.labels.device),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        reason = _state(model)
        if reason is not None:
            exact = positions and trial.fault(packed=True) is None
            return Verdict("packed" if exact else "padded", reason)
        if not positions:
            return Verdict(
                "padded",
                f"{type(model).__name__} takes no position_ids, and a token's place in a tree is not its position",
            )
        reason = trial.fault()
        if reason is None and training:
            for module in training:
                module.training = True
            reason = trial.refusal()
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
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.logps(self.call, self.labels, None)  # raises what has nothing to do with the tree
            own = _own_attention(self.model, batch.layout.seen)
            text = textwrap.shorten(str(error), 160, placeholder=" ...")
            return (
                own
                or f"{owner} cannot compute attention over a tree ({type(error).__name__}: {text})"
            )
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

    def refusal(self) -> str | None:
        """What a layer refuses to do over a tree, in the model's present mode: to drop out attention, for one."""
        try:
            self.logps(self.call, self.labels, shared_batch(self.call, self.labels, least=1))
        except Unshareable as error:
            return str(error)
        return None

    def _difference(self, found: Tensor, batch: SharedBatch) -> tuple[float, float]:
        """The median over the tokens behind the first branch, and what rounding may do.

        What comes before sees the same in any case. The mean would be that of a few tokens in mixtures of experts,
        where rounding may choose another expert.
        """
        expected = self.logps(self.call, self.labels, None).double()
        difference = (found.double() - expected).abs().nan_to_num(torch.inf)
        place = self._predicted_from(batch)
        behind = place > _first_leaf(batch.tree)
        size = 1.0 + expected[place >= 0].abs().mean().item()
        return difference[behind].median().item(), ROUNDING[self.dtype] * size

    def _leaks(self, found: Tensor, batch: SharedBatch) -> bool:
        """Whether a token of the first path has an effect on those behind it, in the very same computation.

        None at all, unless the row's last token has one on those before it: experts may add up in another order then.
        """
        place, first = self._predicted_from(batch), _first_leaf(batch.tree)
        last = len(batch.tree.input_ids) - 1
        effect = self._effect(first, found, batch)[place > first].max()
        noise = self._effect(last, found, batch)[(place >= 0) & (place < last)].max()
        if not noise > 0:
            return bool(effect > 0)
        size = 1.0 + found[place > first].double().abs().mean()
        return bool(effect > 8 * torch.finfo(self.dtype).eps * size)

    def _effect(self, token: int, found: Tensor, batch: SharedBatch) -> Tensor:
        """How much log-probs change with one token of the tree."""
        ids = batch.tree.input_ids.clone()
        ids[token] = ids[ids != ids[token]][0]
        other = replace(batch, tree=replace(batch.tree, input_ids=ids))
        return (self.logps(self.call, self.labels, other) - found).double().abs()

    def _predicted_from(self, batch: SharedBatch) -> Tensor:
        """``(S, T)`` place in the tree of the token that predicts each one; -1 for the first ones."""
        place = torch.full_like(batch.hidden_index, -1)
        place[:, 1:] = batch.hidden_index[:, :-1]
        return place


def _first_leaf(tree: PrefixTree) -> int:
    """Where the first path through a tree ends."""
    return int((tree.end == torch.arange(1, len(tree.end) + 1)).nonzero()[0])


def _arbitrary(model: Any) -> list[list[int]]:
    """Two sequences of tokens that the model knows."""
    tokens = len(model.get_input_embeddings().weight)
    return [[(3 + i) % tokens for i in range(_LENGTH)], [(5 + i) % tokens for i in range(_LENGTH)]]


def _sample(sequences: list[list[int]], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """A padded call on a few short sequences that branch, and labels that score all their tokens."""
    sequences = [row for row in sequences if row]
    length = min(_LENGTH, max(_SHORTEST, *map(len, sequences)))
    one = sequences[0]
    other = next((row for row in sequences if row != one), one)
    common = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), 0)  # noqa: B905
    start = max(0, common - length // 2)
    one, other, last = (
        (row * length)[:length]
        for row in (one[start:] or one, other[start:] or other, sequences[-1])
    )
    half = length // 2
    turned = one[:half] + other[::-1][: length - half]
    if turned[half] == one[half]:  # some token of the model's that is not that one
        turned[half] = next(t for t in (*other, *last, 0, 1) if t != one[half])
    # Of one length, so that nothing depends on padding.
    rows = [one, other, turned, last, (turned[: half + 1] + one)[:length]]
    ids = torch.tensor(rows, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids


def _sequences(tree: PrefixTree) -> list[list[int]]:
    tokens: list[int] = tree.input_ids[tree.nodes].tolist()
    bounds: list[int] = tree.offsets.tolist()
    return [tokens[a:b] for a, b in itertools.pairwise(bounds)]


def _state(model: nn.Module, among: re.Pattern[str] = _STATE) -> str | None:
    """The layer of a model whose state runs along the sequence, if it has one."""
    kinds = [type(m).__name__ for m in model.modules() if m is not model]
    found = sorted(filter(among.search, kinds), key=lambda kind: bool(_AROUND.search(kind)))
    if not found:
        return None
    return f"{type(model).__name__} has {found[0]}, whose state runs along the sequence"


def _own_attention(model: nn.Module, seen: Collection[nn.Module]) -> str | None:
    """An attention of the model that does not ask transformers' interface."""
    known = {type(m) for m in seen}
    left = sorted(
        type(m).__name__
        for m in model.modules()
        if "attention" in type(m).__name__.lower()
        and known.isdisjoint(type(part) for part in m.modules())
    )
    if seen and not left:
        return None
    by = f"{left[0]} of {type(model).__name__}" if left else type(model).__name__
    return f"{by} computes attention by itself, not through transformers' attention interface"
