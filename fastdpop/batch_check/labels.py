"""Mistakes in the labels, which need no model: labels stand where their ids stand, -100 where none is scored."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpop.batch_check.report import Finding, between, counted
from fastdpop.batch_check.view import INTEGERS, BatchView
from fastdpop.batch_check.vocabulary import Vocabulary
from fastdpop.rows import IGNORE

_OFFSETS = (-2, -1, 1, 2, 3)
_BLANKS = 8
"""Tokens of a completion that may be nothing but an end and blanks."""


def check_ids(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    """Ids that the model's embedding has no row for: a forward would fail, on a GPU for good."""
    size, ids = vocabulary.size, view.ids.flatten()
    low, high = int(ids.min()), int(ids.max())
    if low >= 0 and (size is None or high < size):
        return []
    count = int(((ids < 0) | (ids >= (size or high + 1))).sum())
    return [
        Finding(
            "ids-out-of-vocabulary",
            "error",
            f"{count} of {len(ids)} input_ids lie outside [0, {size if size is not None else 'vocabulary'}), "
            f"from {low} to {high}",
            "Labels are masked with -100, input_ids never are"
            if low < 0
            else "Use the model's own tokenizer, or resize the model's embedding",
        )
    ]


def check_length(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    """Sequences longer than the model's context."""
    limit = vocabulary.positions
    if limit is None:
        return []
    lengths = view.attended.sum(1)
    places = view.extra.get("position_ids")
    if isinstance(places, Tensor) and places.shape == view.ids.shape:  # several texts in one row
        last = places.cpu().masked_fill(~view.attended, -1).max(1).values + 1
        lengths = torch.minimum(lengths, last)
    rows = int((lengths > limit).sum())
    if rows == 0:
        return []
    return [
        Finding(
            "longer-than-context",
            "error",
            f"{rows} of {len(view.ids)} sequences are longer than the model's context of {limit} tokens, the longest, "
            f"sequence {int(lengths.argmax())}, has {int(lengths.max())}",
            "Leave such pairs out, or cut their prompts (max_length in a trainer). A model whose rotary embeddings are "
            "stretched says so in its config (rope_scaling, or max_position_embeddings)",
        )
    ]


def check_labels(view: BatchView) -> list[Finding]:
    """What labels are, if they are not the ids at their places: a mask, shifted, or others; at most one finding."""
    marked = view.labels != IGNORE
    total, wrong = int(marked.sum()), marked & (view.labels != view.ids)
    mask = _mask(view, marked, wrong)
    if mask:
        return [mask]
    if view.label_dtype not in INTEGERS:
        return [
            Finding(
                "labels-dtype",
                "error",
                f"labels have dtype {view.label_dtype}, which the loss does not take, and in which token ids may be "
                "rounded",
                "Keep token ids in torch.int64 from the tokenizer on: a cast later does not bring them back",
            )
        ]
    if total == 0 or not bool(wrong.any()):
        return []
    for finding in (_shifted(view, marked), _other_ignore(view, wrong)):
        if finding:
            return [finding]
    s, t = wrong.nonzero()[0].tolist()
    return [
        Finding(
            "labels-differ",
            "error",
            f"{int(wrong.sum())} of {total} labels are not the ids at their places; sequence {s} has label "
            f"{int(view.labels[s, t])} at {t}, where the id is {int(view.ids[s, t])}",
            "labels are a copy of input_ids with -100 where a token is not scored: make them from the same "
            "tokenizer's output, padded alike",
        )
    ]


def _mask(view: BatchView, marked: Tensor, wrong: Tensor) -> Finding | None:
    values = set(view.labels.unique().tolist())
    if (
        not values <= {IGNORE, 0, 1}
        or not bool(wrong.any())
        or int(wrong.sum()) * 2 < int(marked.sum())
    ):
        return None
    ones = int((view.labels == 1).sum())
    return Finding(
        "labels-mask",
        "error",
        f"labels hold {sorted(values - {IGNORE})} only ({ones} ones of {view.labels.numel()}), which is a mask "
        "and not token ids",
        "Pass labels = input_ids.masked_fill(mask == 0, -100)",
    )


def _shifted(view: BatchView, marked: Tensor) -> Finding | None:
    """Labels are the ids of another place; that of their own is rarely the same token."""
    own = _agreement(view, marked, 0)
    by, share = max(
        ((k, _agreement(view, marked, k)) for k in _OFFSETS), key=lambda found: found[1]
    )
    if share < 0.9 or share - own < 0.1:
        return None
    place = "next place" if by == 1 else f"place {by:+d} from them"
    often = "twice" if by == 1 else f"{by + 1} times" if by > 0 else "the wrong way"
    return Finding(
        "labels-shifted",
        "error",
        f"{share:.0%} of the labels are the id of the {place}, {own:.0%} that of their own: labels are shifted "
        f"already, and with the loss's own shift {often}",
        "Leave labels aligned with input_ids, as Hugging Face has them: the loss shifts them. Labels that must "
        "come shifted need shift_labels=False, in the call and here",
    )


def _agreement(view: BatchView, marked: Tensor, by: int) -> float:
    """The share of the labels that are the id `by` places on, of those for which there is one."""
    width = view.ids.shape[1]
    if abs(by) >= width:
        return 0.0
    to = slice(max(-by, 0), width - max(by, 0))
    of = slice(max(by, 0), width - max(-by, 0))
    labels, kept = view.labels[:, to], marked[:, to]
    return float((labels == view.ids[:, of])[kept].float().mean()) if bool(kept.any()) else 0.0


def _other_ignore(view: BatchView, wrong: Tensor) -> Finding | None:
    """Everything that is not an id is one and the same number, in the place of -100."""
    values = view.labels[wrong].unique().tolist()
    right = (view.labels != IGNORE) & ~wrong
    if len(values) != 1 or not bool(right.any()):
        return None
    return Finding(
        "labels-ignore-index",
        "error",
        f"{int(wrong.sum())} labels are {values[0]} where the id is another, all others are ids: {values[0]} "
        "seems to mean 'not scored', and would be scored as a token",
        "Mark what is not scored with -100",
    )


def check_scored(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    """Which tokens are scored: none, padding, the prompt, everything but the end."""
    empty = (view.lengths == 0).nonzero()[:, 0].tolist()
    if len(empty) == len(view.ids):
        return [
            Finding(
                "nothing-scored",
                "error",
                f"no token of the {len(view.ids)} sequences is scored: every label is -100 (or at a first place, "
                "which nothing precedes). The loss is a constant, its gradient 0",
                "Look at how the completions are marked: a response template that is not found, or a prompt as "
                "long as the greatest length",
            )
        ]
    found = []
    if empty:
        found.append(
            Finding(
                "sequence-not-scored",
                "warning",
                f"no token is scored in {len(empty)} of {len(view.ids)} sequences, first in {empty[0]}: their "
                "log-prob is 0, which is more than any other's",
                "Give every completion a token (its end, at least), and cut prompts, not completions",
            )
        )
    return found + [
        f for check in (_padding, _prompt, _end, _empty, _twice) for f in check(view, vocabulary)
    ]


def hidden_text(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    """Tokens of a text that the attention mask hides: padding is one token, again and again."""
    masked = ~view.attended & (view.ids != (-1 if vocabulary.pad is None else vocabulary.pad))
    low = view.ids.masked_fill(~masked, torch.iinfo(torch.int64).max).min(1).values
    rows = (masked & (view.ids != low[:, None])).any(1)
    if not bool(rows.any()):
        return []
    first = int(rows.int().argmax())
    return [
        Finding(
            "text-masked",
            "error",
            f"attention_mask is 0 on {counted(int(masked[rows].sum()), 'token')} that are no padding, in "
            f"{int(rows.sum())} of {len(view.ids)} sequences, first in {first}: the model does not see them",
            "Pass a mask that is 1 on all tokens of prompt and completion and 0 on padding: not the completions' mask, "
            "nor the inverse, nor 0 and -inf",
        )
    ]


def leading_padding(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    """Padding in front that no attention mask covers, by its looks."""
    pad = vocabulary.pad
    if pad is None or not view.ids.shape[1] > 2:
        return []
    run = ((view.ids == pad) & view.attended).int().cumprod(1).sum(1)
    rows = (run >= 2) & (run < view.ids.shape[1])
    if not bool(rows.any()):
        return []
    return [
        Finding(
            "padding-attended",
            "error",
            f"{int(rows.sum())} of {len(view.ids)} sequences begin with {between(2, int(run[rows].max()))} padding "
            f"tokens ({pad}) that the model attends to"
            + ("" if view.masked else ": there is no attention_mask"),
            "Pass attention_mask, 0 on padding",
        )
    ]


def _padding(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    by_mask = view.scored & ~view.attended
    runs = _runs(view, vocabulary.pad, vocabulary)
    # Who gave a mask has said what padding is; so have labels that leave some of it out.
    told = view.masked or bool((runs & ~view.scored).any())
    guessed = view.scored & runs & (not told)
    if bool(by_mask.any()):
        count, rows = int(by_mask.sum()), int(by_mask.any(1).sum())
        how = "where attention_mask is 0"
    elif bool(guessed.any()):
        count, rows = int(guessed.sum()), int(guessed.any(1).sum())
        how = f"in runs of the padding token {vocabulary.pad} at the sequences' ends"
    else:
        return []
    return [
        Finding(
            "padding-scored",
            "error",
            f"{count} of {int(view.scored.sum())} scored tokens are padding, {how}, in {rows} of {len(view.ids)} "
            "sequences",
            "Set labels to -100 where attention_mask is 0",
        )
    ]


def _runs(view: BatchView, pad: int | None, vocabulary: Vocabulary) -> Tensor:
    """Padding by its looks: the padding token at a sequence's end, but for one that may be its end."""
    is_pad = view.ids == (-1 if pad is None else pad)
    run = is_pad.flip(1).cumprod(1).flip(1).bool()
    if pad in vocabulary.ends:
        run[:, 1:] &= run[:, :-1].clone()
        run[:, 0] = False
    return run


def _prompt(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    """Everything but a first token is scored, and both sides of a pair begin alike."""
    begin, scored = view.begins, view.scored.int().argmax(1)
    rows = [row for pair in view.pairs for row in pair if view.lengths[row] > 0]
    if not rows or any(int(scored[row] - begin[row]) > 1 for row in rows):
        return []
    # A first token that is marked as not scored is a prompt of one token.
    if not view.shifted and any(int(view.labels[row, begin[row]]) == IGNORE for row in rows):
        return []
    shared = [shared_beginning(view, c, r) for c, r in view.pairs]
    alike = [s for s, (c, r) in zip(shared, view.pairs, strict=True) if not equal(view, c, r)]
    if not alike or min(alike) < 3:
        return []
    return [
        Finding(
            "prompt-scored",
            "warning",
            f"every sequence is scored from its first token on, and chosen and rejected begin with the same "
            f"{between(min(alike), max(alike))} tokens: the prompt is scored too",
            "Set labels to -100 on the prompt: what both sides have cancels in the margin, but not in DPOP's "
            "penalty or in averages",
        )
    ]


def _end(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    """An end token behind the first scored one that is not scored, in completions of which no other one is."""
    if not vocabulary.ends or (vocabulary.pad in vocabulary.ends and not view.masked):
        return []  # without a mask it may be padding
    ends = torch.isin(view.ids, torch.tensor(sorted(vocabulary.ends)))
    behind = view.scored.int().cummax(1).values.bool() & view.attended & ends
    rows = view.lengths > 0
    left = int(((behind & ~view.scored).any(1) & ~(behind & view.scored).any(1) & rows).sum())
    if left == 0 or left * 2 < int(rows.sum()):
        return []
    return [
        Finding(
            "end-not-scored",
            "warning",
            f"in {left} of {int(rows.sum())} completions there is an end token, and it is not scored: the model does "
            "not learn to stop",
            "Score it. Where the padding token is the end token, mask labels by attention_mask and not by the id",
        )
    ]


def _empty(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    """Completions of nothing but an end, and perhaps blanks."""

    def blank(ids: list[int]) -> bool:
        rest = [token for token in ids[:_BLANKS] if token not in vocabulary.ends]
        if len(ids) > _BLANKS or len(rest) == len(ids):
            return False
        known = not rest or vocabulary.tokenizer is not None
        return known and not (rest and vocabulary.decode(rest).strip())

    rows = [row for row in range(len(view.ids)) if blank(view.ids[row][view.scored[row]].tolist())]
    if not rows:
        return []
    return [
        Finding(
            "completion-empty",
            "warning",
            f"{len(rows)} of {len(view.ids)} completions are nothing but an end, first that of sequence {rows[0]}",
            "Leave such pairs out, unless an empty answer is one that is preferred, or not",
        )
    ]


def _twice(view: BatchView, vocabulary: Vocabulary) -> list[Finding]:
    """Two tokens that begin a text, one behind the other."""
    bos = vocabulary.bos
    if bos is None or view.ids.shape[1] < 2 or bos in (vocabulary.pad, *vocabulary.ends):
        return []
    begin = view.begins
    twice = sum(
        int(at) + 1 < view.ids.shape[1] and view.ids[row, at : at + 2].tolist() == [bos, bos]
        for row, at in enumerate(begin.tolist())
    )
    if not twice:
        return []
    return [
        Finding(
            "bos-twice",
            "warning",
            f"{twice} of {len(view.ids)} sequences begin with two BOS tokens ({bos})",
            "A chat template writes one already: tokenise its text with add_special_tokens=False",
        )
    ]


def shared_beginning(view: BatchView, one: int, other: int) -> int:
    """How many tokens two sequences begin with in common."""
    a, b = (view.ids[row][view.attended[row]] for row in (one, other))
    least = min(len(a), len(b))
    return int((a[:least] == b[:least]).int().cumprod(0).sum())


def equal(view: BatchView, one: int, other: int) -> bool:
    """Whether two sequences are the same tokens."""
    a, b = (view.ids[row][view.attended[row]] for row in (one, other))
    return len(a) == len(b) and bool((a == b).all())
