"""ARC (Clark et al., "Think you have Solved Question Answering? Try ARC", arXiv:1803.05457)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdpop.data.build.common import Choice, checked, name_of, text_of, texts_of, without


def read(fields: Mapping[str, Any]) -> Choice:
    """A question with its wrong answers, written as the lm-evaluation-harness does.

    Rows are AI2's (``question`` with ``stem`` and ``choices``, ``answerKey``), those of the data set
    ``allenai/ai2_arc`` (``choices`` with ``text`` and ``label``, ``answerKey``) or plain (``choices``, a list
    of texts, and the number of the right one, from 0, as ``label``).

    Raises:
        ValueError: the row is of no such form.
    """
    question, choices = fields.get("question"), fields.get("choices")
    if isinstance(question, dict):
        choices = question.get("choices")
        question = checked(question.get("stem"), "field 'question.stem'")
    else:
        question = text_of(fields, "question")
    if choices is None:
        raise ValueError(f"field 'choices' is missing (fields here: {sorted(fields)})")
    texts, labels = _choices(choices)
    key = "label" if labels is None else "answerKey"
    expected = [*range(len(texts))] if labels is None else labels
    if fields.get(key) not in expected or isinstance(fields[key], bool):
        raise ValueError(f"field '{key}' is {fields.get(key)!r:.80}, expected one of {expected}")
    right = expected.index(fields[key])
    prompt = f"Question: {question}\nAnswer:"
    return Choice(
        asked=question,
        prompt=prompt,
        right=texts[right],
        origin=question,
        source=name_of(fields, "id"),
        wrong=without(texts, right),
    )


def _choices(choices: Any) -> tuple[list[str], list[Any] | None]:
    """The texts, and their labels where they have some."""
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
    elif isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        texts, labels = ([choice.get(name) for choice in choices] for name in ("text", "label"))
    else:
        return texts_of(choices, "field 'choices'"), None
    texts = texts_of(texts, "field 'choices', 'text',")
    labels = texts_of(labels, "field 'choices', 'label',")
    if len(texts) != len(labels) or len({*labels}) < len(labels):
        raise ValueError(f"field 'choices' has {len(texts)} texts under the labels {labels}")
    return texts, labels
