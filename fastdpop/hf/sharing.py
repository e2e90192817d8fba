"""A padded batch as a prefix tree: which calls can be laid out so, and what the model is given and gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fastdpop.hf.tree_attention import Layout, Unshareable
from fastdpop.hf.zero import whole_shape
from fastdpop.prefix.tree import LEAST_SHARED, PrefixTree, build_tree, side_by_side
from fastdpop.rows import IGNORE

_OF_THE_LOSS = ("num_items_in_batch",)
"""What only a model's own loss reads."""
_MADE_HERE = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class SharedBatch:
    """S sequences as one row of N tokens.

    Attributes:
        tree: their tree.
        hidden_index: ``(S, T)`` place of each token in the tree, 0 for padding; on the device of the ids.
        padding: ``(S, T)`` where there is no token.
        device: where the model's inputs go.
        packed: nothing is shared, sequences stand side by side.
        layout: the tree on its way through the model.
    """

    tree: PrefixTree
    hidden_index: Tensor
    padding: Tensor
    device: torch.device
    packed: bool = False
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        mask = torch.stack([self.tree.end, self.tree.position_ids])[None, None]
        object.__setattr__(self, "layout", Layout(mask))

    def call(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of a call of the model on the tree."""
        ids = self.tree.input_ids.to(self.device)[None]
        own = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": self.tree.position_ids.to(self.device)[None],
        }
        call = {name: v for name, v in given.items() if name not in _OF_THE_LOSS} | own
        if self.packed:
            # Not the tree's offsets, which count empty sequences.
            starts = (self.tree.position_ids == 0).nonzero()[:, 0]
            offsets = torch.cat([starts, starts.new_tensor([len(self.tree.end)])])
            bounds, lengths = offsets.to(self.device, torch.int32), offsets.diff()
            call |= {
                "seq_idx": torch.arange(len(lengths)).repeat_interleave(lengths).to(bounds)[None],
                **{f"cu_seq_lens_{side}": bounds for side in "qk"},
                **{f"max_length_{side}": int(lengths.max()) for side in "qk"},
            }
        return call

    def unshared(self, states: Tensor) -> Tensor:
        """``(..., 1, N, H)`` by token of the tree as ``(..., S, T, H)`` by token of the batch, 0 for padding."""
        return states.select(-3, 0)[..., self.hidden_index, :] * ~self.padding[..., None]


def shared_batch(
    call: Mapping[str, Any],
    labels: Tensor,
    *,
    shift: bool = True,
    packed: bool = False,
    least: int = LEAST_SHARED,
) -> SharedBatch:
    """The tree of a padded batch.

    Args:
        call: keywords of the model's forward; labels: ``(S, T)``.
        shift: a label is predicted at the place before its own.
        packed: lay sequences side by side.
        least: as in :func:`fastdpop.prefix.tree.build_tree`.

    Raises:
        Unshareable: the call says more of its tokens than ids, or what the tree cannot say.
    """
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor):
        raise Unshareable("the model is called without input_ids")
    if ids.dim() != 2 or ids.shape != labels.shape:
        raise Unshareable(
            f"input_ids has shape {tuple(ids.shape)} and labels {tuple(labels.shape)}, not one (S, T)"
        )
    _check_rest(call)
    mask = call.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        found = (
            f"has shape {tuple(mask.shape)}"
            if isinstance(mask, Tensor)
            else f"is a {type(mask).__name__}"
        )
        raise Unshareable(f"attention_mask {found}, not a tensor of input_ids' shape")
    present = (mask != 0).cpu().numpy()
    tokens = ids.cpu().numpy()
    if (np.diff(present.astype(np.int8), axis=1, prepend=0) == 1).sum(1).max(initial=0) > 1:
        raise Unshareable("attention_mask leaves out tokens inside a sequence")
    if _scored_from(labels, mask == 0, shift):
        raise Unshareable(
            "labels score tokens that are predicted from a place that attention_mask leaves out"
        )
    _check_positions(call.get("position_ids"), present)
    sequences = [row[kept] for row, kept in zip(tokens, present, strict=True)]
    if not present.any():
        raise Unshareable("the batch has no tokens")
    tree = side_by_side(sequences) if packed else build_tree(sequences, least)
    index = np.zeros(ids.shape, dtype=np.int64)
    index[present] = tree.nodes.numpy()
    return SharedBatch(
        tree=tree,
        hidden_index=torch.from_numpy(index).to(ids.device),
        padding=torch.from_numpy(~present).to(ids.device),
        device=ids.device,
        packed=packed,
    )


def _check_rest(call: Mapping[str, Any]) -> None:
    """
    Raises:
        Unshareable: there are inputs besides tokens.
    """
    for name, value in call.items():
        if name in (*_MADE_HERE, *_OF_THE_LOSS) or value is None:
            continue
        if not isinstance(value, (bool, int, float, str)):
            raise Unshareable(f"{name} is given, which cannot be laid out as a tree")


def check_model(model: Any, tokens: int) -> None:
    """
    Args:
        tokens: of the row.

    Raises:
        Unshareable: something in the model reads how many tokens there are, or where in the row they stand.
    """
    embedding = model.get_input_embeddings()
    if model.training and getattr(embedding, "neftune_noise_alpha", None):
        raise Unshareable("NEFTune's noise depends on the length of the row")
    weight = embedding._parameters.get("weight")  # as DeepSpeed does not gather it
    if weight is not None and whole_shape(weight)[0] < 2:
        raise Unshareable("its vocabulary has one token")
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa's kin
        raise Unshareable("its positions count from behind that of padding, and not from 0")
    config = getattr(model, "config", None)
    if getattr(config, "reorder_and_upcast_attn", False):
        raise Unshareable("reorder_and_upcast_attn is set, which is attention of the model's own")
    if isinstance(config, PreTrainedConfig):
        config = config.get_text_config()
    scale = getattr(config, "floor_scale", None)
    if getattr(config, "attn_temperature_tuning", False) and scale and tokens > scale:
        raise Unshareable(f"attn_temperature_tuning counts places in a row of over {scale} tokens")


def _scored_from(labels: Tensor, absent: Tensor, shift: bool) -> bool:
    """Whether a label is predicted at a place that is `absent`, where a padded batch has some state and a tree none."""
    scored = (labels[:, 1:] if shift else labels) != IGNORE
    return bool((scored & (absent[:, :-1] if shift else absent)).any())


def _check_positions(given: Tensor | None, present: Any) -> None:
    """
    Raises:
        Unshareable: positions are given that do not count a sequence's tokens from 0.
    """
    if given is None:
        return
    counted = np.cumsum(present, axis=1) - 1
    places = given.cpu().numpy()
    fits = places.shape in (present.shape, (1, present.shape[1]))
    if not fits or (np.broadcast_to(places, present.shape)[present] != counted[present]).any():
        raise Unshareable("position_ids do not count the tokens of a sequence from 0")


def tree_batch(
    given: Mapping[str, Any], call: Mapping[str, Any], labels: Tensor, *, shift: bool = True
) -> SharedBatch:
    """The tree that a caller has laid out with :func:`fastdpop.pack`.

    Raises:
        ValueError: it does not fit the other arguments.
    """
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        raise ValueError(
            "input_ids is not (1, N), expected the packed row that prefix_tree describes"
        )
    n = ids.shape[1]
    end, index = _tensors_of(given)
    if end.shape != (n,) or index.shape != labels.shape or labels.dim() != 2:
        raise ValueError(
            f"prefix_tree has end of shape {tuple(end.shape)} and hidden_index of shape {tuple(index.shape)}, "
            f"expected ({n},) and {tuple(labels.shape)}"
        )
    position, above = _depths(end)
    _check_given(call, position)
    index = index.cpu()
    places = torch.arange(labels.shape[1])
    if n == 0 or bool(((index < 0) | (index >= n)).any()):
        raise ValueError(
            f"hidden_index of prefix_tree is not in [0, {n}), expected places in the row"
        )
    padding = position[index] != places
    broken = ~padding[:, 1:] & (above[index[:, 1:]] != index[:, :-1])
    if bool(broken.any()):
        s, t = broken.nonzero()[0].tolist()
        raise ValueError(
            f"hidden_index of prefix_tree goes from {int(index[s, t])} to {int(index[s, t + 1])} in sequence {s}, "
            f"expected {int(above[index[s, t + 1]])}, above it in the tree, to come before"
        )
    if _scored_from(labels.cpu(), padding, shift):
        raise ValueError(
            "labels score tokens behind the end of a sequence of prefix_tree, expected -100 there"
        )
    lengths = (~padding).sum(1)
    tree = PrefixTree(
        input_ids=ids[0].cpu(),
        position_ids=position,
        end=end,
        nodes=index[~padding],
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
    )
    return SharedBatch(tree, index.to(ids.device), padding.to(ids.device), ids.device)


def _tensors_of(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`end`, on the CPU, and `hidden_index`.

    Raises:
        ValueError: `prefix_tree` is no dict of these.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f"prefix_tree is a {type(given).__name__}, expected the dict that fastdpop.pack gives"
        )
    missing = {"end", "hidden_index"} - set(given)
    if missing:
        raise ValueError(f"prefix_tree lacks {sorted(missing)}, expected what fastdpop.pack gives")
    for name in ("end", "hidden_index"):
        value = given[name]
        if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} of prefix_tree is of {kind}, expected a tensor of int64")
    return given["end"].cpu().long(), given["hidden_index"].long()


def _check_given(call: Mapping[str, Any], position: Tensor) -> None:
    """
    Raises:
        ValueError: the call says something of tokens that the tree does not, or says otherwise.
    """
    places, mask = call.get("position_ids"), call.get("attention_mask")
    if places is not None and not torch.equal(places.cpu().reshape(-1).long(), position):
        raise ValueError(
            "position_ids is not what prefix_tree says, expected each token's number in its sequence"
        )
    if mask is not None and not (isinstance(mask, Tensor) and bool((mask == 1).all())):
        raise ValueError(
            "attention_mask leaves out tokens of prefix_tree, expected none, or ones only"
        )
    for name, value in call.items():
        if isinstance(value, Tensor) and name not in _MADE_HERE:
            raise ValueError(f"{name} is given with prefix_tree, expected ids only")


def _depths(end: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens stand above each one, and which is the next above; -1 for none.

    Raises:
        ValueError: `end` is of no tree.
    """
    n = len(end)
    ends = end.tolist()
    path: list[int] = []
    depths, above = [], []
    for i, e in enumerate(ends):
        while path and ends[path[-1]] <= i:
            path.pop()
        if not i < e <= (ends[path[-1]] if path else n):
            raise ValueError(
                f"end of prefix_tree is {e} at {i}, expected a subtree's end inside the one above it"
            )
        depths.append(len(path))
        above.append(path[-1] if path else -1)
        path.append(i)
    return torch.tensor(depths, dtype=torch.int64), torch.tensor(above, dtype=torch.int64)


def padded(batch: SharedBatch, call: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a call on the padded batch that a tree was made from."""
    ids = batch.tree.input_ids.to(batch.device)[batch.hidden_index]
    rest = {name: value for name, value in call.items() if name != "position_ids"}
    return {
        **rest,
        "input_ids": ids.masked_fill(batch.padding, 0),
        "attention_mask": (~batch.padding).long(),
    }
