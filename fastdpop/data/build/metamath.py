"""MetaMathQA (Yu et al., "MetaMath: Bootstrap Your Own Mathematical Questions", arXiv:2309.12284)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastdpop.data.arithmetic import numbers_in, results_in
from fastdpop.data.build.common import Calculation, LeftOut, text_of

_ANSWER_LINE = re.compile(r"####|The answer is:?")
_SOLUTIONS = (
    ("query", "response"),
    ("question", "output"),
    ("question", "inv_question_pred_answer"),
)
"""The fields of question and solution in MetaMathQA and in the two forms of GSM8K_Backward."""


def read(fields: Mapping[str, Any]) -> Calculation:
    """A question with its solution, whose results stand in running text.

    Raises:
        ValueError: the row is of no form of MetaMath's.
        LeftOut: the solution does not say its answer, or another one than field ``answer``.
    """
    names = next((pair for pair in _SOLUTIONS if {*pair} <= {*fields}), None)
    if names is None:
        forms = " or ".join(" and ".join(f"'{name}'" for name in pair) for pair in _SOLUTIONS)
        raise ValueError(f"expected fields {forms} (fields here: {sorted(fields)})")
    asked, right = (text_of(fields, name) for name in names)
    original = fields.get("original_question")
    body, final = _parts(right)
    if not final:
        final = str(fields.get("answer") or "")
    elif "answer" in fields and {*numbers_in(final)}.isdisjoint(numbers_in(str(fields["answer"]))):
        raise LeftOut("a solution that ends with another answer than the right one")
    if not final:
        raise LeftOut("a solution that does not say its answer")
    return Calculation(
        asked=asked,
        prompt=f"Question: {asked}\nAnswer:",
        right=right,
        origin=original if isinstance(original, str) else asked,
        source=None,
        results=lambda: results_in(body, given={*numbers_in(asked)}, final={*numbers_in(final)}),
    )


def _parts(solution: str) -> tuple[str, str]:
    """What stands before the lines that say the answer, and these."""
    found = _ANSWER_LINE.search(solution)
    if found is None:
        return solution, ""
    return solution[: found.start()], solution[found.start() :]
