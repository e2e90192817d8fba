"""Log-probs of every token of preference pairs, and CHES, in one forward pass of a model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastdpop.displacement import Displacement, displacement
from fastdpop.engines import DEFAULT_WORKSPACE_BYTES
from fastdpop.hf import attach, detach, is_attached
from fastdpop.prefix.pack import PackedPairs, pack
from fastdpop.rows import IGNORE, default_pairs, rows_from_labels

Pair = Mapping[str, Any]
SIDES = ("chosen", "rejected")
PARTS = ("before", "at", "after")
"""Of a completion, around the first token in which it differs from the other one."""


@dataclass(frozen=True)
class PairScores:
    """What a model makes of P pairs, in the order of the pairs.

    Attributes:
        chosen_logps, rejected_logps: the log-prob of each token of each completion, in nats: P float64
            tensors of one dimension.
        first_difference: ``(P,)`` int64, the place within the completion of the first token that differs;
            the shorter length where one completion is the beginning of the other, -1 where they are equal.
        ches: ``(P,)`` float64, CHES (:func:`score_pairs`); None if it was not asked for.
        ches_normalised: the same of means instead of sums.
    """

    chosen_logps: list[Tensor]
    rejected_logps: list[Tensor]
    first_difference: Tensor
    ches: Tensor | None = None
    ches_normalised: Tensor | None = None

    def __len__(self) -> int:
        return len(self.chosen_logps)

    def side(self, name: str) -> list[Tensor]:
        """The tokens' log-probs of ``"chosen"`` or ``"rejected"``."""
        return {"chosen": self.chosen_logps, "rejected": self.rejected_logps}[name]

    def sums(self, name: str) -> Tensor:
        """``(P,)`` float64 log-probs of whole completions."""
        return torch.stack([logps.sum() for logps in self.side(name)])

    def change_from(self, reference: PairScores) -> PairScores:
        """Log-ratios of tokens instead of log-probs, without CHES.

        Raises:
            ValueError: the scores of `reference` are of other completions.
        """
        if [x.shape for x in self.chosen_logps + self.rejected_logps] != [
            x.shape for x in reference.chosen_logps + reference.rejected_logps
        ]:
            raise ValueError(
                "reference has scores of other pairs, expected scores of the same ones"
            )
        chosen, rejected = (
            [own - other for own, other in zip(self.side(s), reference.side(s), strict=True)]
            for s in SIDES
        )
        return PairScores(chosen, rejected, self.first_difference)


@dataclass(frozen=True)
class Mean:
    """A mean over tokens.

    Attributes:
        mean: None where there is no token.
        standard_error: of the mean, of pairs drawn at random: the tokens of a pair count as one
            observation (a ratio estimate). None with fewer than two pairs.
        tokens, pairs: how many there are.
    """

    mean: float | None
    standard_error: float | None
    tokens: int
    pairs: int

    @staticmethod
    def of(values: Sequence[Tensor]) -> Mean:
        """Of the tokens of each pair; pairs without a token do not count."""
        present = [v for v in values if len(v)]
        if not present:
            return Mean(None, None, 0, 0)
        sums = torch.stack([v.sum() for v in present])
        counts = torch.tensor([float(len(v)) for v in present], dtype=torch.float64)
        mean, n = float(sums.sum() / counts.sum()), len(present)
        error = None
        if n > 1:
            deviation = float((sums - mean * counts).square().sum())
            error = math.sqrt(deviation * n / (n - 1)) / float(counts.sum())
        return Mean(mean, error, int(counts.sum()), n)


def score_pairs(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    batch_pairs: int = 8,
    ches: bool = True,
    progress: bool = False,
) -> PairScores:
    """The log-prob of every token of P pairs, and CHES, with one forward pass for a batch of pairs.

    What the sequences of a batch begin with in common runs once, where the model can share prefixes. There
    are no logits of the whole vocabulary. Pairs of similar length are computed together.

    CHES (arXiv:2410.08847) is that of :mod:`fastdpop.displacement`, of the states that the head reads. Where it is
    high, preference training is likely to lower the chosen log-prob.

    Args:
        model: a Hugging Face causal language model, or a PEFT model around one, on the device where it is to
            compute. fastdpop is attached for the call if it is not; dropout is off.
        pairs: mappings with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, as
            :func:`fastdpop.data.tokens.tokenize` gives them. Completions may be empty, prompts may not.
        batch_pairs: pairs in one forward pass.
        ches: compute CHES.
        progress: show a progress bar.

    Raises:
        ValueError: `batch_pairs` is not positive, or a pair is not as described; the message has its place.
        TypeError, RuntimeError: as :func:`fastdpop.attach`.
    """
    if batch_pairs < 1:
        raise ValueError(f"batch_pairs is {batch_pairs}, expected at least 1")
    rows = [_checked(i, pair, model) for i, pair in enumerate(pairs)]
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    logps: dict[str, list[Tensor]] = {side: [torch.empty(0)] * len(rows) for side in SIDES}
    states = torch.zeros(2, len(rows), dtype=torch.float64)  # CHES, as it is and normalised
    with (
        _ready(model) as heads_input,
        tqdm(total=len(rows), desc="Scoring", unit="pair", disable=not progress) as bar,
    ):
        for start in range(0, len(rows), batch_pairs):
            places = order[start : start + batch_pairs]
            (batch,) = pack(*zip(*(rows[i] for i in places), strict=True))
            kept = [places[i] for i in batch.pairs]
            for (side, column), values in zip(
                [(side, i) for side in SIDES for i in kept], _logps(model, batch), strict=True
            ):
                logps[side][column] = values
            if ches:
                states[:, kept] = _ches(heads_input(), batch)
            bar.update(len(places))
    return PairScores(
        logps["chosen"],
        logps["rejected"],
        torch.tensor([first_difference(c, r) for _, c, r in rows], dtype=torch.int64),
        *(states if ches else ()),
    )


def first_difference(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """The place of the first token that differs: the shorter length if one sequence is the beginning of the
    other, -1 if they are equal.
    """
    for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)):
        if c != r:
            return i
    return -1 if len(chosen) == len(rejected) else min(len(chosen), len(rejected))


@dataclass(frozen=True)
class ByPosition:
    """Mean log-probs by place relative to the first difference, which is place 0.

    Attributes:
        places: from ``-before`` to ``after``.
        means: of each place, over the pairs that have a token there.
    """

    places: list[int]
    means: list[Mean]


def by_position(
    scores: PairScores, before: int = 10, after: int = 20, side: str = "chosen"
) -> ByPosition:
    """Means by place around the first difference, as in figure 3 (right) of arXiv:2402.13228.

    Pairs without a difference have no such place.
    """
    tokens = _around_difference(scores, side)
    places = list(range(-before, after + 1))
    return ByPosition(
        places,
        [
            Mean.of([logps[max(0, m + k) : max(0, m + k + 1)] for logps, m in tokens])
            for k in places
        ],
    )


def around_edit(scores: PairScores, side: str = "chosen") -> dict[str, Mean]:
    """Means over the tokens before, at and after the first difference, from ``"before"``, ``"at"`` and ``"after"``.

    Pairs without a difference are left out: none of their tokens is before or after one.
    """
    parts = parts_around(scores, side)
    return {part: Mean.of([tokens[part] for tokens in parts]) for part in PARTS}


def parts_around(scores: PairScores, side: str = "chosen") -> list[dict[str, Tensor]]:
    """For each pair that has a difference, its tokens' log-probs before, at and after the first one."""
    return [
        {"before": logps[:m], "at": logps[m : m + 1], "after": logps[m + 1 :]}
        for logps, m in _around_difference(scores, side)
    ]


def _around_difference(scores: PairScores, side: str) -> list[tuple[Tensor, int]]:
    firsts = scores.first_difference.tolist()
    return [(logps, m) for logps, m in zip(scores.side(side), firsts, strict=True) if m >= 0]


def _checked(i: int, pair: Pair, model: Any) -> tuple[list[int], list[int], list[int]]:
    """The three sequences of a pair."""
    rows = len(model.get_input_embeddings().weight)
    found = []
    for field in ("prompt_ids", "chosen_ids", "rejected_ids"):
        if not isinstance(pair, Mapping) or field not in pair:
            raise ValueError(f"pairs[{i}] has no {field}, expected lists of token ids")
        ids = list(pair[field])
        if field == "prompt_ids" and not ids:
            raise ValueError(
                f"prompt_ids of pairs[{i}] is empty, expected a token that the first one follows"
            )
        if ids and not 0 <= min(ids) <= max(ids) < rows:
            raise ValueError(
                f"{field} of pairs[{i}] is {ids!r:.80}, expected ids below {rows}, the model's vocabulary"
            )
        found.append(ids)
    return found[0], found[1], found[2]


@contextlib.contextmanager
def _ready(model: Any) -> Iterator[Callable[[], Tensor]]:
    """Attached, without dropout and gradients; what it gives says what the head was last called with."""
    ours = not is_attached(model)
    if ours:
        attach(model)
    modes, seen = [(module, module.training) for module in model.modules()], {}

    def see(head: nn.Module, args: Any) -> None:
        seen["hidden"] = args[0]

    hook = model.get_output_embeddings().register_forward_pre_hook(see)
    model.eval()
    try:
        with torch.no_grad():
            yield lambda: seen["hidden"]
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training
        if ours:
            detach(model)


def _logps(model: Any, batch: PackedPairs) -> list[Tensor]:
    """The log-probs of the tokens of each of the 2P sequences."""
    out = model(
        **batch.to(next(model.parameters()).device),
        return_logps=True,
        preference_options={"reduction": "token", "dtype": torch.float64},
    )
    found: Tensor = out.logps.cpu()
    scored = batch["labels"] != IGNORE
    return [row[kept] for row, kept in zip(found, scored, strict=True)]


def _ches(hidden: Tensor, batch: PackedPairs) -> Tensor:
    """``(2, P)``: CHES, and the length-normalised one, of the head's input for a tree or, where the model
    cannot share, for a padded batch.
    """
    labels = batch["labels"].to(hidden.device)
    index = batch["prefix_tree"]["hidden_index"].to(hidden.device)
    if hidden.shape[:2] == labels.shape:
        index = torch.arange(labels.numel(), device=hidden.device).view(labels.shape)
    states = hidden.flatten(0, 1)
    rows = rows_from_labels(
        labels,
        max(int(labels.max()), 0) + 1,
        default_pairs(len(labels), labels.device),
        hidden_index=index,
        positions=len(states),
    )
    logps = states.new_zeros(len(rows.targets), dtype=torch.float64)  # of which CHES reads none
    found = Displacement(*displacement(states, logps, rows.tensors(), DEFAULT_WORKSPACE_BYTES))
    return torch.stack([found.ches, found.ches_normalised]).cpu()
