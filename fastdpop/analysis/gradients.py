"""Which way DPO's and DPOP's gradients push the tokens after an edit (arXiv:2402.13228, section 3 and appendix B).

Chosen and rejected have the same tokens after an edit, in other contexts. With ``s_w`` and ``s_l`` the
probability of such a token ``t_k`` after the chosen and after the rejected prefix, DPO's gradient with respect
to the token's own logit (Eq. 2 with ``j = t_k``) is

    d/dz [log pi(t_k | y_w<k) - log pi(t_k | y_l<k)] = s_l - s_w

up to the loss's positive factor: where ``s_w > s_l``, which is what a good model has, the correct token's logit
goes down. DPOP with the hinge on (appendix B.2) has

    (1 + lambda) (1 - s_w) - (1 - s_l),

which is positive, upwards, for ``lambda > (s_w - s_l) / (1 - s_w)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from fastdpop.analysis.score import SIDES, Pair, PairScores

PAPERS_LAMBDA = 50.0
"""Of section 6; the authors see little difference over [5, 500]."""


@dataclass(frozen=True)
class Push:
    """The aligned tokens of P pairs: those that stand on both sides after the first difference.

    Attributes:
        places: of each pair, ``(K, 2)`` int64 places within the chosen and the rejected completion.
        chosen, rejected: of each pair, ``(K,)`` float64 probabilities ``s_w`` and ``s_l``.
        smallest_lambda: of each pair, ``(K,)`` float64: beyond it DPOP's gradient points upwards; 0 where
            DPO's own does not point downwards, infinite where ``s_w`` is 1 and ``s_l`` is not.
    """

    places: list[Tensor]
    chosen: list[Tensor]
    rejected: list[Tensor]
    smallest_lambda: list[Tensor]

    @property
    def wrong_way(self) -> list[Tensor]:
        """Of each pair, ``(K,)`` bool: DPO lowers the correct token's logit."""
        return [w > r for w, r in zip(self.chosen, self.rejected, strict=True)]

    @property
    def gradient(self) -> list[Tensor]:
        """Of each pair, ``(K,)`` float64: ``s_l - s_w``, how far DPO pushes the correct token's logit up."""
        return [r - w for w, r in zip(self.chosen, self.rejected, strict=True)]


def push_after_edit(scores: PairScores, pairs: Sequence[Pair]) -> Push:
    """Eq. 2 and appendix B.2 at every aligned token of the pairs that were scored."""
    places = [
        aligned(pair["chosen_ids"], pair["rejected_ids"], m)
        for pair, m in zip(pairs, scores.first_difference.tolist(), strict=True)
    ]
    chosen, rejected = (
        [
            tokens[place[:, i]].clamp_max(
                0
            )  # those of near certain tokens may be rounded to above 0
            for tokens, place in zip(scores.side(side), places, strict=True)
        ]
        for i, side in enumerate(SIDES)
    )
    return Push(
        places,
        [x.exp() for x in chosen],
        [x.exp() for x in rejected],
        [smallest_lambda(w, r) for w, r in zip(chosen, rejected, strict=True)],
    )


def aligned(chosen: Sequence[int], rejected: Sequence[int], first: int) -> Tensor:
    """``(K, 2)`` places of the tokens that both completions have in common after the first difference.

    An edit may change the number of tokens, so places are aligned by the longest stretches that are equal.

    Args:
        first: the place of the first difference; -1 if there is none, and then nothing is after it.
    """
    if first < 0:
        return torch.empty(0, 2, dtype=torch.int64)
    matcher = SequenceMatcher(None, chosen[first:], rejected[first:], autojunk=False)
    places = [
        (first + block.a + k, first + block.b + k)
        for block in matcher.get_matching_blocks()
        for k in range(block.size)
    ]
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 2)


def smallest_lambda(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """Lambda beyond which DPOP's gradient raises the correct token's logit while the hinge is on.

    ``(s_w - s_l) / (1 - s_w)``, from ``(1 + lambda) (1 - s_w) > (1 - s_l)``; 0 where that is negative,
    infinite where ``s_w = 1 > s_l``.

    Args:
        chosen_logps, rejected_logps: log-probs, at most 0, of the same tokens after either prefix, of one shape.
    """
    # 1 - exp() would lose what is left of 1.
    miss_w, miss_l = (torch.expm1(x).abs() for x in (chosen_logps, rejected_logps))
    return torch.where(miss_w < miss_l, miss_l / miss_w - 1, torch.zeros_like(miss_w))
