"""A batch in one form, however it was laid out: padded, packed, as a tree, or TRL's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdpop import checks, instead
from fastdpop.rows import IGNORE
from fastdpop.unrounded import opened

INTEGERS = (torch.int64, torch.int32)
"""Of token ids and labels."""
_REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
_NOT_OF_THE_MODEL = {
    *("input_ids", "attention_mask", "labels", "shift_labels", "completion_mask"),
    *("prefix_tree", "ref_logps", "pair_values", "pairs", "cu_seqlens", *_REFERENCES),
}


@dataclass(frozen=True)
class BatchView:
    """S sequences of at most T tokens, on the CPU.

    Attributes:
        ids: ``(S, T)`` int64.
        labels: ``(S, T)`` int64, aligned with the ids if they are as they should be.
        attended: ``(S, T)`` bool, the attention mask; all true where none was given.
        masked: whether an attention mask was given.
        pairs: (chosen, rejected) sequences; of unpaired data there are none.
        given: pairs as they were given, -1 where a side is absent; `pairs` are those with both.
        label_dtype: as they were given.
        shifted: labels came shifted, so that nothing is known of a sequence's first token.
        kind: how the batch was laid out, in words.
        extra: further arguments of the model, a row for each sequence where they are tensors.
        hidden: ``(S, T, H)``, what a caller passes to the fused functions.
    """

    ids: Tensor
    labels: Tensor
    attended: Tensor
    masked: bool
    pairs: tuple[tuple[int, int], ...]
    label_dtype: torch.dtype = torch.int64
    kind: str = "padded"
    extra: Mapping[str, Any] = field(default_factory=dict)
    hidden: Tensor | None = None
    given: tuple[tuple[int, int], ...] = ()
    shifted: bool = False

    @cached_property
    def scored(self) -> Tensor:
        """``(S, T)`` bool: which tokens the loss counts. None stands before the first one of a sequence."""
        scored = self.labels != IGNORE
        scored[:, 0] = False
        return scored

    @cached_property
    def begins(self) -> Tensor:
        """``(S,)`` where the first token that is no padding stands."""
        return self.attended.int().argmax(1)

    @cached_property
    def lengths(self) -> Tensor:
        """``(S,)`` tokens counted."""
        return self.scored.sum(1)

    def rows(self, rows: Sequence[int]) -> BatchView:
        """Some of the sequences, whose pairs are those that are there."""
        place = {row: i for i, row in enumerate(rows)}
        index = torch.tensor(list(rows), dtype=torch.int64)
        kept = self.attended[index].any(0).nonzero()
        first, last = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 1)

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.shape[:1] != self.ids.shape[:1]:
                return value
            value = value[index.to(value.device)]
            return value[:, first:last] if value.shape[1:2] == self.ids.shape[1:] else value

        return BatchView(
            cut(self.ids),
            cut(self.labels),
            cut(self.attended),
            self.masked,
            tuple((place[c], place[r]) for c, r in self.pairs if c in place and r in place),
            self.label_dtype,
            self.kind,
            {name: cut(value) for name, value in self.extra.items()},
            cut(self.hidden),
            shifted=self.shifted,
        )


def read_batch(
    batch: Mapping[str, Any],
    pairs: Any = None,
    cu_seqlens: Tensor | None = None,
    shift_labels: bool = True,
    hidden: Tensor | None = None,
) -> BatchView:
    """
    Raises:
        TypeError, ValueError: `batch` is no batch; the message names the entry.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch is a {type(batch).__name__}, expected a mapping with input_ids and labels"
        )
    checks.flag("shift_labels", shift_labels)
    pairs, cu_seqlens = (
        batch.get(name) if value is None else value
        for name, value in (("pairs", pairs), ("cu_seqlens", cu_seqlens))
    )
    ids = _integers(batch, "input_ids")
    labels, dtype = _labels(batch, ids)
    attended = batch.get("attention_mask")
    kind = "padded"
    if "prefix_tree" in batch:
        kind = "a tree of prefixes (prefix_tree)"
        ids, attended = _of_tree(ids, batch["prefix_tree"], labels)
    elif cu_seqlens is not None:
        kind = "packed (cu_seqlens)"
        ids, labels, attended = _of_packed(ids, labels, cu_seqlens)
    if ids.shape != labels.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected {tuple(ids.shape)}, that of input_ids"
        )
    masked = attended is not None
    if attended is None:
        attended = torch.ones_like(ids)
    _tensor("attention_mask", attended)
    if attended.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attended.shape)}, expected {tuple(ids.shape)}, that of input_ids"
        )
    shifted = not shift_labels or "shift_labels" in batch
    if shifted:
        labels = torch.cat([labels.new_full((len(labels), 1), IGNORE), labels[:, :-1]], 1)
    extra = {n: v for n, v in batch.items() if n not in _NOT_OF_THE_MODEL}
    if kind != "padded":
        extra.pop("position_ids", None)
    table = _pairs(pairs, len(ids))
    return BatchView(
        ids.cpu(),
        labels.cpu(),
        attended.bool().cpu(),
        masked,
        tuple(pair for pair in table if min(pair) >= 0),
        dtype,
        kind,
        extra,
        _hidden(hidden, ids, kind),
        table,
        shifted,
    )


def _hidden(hidden: Any, ids: Tensor, kind: str) -> Tensor | None:
    """What a caller passes to the fused functions, laid out as the ids."""
    if hidden is None:
        return None
    if kind != "padded":
        raise ValueError(
            f"hidden is given for a batch that is {kind}, expected a padded one: give a padded batch of the same pairs"
        )
    _tensor("hidden", hidden)
    if hidden.dim() != 3 or hidden.shape[:2] != ids.shape or hidden.dtype not in checks.FLOATS:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and dtype {hidden.dtype}, expected {(*ids.shape, 'H')} and one of "
            f"{checks.FLOATS}, a state for each of input_ids"
        )
    return hidden.detach()


def _tensor(name: str, value: Any, expected: str = "a torch.Tensor") -> None:
    """
    Raises:
        TypeError: it is none, or holds nothing.
    """
    if not isinstance(value, Tensor):
        raise TypeError(instead.of_no_tensor(name, value, expected))
    if value.is_meta:
        raise TypeError(f"{name} is on the meta device, expected a tensor with values")


def _integers(batch: Mapping[str, Any], name: str) -> Tensor:
    value = batch.get(name)
    if value is None:
        raise ValueError(f"batch has {sorted(batch)}, expected {name} among them")
    _tensor(name, value, "a tensor (2B, T) of torch.int64")
    if value.dtype not in INTEGERS or value.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}, expected (2B, T) and torch.int64"
        )
    if value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected at least one token")
    return value.long()


def _labels(batch: Mapping[str, Any], ids: Tensor) -> tuple[Tensor, torch.dtype]:
    """Labels, made from TRL's ``completion_mask`` where there are none; and their dtype."""
    name = next((n for n in ("labels", "shift_labels", "completion_mask") if n in batch), None)
    if name is None:
        raise ValueError(
            f"batch has {sorted(batch)}, expected labels (or TRL's completion_mask) among them"
        )
    value = batch[name]
    _tensor(name, value, "a tensor (2B, T)")
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (2B, T)")
    if name == "completion_mask":
        if value.shape != ids.shape:
            raise ValueError(
                f"completion_mask has shape {tuple(value.shape)}, expected {tuple(ids.shape)}, that of input_ids"
            )
        return ids.masked_fill(value == 0, IGNORE), torch.int64
    return value.long(), value.dtype


def _of_tree(ids: Tensor, tree: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``(2P, T)`` of what :func:`fastdpop.pack` has laid out."""
    index = tree.get("hidden_index") if isinstance(tree, Mapping) else None
    if not isinstance(index, Tensor) or index.shape != labels.shape:
        raise ValueError(
            f"prefix_tree has no hidden_index of shape {tuple(labels.shape)}, that of labels: expected what "
            "fastdpop.pack gives"
        )
    first = torch.zeros_like(index, dtype=torch.bool)
    first[:, 0] = True  # elsewhere 0 says that there is no token
    attended = (index > 0) | first
    return ids[0][index.to(ids.device)].masked_fill(~attended.to(ids.device), 0), attended


def _of_packed(ids: Tensor, labels: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of sequences one behind the other, labels too."""
    _tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in INTEGERS:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}, expected (sequences + 1,) "
            "integers"
        )
    bounds = cu_seqlens.tolist()
    if len(ids) != 1 or ids.shape != labels.shape:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)} and labels {tuple(labels.shape)}, expected (1, N) with cu_seqlens"
        )
    if bounds[:1] != [0] or bounds[-1] != ids.shape[1] or sorted(bounds) != bounds:
        raise ValueError(
            f"cu_seqlens is {bounds!r:.80}, expected to rise from 0 to {ids.shape[1]}, the tokens of input_ids"
        )
    sizes = [end - start for start, end in pairwise(bounds)]
    pad = torch.nn.utils.rnn.pad_sequence
    parts = [torch.ones(size, dtype=torch.int64) for size in sizes]
    return (
        pad(ids[0].split(sizes), batch_first=True),
        pad(labels[0].split(sizes), batch_first=True, padding_value=IGNORE),
        pad(parts, batch_first=True),
    )


def _pairs(given: Any, sequences: int) -> tuple[tuple[int, int], ...]:
    """Chosen and rejected sequences, -1 where a side is absent; none where their number is odd, which is a finding."""
    if given is None:
        half = sequences // 2
        return () if sequences % 2 else tuple((i, i + half) for i in range(half))
    table = checks.pairs(given, sequences, True, torch.device("cpu"))
    assert table is not None
    return tuple((c, r) for c, r in table.tolist())


def references_of(batch: Mapping[str, Any], ref_logps: Any, view: BatchView) -> Tensor | None:
    """The reference's log-probs ``(P, 2)``, float64 on the CPU: those given, else those in the batch.

    Raises:
        TypeError, ValueError: the loss would refuse them, or the batch has those of one side only.
    """
    given = opened(ref_logps)
    columns = [name for name in _REFERENCES if name in batch]
    if given is None and len(columns) == 1:
        raise ValueError(f"batch has {columns[0]} alone of {_REFERENCES}, expected both or none")
    if given is None and columns:
        given = tuple(batch[name] for name in _REFERENCES)
    if given is None:
        given = opened(batch.get("ref_logps"))
    if given is None or not view.pairs:
        return None
    if isinstance(given, Tensor):
        given = given.cpu()
    elif isinstance(given, Sequence):
        given = tuple(side.cpu() if isinstance(side, Tensor) else side for side in given)
    table = torch.tensor(view.given, dtype=torch.int64)
    sides = checks.ref_logps(given, table, len(view.ids), weighed_by_pair=False)
    return sides.double().T[(table >= 0).all(1)]
