"""What is measured of a model: log-probs of pairs, and answers to multiple-choice questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpop.analysis.score import (
    SIDES,
    Mean,
    PairScores,
    around_edit,
    by_position,
    parts_around,
    score_pairs,
)
from recipes.smaug.data import Group, Row

Numbers = dict[str, Any]
BEFORE, AFTER = 10, 20
"""Places around the edit of figure 3 (right)."""


def sums_of(scores: PairScores) -> Tensor:
    """``(2, P)`` float64: log-probs of chosen and of rejected completions."""
    return torch.stack([scores.sums(side) for side in SIDES])


def pair_numbers(scores: PairScores, untrained: Tensor) -> Numbers:
    """Means over pairs, in nats.

    Args:
        scores: of P pairs.
        untrained: ``(2, P)`` log-probs of the model before training.

    Returns:
        For each side ``sum`` (log-prob of a completion), ``per_token`` (mean over all tokens), ``before``,
        ``at`` and ``after`` (mean over the tokens around the first difference), ``end`` (the last token, which
        ends the text) and ``after_text`` (``after`` without it), each with a standard error over pairs in
        ``errors``, and the log-ratio ``change`` against the untrained model; ``told_apart``, the share of pairs
        whose chosen completion has gained more than the rejected one, and ``likelier``, the share of those in
        which it is the likelier one.
    """
    sums = sums_of(scores)
    changes = sums - untrained
    found: Numbers = {}
    for side, own, change in zip(SIDES, sums, changes, strict=True):
        means = {
            "sum": _mean(own),
            "change": _mean(change),
            "per_token": Mean.of(scores.side(side)),
            **around_edit(scores, side),
            "after_text": Mean.of([part["after"][:-1] for part in parts_around(scores, side)]),
            "end": Mean.of([logps[-1:] for logps in scores.side(side)]),
        }
        found[side] = {name: mean.mean for name, mean in means.items()}
        found[side]["errors"] = {name: mean.standard_error for name, mean in means.items()}
    found["told_apart"] = float((changes[0] > changes[1]).double().mean())
    found["likelier"] = float((sums[0] > sums[1]).double().mean())
    return found


def _mean(values: Tensor) -> Mean:
    """Over pairs."""
    return Mean.of(list(values[:, None]))


def position_numbers(scores: PairScores) -> Numbers:
    """Mean chosen log-probs by place around the edit."""
    found = by_position(scores, BEFORE, AFTER)
    return {
        "places": found.places,
        "means": [mean.mean for mean in found.means],
        "pairs": [mean.pairs for mean in found.means],
    }


def score(model: Any, rows: Sequence[Row]) -> PairScores:
    """Without CHES, which needs no training to be known."""
    return score_pairs(model, rows, batch_pairs=8, ches=False)


def answer_questions(model: Any, questions: Sequence[Group], *, batch: int = 16) -> Numbers:
    """Multiple-choice accuracy by log-likelihood, as EleutherAI's lm-evaluation-harness defines it.

    ``acc``: the answer with the greatest log-prob is the right one; ``acc_norm``: the one with the greatest
    log-prob per character. No end of text is scored behind an answer.

    Args:
        model: a language model with fastdpop attached.
        questions: the pairs of each; the right answer is chosen in all of them.
        batch: questions in a forward pass.

    Returns:
        ``acc``, ``acc_norm``, ``questions``, and a string of 0 and 1 for each, ``right`` and ``right_norm``,
        in the order of the questions.
    """
    asked = [_Question(group) for group in questions]
    order = sorted(range(len(asked)), key=lambda i: asked[i].length)
    right, right_norm = ["0"] * len(asked), ["0"] * len(asked)
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        logps = iter(_answers_logps(model, [asked[i] for i in places]))
        for i in places:
            own = torch.tensor([next(logps) for _ in asked[i].answers], dtype=torch.float64)
            right[i] = str(int(own.argmax() == 0))
            right_norm[i] = str(int((own / asked[i].characters).argmax() == 0))
    return {
        "acc": right.count("1") / len(right),
        "acc_norm": right_norm.count("1") / len(right),
        "questions": len(right),
        "right": "".join(right),
        "right_norm": "".join(right_norm),
    }


class _Question:
    """A prompt and its answers without their ends of text, the right one first."""

    def __init__(self, group: Group) -> None:
        first = group[0]
        self.prompt = list(first["prompt_ids"])
        completions = [first["chosen_ids"], *(pair["rejected_ids"] for pair in group)]
        self.answers = [list(ids)[:-1] for ids in completions]
        lengths = [first["chosen_characters"], *(pair["rejected_characters"] for pair in group)]
        self.characters = torch.tensor(lengths, dtype=torch.float64)
        self.length = len(self.prompt) + sum(map(len, self.answers))


def _answers_logps(model: Any, questions: Sequence[_Question]) -> list[float]:
    """The log-prob of each answer, question by question, prompts shared."""
    sequences = [(q.prompt, answer) for q in questions for answer in q.answers]
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    shape = (len(sequences), width)
    ids, mask, labels = (
        torch.zeros(shape).long(),
        torch.zeros(shape).long(),
        torch.full(shape, -100),
    )
    for i, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
    out = model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        return_logps=True,
        preference_options={"share_prefixes": True},
    )
    found: list[float] = out.logps.tolist()
    return found
