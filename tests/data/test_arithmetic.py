"""Results of calculations in running text: where they stand, and how they are made wrong."""

from __future__ import annotations

import random
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpop.data.arithmetic import (
    Edit,
    Result,
    as_arithmetic,
    evaluate,
    is_right,
    made_wrong,
    numbers_in,
    results_in,
)

SEEDS = st.integers(0, 2**32)


def found(text: str, given: set[int] | None = None, final: set[int] | None = None) -> list[str]:
    """The results, with a question mark where nobody knows whether they are right."""
    sets = {"given": set(map(Fraction, given or ())), "final": set(map(Fraction, final or ()))}
    results = results_in(text, **sets)
    for result in results:
        assert text[result.start :].startswith(result.text)
    return [result.text + "?" * (result.truth is None) for result in results]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So the total for each player is $25 + $15.20 + $6.80 = $47. Since", ["47"]),
        ("1+2+3=6", ["6"]),
        ("He has 20 students - 4 students = 16 students.", ["16"]),
        ("He drove 1.25 feet/second * 64 seconds = 80 feet", ["80"]),
        ("It holds 1,200 * 3 = 3,600 liters", ["3,600"]),
        ("That is 20% of 50 = 10 pens", ["10"]),
        ("100% - 20% = 80% of them", ["80"]),
        ("10 / 50 * 100 = 20%", ["20"]),
        ("10 / 50 = 20%", ["20"]),
        ("1/2 of the 20 = 10", ["10"]),
        ("A total of 5 * 4 = 20", ["20"]),
        ("1/4 + 2/4 = 3/4", ["3"]),
        (r"\frac{1}{4} + \frac{2}{4} = \frac{3}{4}", ["3"]),
        (r"$2 \cdot 3^2 = 18$ and $\frac{1}{2} \times 8 = 4$.", ["18", "4"]),
        ("10 / 3 = 3.33", ["3.33"]),
        ("5 / 2 = 2 whole ones", ["2"]),
        ("5 - 8 = -3", ["3"]),
        ("3 x 4 = 12 and 2(3 + 4) = 14", ["12", "14"]),
        ("2 * 3 + 4 = 6 + 4 = 10", ["10"]),  # of a chain, what nothing is calculated with
        ("2 + 3\n&= 5", ["5"]),
        ("Every day, 2 apples: 3 * 4 = 12", ["12"]),
        ("He eats 3 of them; 2 days 3 * 4 = 12", ["12"]),
        # Equations, and others that cannot be followed
        ("Dividing both sides by 2, we get: 3x + 1 = 40.", ["40?"]),
        ("The sum is f(2) = 7.", ["7?"]),
        # None
        ("2 + 2 = 5", []),
        ("It is 47.", []),
        ("= 3", []),
        ("x = 390/10", []),
        ("2 + 3 = 5x", []),
        ("5 - 8 = 3", []),
        ("1 + 1 = 007", []),
    ],
)
def test_results_in_running_text(text: str, expected: list[str]) -> None:
    assert found(text) == expected


def test_results_that_can_be_followed_come_before_all_others() -> None:
    text = "We get: 2x = 40. Then 3 + 4 = 7."
    assert found(text) == ["7"]
    assert found(text, final={7}) == ["40?"]


def test_what_the_question_gives_is_no_result_of_an_equation() -> None:
    text = "x + 7 = 17. 2x = 20."
    assert found(text, given={17}) == ["20?"]
    assert found("3 + 4 = 7", given={7}) == ["7"]  # but here it is one


def test_the_answer_is_never_among_them() -> None:
    assert found("2 + 1 = 3, 3 * 4 = 12, 6 + 6 = 12, 36 / 3 = 12", final={12}) == ["3"]
    assert found(r"= \frac{3}{4}", final={3}) == found("1 + 1 = 50%", final={50}) == []
    assert [*numbers_in(r"The answer is: \frac{1}{2} or 1,250.5")][-1] == Fraction(1, 2)
    assert Fraction("1250.5") in numbers_in("#### 1,250.5")


@pytest.mark.parametrize(
    ("right", "wrongs"),
    [
        ("1.0000001", {"0.0000001", "2.0000001", "3.0000001", "4.0000001", "6.0000001", "11.0000001"}),
        ("0.00000001", {f"{n}.00000001" for n in (1, 2, 3, 5, 10)}),
        (
            "12345678901234567890",
            {f"123456789012345678{n}" for n in (80, 85, 87, 88, 89, 91, 92, 93, 95)}
            | {"12345678901234567900"},
        ),
    ],
)  # fmt: skip
def test_no_exponent_and_no_rounding(right: str, wrongs: set[str]) -> None:
    result = Result(0, right, None)
    assert {made_wrong(result, random.Random(seed)).wrong for seed in range(200)} == wrongs


NUMBERS = st.integers(0, 9999) | st.decimals(0, 9999, places=2)
SIGNS = {"+": "+", "-": "-", "*": "*", "x": "*", "×": "*"}


@given(NUMBERS, st.sampled_from([*SIGNS]), NUMBERS, st.sampled_from(["", "$"]), SEEDS)
def test_any_calculation(
    one: int | Decimal, sign: str, two: int | Decimal, unit: str, seed: int
) -> None:
    """Found, known to be right, and made wrong in its place with the same form."""
    truth = {"+": one + two, "-": one - two, "*": one * two}[SIGNS[sign]]
    shown = f"{abs(truth):,}"
    before = f"He has {unit}{one} {sign} {unit}{two} = {'-' * (truth < 0)}{unit}"
    text = f"{before}{shown} now. And so on."
    (result,) = results_in(text, given=[], final=[])
    assert result == Result(len(before), shown, abs(Fraction(truth)))
    edit = made_wrong(result, random.Random(seed))
    wrong = Decimal(edit.wrong.replace(",", ""))
    assert wrong > 0
    assert wrong != abs(truth)
    assert wrong.as_tuple().exponent == Decimal(abs(truth)).as_tuple().exponent
    assert edit.applied(text) == f"{before}{edit.wrong} now. And so on."
    assert edit == made_wrong(result, random.Random(seed))


@given(st.integers(1, 99999), st.integers(2, 99), st.integers(0, 3), SEEDS)
def test_a_wrong_value_is_no_rounding_either(top: int, under: int, places: int, seed: int) -> None:
    truth = Fraction(top, under)
    right = str(round(Decimal(top) / Decimal(under), places))
    assert is_right(right, truth)
    edit = made_wrong(Result(0, right, truth), random.Random(seed))
    assert abs(Fraction(edit.wrong) - truth) >= Fraction(1, 10**places)


@given(st.text("0123456789.+-*/() ,$%x=of\\{}^", max_size=40))
def test_any_text_can_be_read(text: str) -> None:
    for result in results_in(text, given=[], final=[]):
        assert text[result.start :].startswith(result.text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 * 4", 14),
        ("-(2 - 3) ** 2", -1),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1 / 0", None),
        ("2 ** 0.5", None),
        ("9 ** 9 ** 9", None),
        ("2 3", None),
        ("7 // 2", None),
        ("x + 1", None),
        ("", None),
        ("(" * 250, None),
    ],
)
def test_evaluate(text: str, value: object) -> None:
    assert evaluate(text) == value


def test_notations() -> None:
    latex = r"\left(\frac{1}{2} + 25\% \right) \times 1,000^{2}"
    assert evaluate(as_arithmetic(latex).strip()) == 750_000


def test_an_edit_at_its_place() -> None:
    assert Edit(4, "12", "7").applied("12, 12, 12") == "12, 7, 12"
