"""GSM8K (Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdpop.data.arithmetic import Result, numbers_in, results_in
from fastdpop.data.build.common import Calculation, text_of
from fastdpop.data.gsm8k import annotated_results, without_annotations


def read(fields: Mapping[str, Any]) -> Calculation:
    """A problem (``question``) with its solution (``answer``).

    Results are those with an annotation, or else, as in MetaMath, those that stand in running text.

    Raises:
        ValueError: the row is of another form.
    """
    question, answer = text_of(fields, "question"), text_of(fields, "answer")
    if "####" not in answer:
        raise ValueError(
            f"field 'answer' is {answer!r:.80}, expected a solution that ends with a line '#### N'"
        )
    right = without_annotations(answer)
    body, _, final = right.rpartition("####")

    def results() -> Sequence[Result]:
        values = {"given": {*numbers_in(question)}, "final": {*numbers_in(final)}}
        annotated = annotated_results(answer, final=values["final"])
        return annotated or results_in(body, **values)

    return Calculation(
        asked=question,
        prompt=f"Question: {question}\nAnswer:",
        right=right,
        origin=question,
        source=None,
        results=results,
    )
