"""Mistakes in how sequences make pairs, which need no model."""

from __future__ import annotations

from fastdpop.batch_check.labels import equal, shared_beginning
from fastdpop.batch_check.report import Finding, counted
from fastdpop.batch_check.view import BatchView

_MORE = 8
"""Tokens that neighbours must begin with in common beyond what pairs do, to be taken for the pairs. Sequences of the
same task begin alike anyway."""
_REPEATED = 4
"""Tokens of a prompt that a completion must begin with, to be taken for a repetition."""


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
                f"the batch holds {counted(len(view.ids), 'sequence')}, an odd number",
                "Give every chosen sequence its rejected one: all chosen first, then all rejected. One sequence behind "
                "the other in one row needs cu_seqlens=",
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
    return [*_prompts(view), *_repeated_prompt(view), *_same(view), *_twice(view)]


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
    begin = int(view.begins[row])
    end = int(view.scored[row].int().argmax())
    return tuple(view.ids[row, begin:end].tolist()) if end - begin > 1 else ()


def _prompts(view: BatchView) -> list[Finding]:
    differ = [i for i, (c, r) in enumerate(view.pairs) if _prompt(view, c) != _prompt(view, r)]
    scored = all(view.lengths[row] > 0 for pair in view.pairs for row in pair)
    if not scored or not differ:
        return []
    later = [i for i in differ if _one_text(view, *view.pairs[i])]
    if len(later) == len(differ):
        return [
            Finding(
                "labels-begin-apart",
                "warning",
                f"in {len(differ)} of {len(view.pairs)} pairs chosen and rejected begin with the same tokens, of which "
                f"more are scored on one side, first in pair {differ[0]}",
                "Let the labels of both sides begin where the completion does, behind the prompt that they share",
            )
        ]
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


def _one_text(view: BatchView, one: int, other: int) -> bool:
    """Whether the longer of two prompts is in both sequences."""
    longest = max(len(_prompt(view, row)) for row in (one, other))
    return shared_beginning(view, one, other) >= longest


def _repeated_prompt(view: BatchView) -> list[Finding]:
    """Completions that begin with their whole prompt, as of columns that hold the whole text."""
    repeated = [
        i for i, pair in enumerate(view.pairs) if all(_begins_anew(view, row) for row in pair)
    ]
    if len(repeated) * 2 < max(len(view.pairs), 1):
        return []
    return [
        Finding(
            "prompt-repeated",
            "warning",
            f"in {len(repeated)} of {len(view.pairs)} pairs both completions begin with the whole prompt, first in "
            f"pair {repeated[0]}: it stands there twice, and is scored",
            "Cut the prompt off: a completion is only what follows it",
        )
    ]


def _begins_anew(view: BatchView, row: int) -> bool:
    """Whether a completion begins with its prompt; a token at each end may be another, as BOS is, or a blank."""
    prompt = _prompt(view, row)
    completion = view.ids[row][view.scored[row]].tolist()
    return any(
        end - begin >= _REPEATED
        and tuple(completion[skipped : skipped + end - begin]) == prompt[begin:end]
        for begin in (0, 1)
        for end in (len(prompt), len(prompt) - 1)
        for skipped in (0, 1)
    )


def _twice(view: BatchView) -> list[Finding]:
    """Pairs that are in the batch again, or the other way round."""
    keys = [tuple(view.ids[row][view.attended[row]].tolist()) for row in range(len(view.ids))]
    seen: dict[tuple[tuple[int, ...], ...], int] = {}
    again, against = [], []
    for i, (c, r) in enumerate(view.pairs):
        pair, other = (keys[c], keys[r]), (keys[r], keys[c])
        if pair in seen:
            again.append((seen[pair], i))
        if other in seen and pair != other:
            against.append((seen[other], i))
        seen.setdefault(pair, i)
    found = []
    if against:
        found.append(
            Finding(
                "pairs-contradict",
                "warning",
                f"{len(against)} of {len(view.pairs)} pairs say the opposite of another: in pairs {against[0][0]} and "
                f"{against[0][1]} chosen and rejected are exchanged",
                "Keep one of the two: what one of them teaches, the other takes back",
            )
        )
    if again:
        found.append(
            Finding(
                "pairs-repeated",
                "warning",
                f"{len(again)} of {len(view.pairs)} pairs are in the batch already: pair {again[0][1]} is pair "
                f"{again[0][0]}",
                "Leave repetitions out, unless they are meant as a weight",
            )
        )
    return found


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
