"""The numbers of a report: what is written as JSON, and what pictures and words are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdpop.analysis.gradients import PAPERS_LAMBDA, Push, push_after_edit
from fastdpop.analysis.score import (
    PARTS,
    SIDES,
    Mean,
    Pair,
    PairScores,
    around_edit,
    by_position,
    first_difference,
    parts_around,
)
from fastdpop.prefix.stats import pair_statistics

Numbers = dict[str, Any]
BEFORE, AFTER = 10, 20
"""Places around the first difference, as in figure 3 (right) of the paper."""
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


@dataclass(frozen=True)
class Scored:
    """A model, what it makes of the pairs, and what DPO's gradient would do to it."""

    name: str
    path: str
    scores: PairScores
    push: Push = field(repr=False)

    @classmethod
    def of(cls, name: str, path: str, scores: PairScores, pairs: Sequence[Pair]) -> Scored:
        """With Eq. 2 at every aligned token."""
        return cls(name, path, scores, push_after_edit(scores, pairs))


def of_pairs(pairs: Sequence[Pair]) -> Numbers:
    """What the pairs alone say."""
    prompts, chosen, rejected = (
        [list(pair[f"{side}_ids"]) for pair in pairs] for side in ("prompt", *SIDES)
    )
    found = pair_statistics(prompts, chosen, rejected, batch_pairs=len(pairs))
    both = list(zip(chosen, rejected, strict=True))
    firsts = [first_difference(c, r) for c, r in both]
    shorter = [min(len(c), len(r)) for c, r in both]
    return {
        "count": len(pairs),
        "equal": firsts.count(-1),
        "one_begins_with_the_other": sum(m == n for m, n in zip(firsts, shorter, strict=True)),
        "chosen_tokens": sum(map(len, chosen)),
        "rejected_tokens": sum(map(len, rejected)),
        "edit_distance": {
            name: {"mean": float(np.mean(values)), "median": float(np.median(values))}
            for name, values in (
                ("positional", found.positional),
                ("levenshtein", found.levenshtein),
            )
        },
    }


def of_model(model: Scored, reference: Scored | None) -> Numbers:
    """A model's numbers; of a model that is compared, also the change from the reference."""
    scores = model.scores
    return {
        "name": model.name,
        "path": model.path,
        "logps": {side: asdict(_mean_of_sums(scores.sums(side))) for side in SIDES},
        "accuracy": _share(scores.sums("chosen") > scores.sums("rejected")),
        "around_edit": _around(scores),
        "by_position": _positions(scores, relative=True),
        "wrong_way": _wrong_way(model.push),
        "ches": None if scores.ches is None else _quantiles(scores.ches),
        "ches_normalised": None
        if scores.ches_normalised is None
        else _quantiles(scores.ches_normalised),
        "change": None if reference is None else _change(scores, reference.scores),
    }


def _around(scores: PairScores) -> Numbers:
    return {
        side: {part: asdict(mean) for part, mean in around_edit(scores, side).items()}
        for side in SIDES
    }


def _positions(scores: PairScores, *, relative: bool) -> Numbers:
    """Means by place; `relative`, as in the paper's figure, also less the mean at place -1."""
    found = by_position(scores, BEFORE, AFTER)
    numbers: Numbers = {
        "place": found.places,
        "mean": [m.mean for m in found.means],
        "standard_error": [m.standard_error for m in found.means],
        "pairs": [m.pairs for m in found.means],
    }
    if relative:
        start = numbers["mean"][BEFORE - 1]
        numbers["relative"] = [
            None if start is None or mean is None else mean - start for mean in numbers["mean"]
        ]
    return numbers


def _wrong_way(push: Push) -> Numbers:
    wrong = Mean.of([x.double() for x in push.wrong_way])
    size = Mean.of(push.gradient)
    needed = torch.cat([*push.smallest_lambda, torch.empty(0, dtype=torch.float64)])
    lambdas = {
        name: _finite(float(np.quantile(needed.numpy(), q, method="higher")))
        if len(needed)
        else None
        for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    enough = {f"{lam:g}": _share(needed < lam) for lam in (0.5, 5.0, PAPERS_LAMBDA, 500.0)}
    return {
        "tokens": wrong.tokens,
        "pairs": wrong.pairs,
        "share": wrong.mean,
        "standard_error": wrong.standard_error,
        "mean_gradient": size.mean,
        "smallest_lambda": {
            **lambdas,
            "share_enough": enough,
            "share_without_any": _share(needed.isinf()),
        },
    }


def _change(scores: PairScores, reference: PairScores) -> Numbers:
    change = scores.change_from(reference)
    sums = {side: change.sums(side) for side in SIDES}
    falls = sums["chosen"] < 0
    ches = reference.ches_normalised
    return {
        **{
            side: {
                **asdict(_mean_of_sums(sums[side])),
                "median": None if not len(falls) else float(sums[side].median()),
                "parts": {
                    part: float(torch.stack([tokens[part].sum() for tokens in parts]).sum())
                    / len(scores)
                    if parts
                    else 0.0
                    for part in PARTS
                    for parts in [parts_around(change, side)]
                },
            }
            for side in SIDES
        },
        "share_of_pairs_where_chosen_fell": _share(falls),
        "accuracy": _share(sums["chosen"] > sums["rejected"]),
        "around_edit": _around(change),
        "by_position": _positions(change, relative=False),
        "rank_correlation_with_ches_normalised": None
        if ches is None
        else rank_correlation(ches, sums["chosen"]),
    }


def per_pair(
    pairs: Sequence[Pair], models: Sequence[Scored], reference: Scored | None
) -> list[Numbers]:
    """A row for each pair: its sums, its first difference and its CHES."""
    everyone = [*models, *([reference] if reference else [])]
    sums = {m.name: {side: m.scores.sums(side).tolist() for side in SIDES} for m in everyone}
    base = (reference or models[0]).scores
    return [
        {
            "place": pair.get("place"),
            "first_difference": int(base.first_difference[i]),
            "ches": None if base.ches is None else float(base.ches[i]),
            "ches_normalised": None
            if base.ches_normalised is None
            else float(base.ches_normalised[i]),
            **{
                f"{side}_logps": {name: own[side][i] for name, own in sums.items()}
                for side in SIDES
            },
        }
        for i, pair in enumerate(pairs)
    ]


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's, with the mean rank for ties; None where one of the two is constant, or of fewer than 3 pairs."""
    if len(one) < 3:
        return None
    ranks = np.stack([_ranks(x.numpy()) for x in (one, other)])
    if (ranks.std(axis=1) == 0).any():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: Any) -> Any:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]


def _mean_of_sums(sums: Tensor) -> Mean:
    """Over pairs, of log-probs of whole completions."""
    return Mean.of(list(sums[:, None]))


def _quantiles(values: Tensor) -> Numbers | None:
    if not len(values):
        return None
    found = {name: float(np.quantile(values.numpy(), q)) for name, q in QUANTILES.items()}
    return {"mean": float(values.mean()), **found}


def _share(where: Tensor) -> float | None:
    return float(where.double().mean()) if len(where) else None


def _finite(value: float) -> float | None:
    """None for an infinite one, which JSON does not have."""
    return value if math.isfinite(value) else None
