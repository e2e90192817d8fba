"""Mistakes in how sequences make pairs, which need no model."""

from __future__ import annotations

from fastdpop.batch_check.labels import equal, first_tokens, shared_beginning
from fastdpop.batch_check.report import Finding
from fastdpop.batch_check.view import BatchView

_MORE = 8
"""Tokens that neighbours must begin with in common beyond what pairs do, to be taken for the pairs. Sequences of the
same task begin alike anyway."""


def check_pairs(view: BatchView, given: bool = False) -> list[Finding]:
    """Pairs whose sides do not belong together, or are the same.

    Args:
        given: which sequences are pairs was said, and does not follow from their order.
    """
    if not view.pairs:
        if given or len(view.ids) % 2 == 0:
            return []
        return [
            Finding(
                "odd-rows",
                "error",
                f"the batch holds {len(view.ids)} sequences, an odd number",
                "Give every chosen sequence its rejected one: all chosen first, then all rejected",
            )
        ]
    if not given and _interleaved(view):
        return [
            Finding(
                "interleaved",
                "error",
                f"sequences 0 and 1, 2 and 3, ... follow the same prompts, sequences i and i + {len(view.ids) // 2} "
                "do not: chosen and rejected alternate",
                "Put all chosen sequences first and then all rejected ones, as torch.cat([chosen, rejected]) does, or "
                "name the pairs: pairs=[(0, 1), (2, 3), ...]",
            )
        ]
    return [*_prompts(view), *_same(view)]


def _interleaved(view: BatchView) -> bool:
    """Whether neighbours, and not the two halves, belong together."""
    neighbours = [(2 * i, 2 * i + 1) for i in range(len(view.ids) // 2)]
    if len(neighbours) < 2:
        return False
    if all(_prompt(view, row) for row in range(len(view.ids))):
        together = [_prompt(view, a) == _prompt(view, b) for a, b in neighbours]
        apart = [_prompt(view, a) != _prompt(view, b) for a, b in view.pairs]
        return all(together) and sum(apart) * 2 > len(apart)
    # Prompts are scored, or there are none.
    near, far = (
        sum(shared_beginning(view, a, b) for a, b in pairs) / len(pairs)
        for pairs in (neighbours, view.pairs)
    )
    return near >= far + _MORE


def _prompt(view: BatchView, row: int) -> tuple[int, ...]:
    """The tokens before the first scored one, but for one alone, which begins every text."""
    begin = int(first_tokens(view)[row])
    end = int(view.scored[row].int().argmax())
    return tuple(view.ids[row, begin:end].tolist()) if end - begin > 1 else ()


def _prompts(view: BatchView) -> list[Finding]:
    differ = [i for i, (c, r) in enumerate(view.pairs) if _prompt(view, c) != _prompt(view, r)]
    scored = all(view.lengths[row] > 0 for pair in view.pairs for row in pair)
    if not scored or not differ:
        return []
    return [
        Finding(
            "prompts-differ",
            "warning",
            f"in {len(differ)} of {len(view.pairs)} pairs chosen and rejected do not follow the same prompt, first "
            f"in pair {differ[0]}",
            "A preference compares two answers to one prompt: look at the order of the sequences, and at where "
            "labels begin",
        )
    ]


def _same(view: BatchView) -> list[Finding]:
    same = [i for i, (c, r) in enumerate(view.pairs) if equal(view, c, r)]
    if not same:
        return []
    every = len(same) == len(view.pairs)
    return [
        Finding(
            "chosen-equals-rejected",
            "error" if every else "warning",
            f"chosen and rejected are the same tokens in {len(same)} of {len(view.pairs)} pairs"
            + ("" if every else f", first in pair {same[0]}")
            + ": their margin is 0 whatever the model",
            "Leave such pairs out"
            + (
                ". Where all are, a column was read twice, or both were cut before they differ"
                if every
                else ""
            ),
        )
    ]
