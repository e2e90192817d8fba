"""Pairs as a reader sees them: decoded, the edit framed, each token in the colour of a number."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from fastdpop.analysis.gradients import Push, aligned
from fastdpop.analysis.score import SIDES, Pair, PairScores
from fastdpop.analysis.words import signed

PROMPT_SHOWN = 400
"""Characters of a prompt, its last ones."""
STRONGEST = 2.0
"""Nats of a token's change at which its colour is the strongest."""


def fallen(change: PairScores, count: int) -> list[int]:
    """The pairs whose chosen log-prob fell most, the first one most; only those where it fell."""
    sums = change.sums("chosen") if len(change) else torch.empty(0)
    return [i for i in sums.argsort().tolist()[:count] if sums[i] < 0]


def riskiest(scores: PairScores, count: int) -> list[int]:
    """The pairs with the highest length-normalised CHES; only those that differ."""
    assert scores.ches_normalised is not None
    order = scores.ches_normalised.argsort(descending=True).tolist()
    return [i for i in order if scores.first_difference[i] >= 0][:count]


def by_change(pair: Pair, change: PairScores, i: int, tokenizer: Any) -> str:
    """A pair whose tokens have the colour of the change of their log-prob."""
    values = [change.side(side)[i] for side in SIDES]
    notes = [[f"{signed(x)} nats" for x in own.tolist()] for own in values]
    return _pair(pair, values, notes, STRONGEST, tokenizer)


def by_push(pair: Pair, push: Push, i: int, tokenizer: Any) -> str:
    """A pair whose aligned tokens after the edit have the colour of DPO's gradient at their own logit."""
    values = [torch.zeros(len(pair[f"{side}_ids"]), dtype=torch.float64) for side in SIDES]
    notes = [[""] * len(own) for own in values]
    places = push.places[i].tolist()
    for (c, r), w, other, up in zip(
        places,
        push.chosen[i].tolist(),
        push.rejected[i].tolist(),
        push.gradient[i].tolist(),
        strict=True,
    ):
        for side, k in enumerate((c, r)):
            values[side][k] = up
            notes[side][k] = f"s_w {w:.3f}, s_l {other:.3f}"
    return _pair(pair, values, notes, 1.0, tokenizer)


def _pair(
    pair: Pair,
    values: Sequence[Tensor],
    notes: Sequence[Sequence[str]],
    strongest: float,
    tokenizer: Any,
) -> str:
    prompt = tokenizer.decode(pair["prompt_ids"])
    cut = "\N{HORIZONTAL ELLIPSIS}" if len(prompt) > PROMPT_SHOWN else ""
    html = [f'<p class="prompt">{escape(cut + prompt[-PROMPT_SHOWN:])}</p>']
    edited = _edited(pair)
    for side, name in enumerate(SIDES):
        ids = pair[f"{name}_ids"]
        html.append(f"<h3>{name.capitalize()}</h3>")
        html.append(
            _tokens(pieces(ids, tokenizer), values[side], notes[side], edited[side], strongest)
        )
    return "\n".join(html)


def _edited(pair: Pair) -> list[set[int]]:
    """Of each side, the places of the tokens that the other one does not have."""
    sides = [list(pair[f"{side}_ids"]) for side in SIDES]
    common = 0
    for c, r in zip(*sides, strict=False):
        if c != r:
            break
        common += 1
    same = common < max(map(len, sides))
    kept = aligned(sides[0], sides[1], common if same else -1)
    return [
        set(range(common, len(ids))) - set(kept[:, k].tolist()) if same else set()
        for k, ids in enumerate(sides)
    ]


def pieces(ids: Sequence[int], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """The text of tokens, and which tokens it is of: letters that several tokens make are one piece."""
    found: list[tuple[str, list[int]]] = []
    done, members = "", []
    for k in range(len(ids)):
        members.append(k)
        text = tokenizer.decode(ids[: k + 1], clean_up_tokenization_spaces=False)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or k == len(ids) - 1
        if whole and text.startswith(done):
            found.append((text[len(done) :], members))
            done, members = text, []
    if members:  # a decoder that changes what it has written
        found.append((tokenizer.decode([ids[k] for k in members]), members))
    return found


def _tokens(
    found: Sequence[tuple[str, list[int]]],
    values: Tensor,
    notes: Sequence[str],
    edited: set[int],
    strongest: float,
) -> str:
    spans = []
    for text, members in found:
        value = float(values[members].sum())
        alpha = min(abs(value) / strongest, 1.0) * 0.6
        note = "; ".join(notes[k] for k in members if notes[k])
        look = (
            f' class="{"fall" if value < 0 else "rise"}" style="--a:{alpha:.2f}"'
            if alpha >= 0.01
            else ""
        )
        title = f' title="{escape(note)}"' if note else ""
        span = f"<span{look}{title}>{escape(text)}</span>"
        spans.append(f"<mark>{span}</mark>" if edited & set(members) else span)
    return f'<p class="tokens">{"".join(spans) or "<small>(empty)</small>"}</p>'
