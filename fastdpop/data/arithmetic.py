"""Calculations in solutions of word problems: where a result stands, whether it is right, and how to
make it wrong.

Rejected completions of the DPOP paper are chosen ones with one intermediate result made wrong
(arXiv:2402.13228, Appendix D).
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Collection, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

ERRORS = (-10, -5, -3, -2, -1, 1, 2, 3, 5, 10)
"""By how much a wrong result may be off."""
NUMBER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|0|[1-9]\d*)(?:\.\d+)?"
"""A number without sign as it is written: 7, 1,250 or 0.20, but not 007 or .5."""
_DIGITS = 20
"""The most that a result has: more than a word problem needs, fewer than ``Decimal`` rounds."""


class Result(NamedTuple):
    """The result of a calculation.

    Attributes:
        start: where its number begins, without a sign or a unit.
        text: the number as it is written there (of a fraction, the numerator).
        truth: what it should be, unrounded and without the sign; None where that is not known.
    """

    start: int
    text: str
    truth: Fraction | None


class Edit(NamedTuple):
    """A number of a text that is replaced: where it begins, as it was, and what takes its place."""

    start: int
    right: str
    wrong: str

    def applied(self, text: str) -> str:
        """The text with it."""
        return text[: self.start] + self.wrong + text[self.start + len(self.right) :]


def is_right(text: str, truth: Fraction) -> bool:
    """Whether a written number is another one rounded to as many places, up or down."""
    return abs(value_of(text) - truth) < Fraction(1, 10 ** _places(text))


def made_wrong(result: Result, rng: random.Random) -> Edit:
    """A wrong value in the same form: above 0, with as many places, with commas if there were some."""
    right = value_of(result.text)
    errors = [
        error
        for error in ERRORS
        if right + error > 0
        and not (result.truth is not None and _rounds_to(right + error, result))
    ]
    wrong = Decimal(result.text.replace(",", "")) + rng.choice(errors)
    # f: 1.0000001 - 1 is no 1E-7.
    return Edit(result.start, result.text, f"{wrong:,f}" if "," in result.text else f"{wrong:f}")


def can_be_made_wrong(text: str) -> bool:
    """Whether a written number is short enough for :func:`made_wrong`: of at most 20 digits."""
    return sum(map(str.isdigit, text)) <= _DIGITS


def _rounds_to(value: Fraction, result: Result) -> bool:
    # 2.5 may be written as 2, and then 3 is not wrong either.
    assert result.truth is not None
    return abs(value - result.truth) < Fraction(1, 10 ** _places(result.text))


def value_of(text: str) -> Fraction:
    """The value of a written number, exact for any number of digits."""
    return Fraction(Decimal(text.replace(",", "")))  # int() takes 4,300 digits


def _places(text: str) -> int:
    return len(text.partition(".")[2])


# ----------------------------------------------------------------------------------------- evaluation

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ARITHMETIC = re.compile(r"[\d.+*/() -]{1,300}")
_BRACES = (
    (re.compile(r"\\text\s*\{[^{}]*\}"), " "),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\^\s*\{([^{}]*)\}"), r"**(\1)"),
)
_REWRITTEN = (
    (re.compile(r"\\(?:left|right|[,;!:()\[\]\\])|\\?\$|&"), " "),
    (re.compile(r"\\(?:cdot|times)(?![a-z])|[×·]"), "*"),
    (re.compile(r"\\div(?![a-z])|÷"), "/"),
    (re.compile(r"−"), "-"),
    (re.compile(r"\^"), "**"),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<![\d.])(\d*\.?\d+)\s*\\?%"), r"(\1/100)"),
    (re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(.])"), "*"),
    (re.compile(r"(?<=[\d)])\s*of(?: the)?\s*(?=[\d(])"), "*"),
    (re.compile(r"(?<=[\d)])\s*\("), "*("),
    (re.compile(r"\)\s*(?=[\d.])"), ")*"),
    (re.compile(r"\s*/\s*(?:per\s+)?[A-Za-z]{2,}"), " "),  # dollars/hour
    (re.compile(r"[A-Za-z][A-Za-z'’-]*[A-Za-z'’]"), " "),
)


def evaluate(expression: str) -> Fraction | None:
    """The value of a calculation with + - * / ** and brackets; None if it is none, or too large."""
    if not _ARITHMETIC.fullmatch(expression):
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _evaluated(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluated(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _evaluated(node.left), _evaluated(node.right)
        if type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](left, right)
        small = abs(right) <= 20 and max(abs(left.numerator), left.denominator) <= 10**6
        if isinstance(node.op, ast.Pow) and right.denominator == 1 and small:
            return Fraction(left ** int(right))
    raise ValueError(f"not a calculation: {ast.dump(node):.80}")


def as_arithmetic(text: str) -> str:
    """A calculation as people or LaTeX write it in the notation of :func:`evaluate`, units left out.

    What is no arithmetic stays as it is.
    """
    for pattern, replacement in _BRACES:
        while pattern.search(text):  # from the innermost
            text = pattern.sub(replacement, text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text.replace("{", "(").replace("}", ")")


# -------------------------------------------------------------------------------------- in running text

_RESULT = re.compile(
    r"=\s*(?P<sign>[-−]\s?)?\\?\$?\s?(?:"
    r"\\[dt]?frac\{(?P<top>[1-9]\d*)\}\{(?P<under>[1-9]\d*)\}"
    rf"|(?P<number>{NUMBER})(?:/(?P<over>[1-9]\d*))?)"
    r"(?![\d]|[.,]\d)(?P<percent>\s?\\?%)?"
    # Nothing is calculated with it.
    r"(?!\s*(?:[-+*×÷·−]|/(?![A-Za-z]{2})|\^(?!\\circ|\{\\circ)|[xX]\s*[\d(]|\(\s*[-$\d(])|\("
    r"|\s*\\(?:cdot|times|div|[dt]?frac|sqrt|pi|left)(?![a-z])|[A-Za-z](?![A-Za-z]))"
)
_BEFORE = re.compile(r"[=≈<>]|\n|[.!?;:,]\s|\\\\|\\[\[(]")
_START = re.compile(r"(?<![\d.])(?:\d|\.\d)|\(|-(?=\s*[\d(.])")
_OPERATOR = re.compile(r"[\d)]\s*[-+*/]")


def results_in(
    text: str, *, given: Collection[Fraction], final: Collection[Fraction]
) -> list[Result]:
    """The intermediate results that stand in running text: after ``=``, and nothing is calculated with
    them there.

    Those that follow from the calculation before them, if there are any; otherwise those whose
    calculation cannot be followed, such as solutions of equations. A result that the calculation before
    it contradicts is never among them.

    Args:
        text: a solution without the line that says its answer.
        given: values that the question gives: after a calculation that cannot be followed, they are no
            results.
        final: values of the answer: no result is among them, and no numerator of one.
    """
    right, unknown = [], []
    for match in _RESULT.finditer(text):
        written = match["top"] or match["number"]
        if not can_be_made_wrong(written):
            continue
        under = value_of(match["under"] or match["over"] or "1")
        value = value_of(written) / under
        # MetaMath gives 1 as the answer of x = 1/3.
        if not {value, value / 100, value_of(written)}.isdisjoint(final):
            continue
        start = match.start("top" if match["top"] else "number")
        side = _left_side(text, match.start())
        values = _values(side)
        signed = -value if match["sign"] else value
        # 10 / 50 * 100 = 20% as well as 10 / 50 = 20%
        truths = [v * scale for v in values for scale in ((1, 100) if match["percent"] else (1,))]
        fits = [abs(v) * under for v in truths if v * signed >= 0]
        fits = [v for v in fits if (is_right(written, v) if under == 1 else value_of(written) == v)]
        if fits:
            right.append(Result(start, written, fits[0]))
        elif (
            not (values or match["over"])
            and side.strip()
            and {value, value / 100}.isdisjoint(given)
        ):
            unknown.append(Result(start, written, None))
    return right or unknown


def _left_side(text: str, end: int) -> str:
    """What stands before the ``=`` at `end`: of its sentence, or of its part of a chain."""
    stop = end
    while stop and text[stop - 1] in " \n&\\":  # of aligned equations, the line before
        stop -= 1
    begin = 0
    for match in _BEFORE.finditer(text, max(0, stop - 400), stop):
        begin = match.end()
    return text[begin:stop]


def _values(side: str) -> list[Fraction]:
    """The values of the calculations that a left side ends with, the longest first."""
    rewritten = as_arithmetic(side)
    values = []
    for match in list(_START.finditer(rewritten))[:40]:
        before, expression = rewritten[: match.start()].rstrip(), rewritten[match.start() :].strip()
        if before.endswith(tuple("+-*/(^")) or not _OPERATOR.search(expression):
            continue
        value = evaluate(expression)
        if value is not None:
            values.append(value)
    return values


def numbers_in(text: str) -> Iterator[Fraction]:
    """The values of all numbers of a text, and of its fractions."""
    for match in re.finditer(rf"{NUMBER}|\.\d+", text):
        yield value_of(match.group())
    for match in re.finditer(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}|(?<!\d)(\d+)/(\d+)", text):
        top, under = (value_of(part) for part in match.groups() if part)
        if under:
            yield top / under
