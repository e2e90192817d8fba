"""Rankings of several completions of one prompt.

A ranking ``y_1 > y_2 > ... > y_K`` is given as the chain of its neighbours, the pairs ``(y_1, y_2)``,
``(y_2, y_3)`` ... ``(y_(K-1), y_K)``, each of which has the list's number as its value ``"list"``;
:func:`ranked` makes both. Pairs that share a sequence are computed together, so a loss always has the
whole list before it.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.library import custom_op

from .algebra import smoothed_nll
from .base import PairLogps, Traits
from .options import CheckedLoss, noise_rate, positive
from .shifts import given

LIST = "list"
_PLACE = "place in the list"
# Lists of other processes are other lists; float64 has room for both numbers.
_LISTS_OF_A_PROCESS = 2**32


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(CheckedLoss):
    """``-log(exp(b_k) / sum_(j >= k) exp(b_j))`` for the pair ``(y_k, y_(k+1))`` of a list, with ``b =
    beta * (log pi - log ref)``: the probability that y_k is taken first of what is left of its list.
    Summed over the pairs of a list it is DPO's loss of a whole ranking under the Plackett-Luce model
    (arXiv:2305.18290, appendix A.3); a list of two is DPO, bit for bit.

    ``label_smoothing`` e is cDPO's, in each choice: with probability e the first is not the one taken.
    """

    beta: float = positive(0.1)
    label_smoothing: float = noise_rate(0.0)
    _traits: ClassVar[Traits] = Traits(reads=(LIST,), needs=(LIST,))

    def __call__(self, pairs: PairLogps) -> Tensor:
        lists = given(pairs, LIST)
        # Alone, without a layout that knows the sequences, pairs stand in the order of their list.
        place = pairs.values.get(_PLACE)
        if place is None:
            place = torch.arange(len(lists), device=lists.device)
        behind = (lists[:, None] == lists) & (place[:, None] < place)
        r_w, r_l = pairs.chosen_logratios, pairs.rejected_logratios
        # y_(k+1) is the rejected side, and those behind it are the rejected sides of the pairs behind.
        others = (self.beta * (r_l - r_l[:, None])).masked_fill(~behind, -torch.inf)
        above = torch.cat([torch.zeros_like(r_l)[:, None], others], dim=1).logsumexp(dim=1)
        return smoothed_nll(self.beta * (r_w - r_l) - above, self.label_smoothing)


def ranked(lists: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Rankings as the pairs and the values that a call takes.

        pairs, values = ranked([[0, 1, 2], [4, 3]])
        fused_preference_loss(..., loss="plackett_luce", pairs=pairs, pair_values=values)

    Args:
        lists: the sequences of each list, best first.

    Returns:
        ``(P, 2)`` int64 chosen and rejected sequence of each pair, a list of K giving K - 1, and
        ``{"list": (P,) int64}``.

    Raises:
        ValueError: a list is none of indices, has fewer than two, or one of them twice.
    """
    for number, sequences in enumerate(lists):
        if (
            not isinstance(sequences, Sequence)
            or not all(type(sequence) is int and sequence >= 0 for sequence in sequences)
            or not 2 <= len(sequences) == len(set(sequences))
        ):
            raise ValueError(
                f"lists[{number}] is {sequences!r}, expected the indices of at least two sequences, each of them once"
            )
    pairs = [pair for sequences in lists for pair in itertools.pairwise(sequences)]
    numbers = [number for number, of in enumerate(lists) for _ in of[1:]]
    return (
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        {LIST: torch.tensor(numbers, dtype=torch.int64)},
    )


def placed(pairs: Tensor, values: Mapping[str, Tensor], process: int) -> dict[str, Tensor]:
    """The values with what :class:`PlackettLuce` reads beside them: which pair of its list each is, in
    whatever order they come.

    Args:
        pairs: ``(P, 2)`` chosen and rejected sequence.
        values: among them ``"list"``.
        process: the number of this process, whose lists are no other's.

    Raises:
        ValueError: the pairs of a list are no chain.
    """
    lists, place = places(pairs, values[LIST])
    return {**values, LIST: lists + process * _LISTS_OF_A_PROCESS, _PLACE: place}


@custom_op("fastdpop::places", mutates_args=())
def places(pairs: Tensor, lists: Tensor) -> tuple[Tensor, Tensor]:
    """The lists numbered from 0, and the place of each pair in its list from 0; ``(P,)`` each, in the
    dtype of `lists`. An operator, since what depends on values is none of a compiler's business.
    """
    sides: list[list[int]] = pairs.tolist()
    of_list: dict[float, list[int]] = {}
    for pair, name in enumerate(lists.tolist()):
        of_list.setdefault(name, []).append(pair)
    number, place = [0] * len(sides), [0] * len(sides)
    for count, (name, own) in enumerate(of_list.items()):
        chain = _chain({pair: sides[pair] for pair in own})
        if chain is None:
            raise ValueError(
                f"pair_values['list'] is {name:.17g} for the pairs {reprlib.repr([sides[p] for p in own])}, "
                "expected a chain [y1, y2], [y2, y3], ... of sequences, as fastdpop.losses.ranked makes it"
            )
        for rank, pair in enumerate(chain):
            number[pair], place[pair] = count, rank
    return lists.new_tensor(number), lists.new_tensor(place)


def _chain(sides: Mapping[int, Sequence[int]]) -> list[int] | None:
    """The pairs of a list in its order; None if they are no chain."""
    by_chosen = {chosen: pair for pair, (chosen, _) in sides.items()}
    behind = {rejected for _, rejected in sides.values()}
    (*best,) = by_chosen.keys() - behind
    if not len(by_chosen) == len(behind) == len(sides) or len(best) != 1:
        return None
    chain, sequence = [], best[0]
    while sequence in by_chosen:
        chain.append(by_chosen[sequence])
        sequence = sides[chain[-1]][1]
    return chain if len(chain) == len(sides) else None  # else a circle stands beside it


@places.register_fake
def _(pairs: Tensor, lists: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lists), torch.empty_like(lists)
