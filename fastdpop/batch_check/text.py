"""A pair or two of a batch as a person reads them: what is scored, behind the end of what is not."""

from __future__ import annotations

from fastdpop.batch_check.report import between, counted
from fastdpop.batch_check.view import BatchView
from fastdpop.batch_check.vocabulary import Vocabulary

_PROMPT = 60  # characters shown of what is not scored
_SCORED = 400


def shown(view: BatchView, vocabulary: Vocabulary, pairs: int) -> list[str]:
    """Lines about the first pairs; of the first sequences where there are none."""
    named = [
        (f"pair {i}, {side}", row)
        for i, pair in enumerate(view.pairs[:pairs])
        for side, row in zip(("chosen", "rejected"), pair, strict=True)
    ]
    if not view.pairs:
        named = [(f"sequence {row}", row) for row in range(min(2 * pairs, len(view.ids)))]
    lines = []
    for name, row in named:
        lines += [name, *("    " + line for line in _sequence(view, row, vocabulary))]
    return lines


def layout(view: BatchView, vocabulary: Vocabulary) -> list[str]:
    """What the batch holds, in numbers."""
    counts, attended = view.lengths.tolist(), view.attended
    padding = int((~attended).sum())
    side = "left" if padding and not bool(attended[:, -1].logical_not().any()) else "right"
    pairs = f" in {counted(len(view.pairs), 'pair')}" if view.pairs else ", no pairs"
    outside = int((view.scored & ~attended).sum())
    facts = [
        f"{counted(len(view.ids), 'sequence')}{pairs}, {view.kind}: {sum(counts) - outside} of {int(attended.sum())} "
        f"tokens are scored{f', and {outside} of padding' if outside else ''}, {_range(counts)}"
        + (f"; {padding} of padding, on the {side}" if padding else "; no padding")
    ]
    if vocabulary.ends:
        ended = sum(
            bool(set(view.ids[row][view.scored[row]][-2:].tolist()) & vocabulary.ends)
            for row in range(len(view.ids))
        )
        facts.append(f"{ended} of {len(view.ids)} completions end with an end token, scored")
    if view.pairs:
        longer = sum(counts[c] > counts[r] for c, r in view.pairs)
        shorter = sum(counts[c] < counts[r] for c, r in view.pairs)
        facts.append(f"chosen is longer in {counted(longer, 'pair')}, rejected in {shorter}")
    return facts


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{between(low, high)} of {'each' if low == high else 'a'} sequence"


def _sequence(view: BatchView, row: int, vocabulary: Vocabulary) -> list[str]:
    """Its stretches of tokens, scored or not, and how much padding there is."""
    ids = view.ids[row].tolist()
    kinds = [
        "scored" if scored else "not scored" if attended else "padding"
        for scored, attended in zip(
            view.scored[row].tolist(), view.attended[row].tolist(), strict=True
        )
    ]
    lines, start = [], 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start]:
            continue
        kind, part = kinds[start], ids[start:end]
        count = f"{len(part):4} {kind}"
        if kind == "padding":
            lines.append(count)
        else:
            text = repr(vocabulary.decode(part))[1:-1]
            lines.append(f"{count + ':':<16} {_cut(text, kind == 'scored')}")
        start = end
    if len(lines) > 9:  # masks with many holes
        lines = [*lines[:8], f"... and {len(lines) - 8} stretches more"]
    return lines


def _cut(text: str, scored: bool) -> str:
    """The beginning and the end of what is scored, the end of what is not."""
    if scored and len(text) > _SCORED:
        return f"{text[: _SCORED // 2]} ... {text[-_SCORED // 2 :]}"
    if not scored and len(text) > _PROMPT:
        return f"... {text[-_PROMPT:]}"
    return text
