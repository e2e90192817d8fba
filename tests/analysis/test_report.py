"""A report's numbers, words, pictures and page, of scores that were made up."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

from fastdpop.analysis import examples
from fastdpop.analysis.charts import charts, draw, lines_of
from fastdpop.analysis.numbers import Scored, of_model, of_pairs, per_pair, rank_correlation
from fastdpop.analysis.page import page
from fastdpop.analysis.score import PairScores, first_difference
from fastdpop.analysis.words import summary
from tests.tiny_model import tiny_tokenizer

VOID = {"meta", "br", "path", "use", "rect", "line", "circle"}


class Wellformed(HTMLParser):
    """Every element is closed, in order; links are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        loads = [given.get("src"), given.get("href") if tag in ("link", "image", "use") else None]
        self.loads += [x for x in loads if x and not x.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.handle_starttag(tag, attrs)
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    names = ("prompt", "chosen", "rejected")
    ids = [tiny_tokenizer()(text)["input_ids"] for text in (prompt, chosen, rejected)]
    return {f"{n}_ids": i for n, i in zip(names, ids, strict=True)} | {"place": "pairs.jsonl:1"}


PAIRS = [
    pair("2+2?", "ab=4 so", "ab=5 so"),
    pair("<script>alert('x')</script>", "1 < 2 & 3", "1 < 3 & 3"),
    pair("same", "one", "one"),
    pair("begin", "ab", "abc"),
    pair("all", "xyz", "uvw"),
]


def scores(before: float, at: float, after: float, rejected: float = -1.0) -> PairScores:
    """The same log-probs in every pair."""
    firsts = [first_difference(p["chosen_ids"], p["rejected_ids"]) for p in PAIRS]
    chosen = []
    for p, m in zip(PAIRS, firsts, strict=True):
        n = len(p["chosen_ids"])
        m = n if m < 0 else m
        values = [before] * m + [at] * (m < n) + [after] * (n - m - 1)
        chosen.append(torch.tensor(values, dtype=torch.float64))
    others = [torch.full((len(p["rejected_ids"]),), rejected).double() for p in PAIRS]
    ches = torch.arange(len(PAIRS)).double()
    return PairScores(chosen, others, torch.tensor(firsts), ches, ches / 10)


def made(models: dict[str, PairScores], reference: PairScores | None, pairs: Any = PAIRS) -> Any:
    """Numbers, scored models and the scored reference."""
    scored = [Scored.of(name, f"/models/{name}", own, pairs) for name, own in models.items()]
    base = None if reference is None else Scored.of("reference", "/models/base", reference, pairs)
    numbers = {
        "pairs": {"source": "pairs.jsonl", "read": len(pairs), "seed": 0, **of_pairs(pairs)},
        "reference": None if base is None else of_model(base, None),
        "models": [of_model(model, base) for model in scored],
        "by_pair": per_pair(pairs, scored, base),
    }
    return {**numbers, "summary": summary(numbers)}, scored, base


def rendered(
    models: dict[str, PairScores], reference: PairScores | None, pairs: Any = PAIRS
) -> str:
    numbers, scored, base = made(models, reference, pairs)
    json.dumps(numbers, allow_nan=False)
    found = charts(lines_of(numbers, scored, base))
    return page(numbers, found, pairs, scored, base, tiny_tokenizer(), 3)


REFERENCE = scores(-1.0, -2.0, -0.5)
FALLEN = scores(-1.0, -2.5, -2.0)


def test_numbers_by_hand() -> None:
    numbers, _, _ = made({"DPO": FALLEN}, REFERENCE)
    assert numbers["pairs"]["count"] == 5
    assert numbers["pairs"]["equal"] == 1
    assert numbers["pairs"]["one_begins_with_the_other"] == 1
    # Of 7, 9, 3, 3 and 3 tokens.
    expected = (1 / 7 + 1 / 9 + 0 + 1 / 3 + 1) / 5
    assert numbers["pairs"]["edit_distance"]["positional"]["mean"] == pytest.approx(expected)
    (model,) = numbers["models"]
    change = model["change"]
    # Pairs have 3, 4, 0, 0 and 2 chosen tokens after the edit; three have one at it.
    assert change["chosen"]["parts"] == pytest.approx(
        {"before": 0, "at": -0.5 * 3 / 5, "after": -1.5 * 9 / 5}
    )
    assert change["chosen"]["mean"] == pytest.approx(-0.3 - 2.7)
    assert change["share_of_pairs_where_chosen_fell"] == pytest.approx(3 / 5)
    assert change["around_edit"]["chosen"]["after"]["mean"] == pytest.approx(-1.5)
    assert change["around_edit"]["chosen"]["after"]["tokens"] == 9
    assert model["by_position"]["relative"][9] == 0
    assert model["by_position"]["relative"][10] == pytest.approx(-1.5)
    wrong = numbers["reference"]["wrong_way"]
    # exp(-0.5) after the chosen prefix, exp(-1) after the rejected one, at 3 + 4 tokens.
    assert wrong["tokens"] == 7
    assert wrong["share"] == 1
    assert wrong["mean_gradient"] == pytest.approx(math.exp(-1) - math.exp(-0.5))
    lam = (math.exp(-0.5) - math.exp(-1)) / (1 - math.exp(-0.5))
    assert wrong["smallest_lambda"]["median"] == pytest.approx(lam)
    assert wrong["smallest_lambda"]["share_enough"] == {"0.5": 0, "5": 1, "50": 1, "500": 1}
    assert numbers["by_pair"][0]["chosen_logps"] == {"DPO": -3 - 2.5 - 6, "reference": -3 - 2 - 1.5}
    assert numbers["by_pair"][4]["ches_normalised"] == pytest.approx(0.4)


def test_certain_tokens_have_no_lambda() -> None:
    numbers, _, _ = made({"DPO": scores(-1.0, -2.0, 0.0)}, None)
    needed = numbers["models"][0]["wrong_way"]["smallest_lambda"]
    assert needed["median"] is None
    assert needed["share_without_any"] == 1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            FALLEN,
            ["fell against the reference", "90% of the fall stands after the edit", "(Eq. 2)"],
        ),
        (
            scores(-3.0, -2.0, -0.5),
            ["100% of the fall stands before the edit", "one after it by 0.00", "drifts"],
        ),
        (scores(-1.0, -9.0, -0.5), ["100% of the fall stands at the edit"]),
        (scores(-0.5, -1.0, -0.1), ["rose against the reference", "nothing to mend"]),
        (scores(-2.0, -2.0, -1.0), ["of the fall stands before the edit", "drifts"]),
        (REFERENCE, ["did not move beyond chance"]),
        (scores(-0.999, -2.0, -0.5), ["did not move beyond chance"]),
    ],
)
def test_summary(model: PairScores, said: list[str]) -> None:
    numbers, _, _ = made({"M": model}, REFERENCE)
    text = "\n".join(numbers["summary"])
    for words in said:
        assert words in text
    assert ("what to try" in text) == ("fall stands" in text)
    assert numbers["summary"][0].startswith(
        "5 pairs whose completions differ in 14% of their tokens"
    )


def test_summary_of_pairs_without_an_edit() -> None:
    same = [PAIRS[2]] * 3

    def of(value: float) -> PairScores:
        logps = [torch.full((3,), value).double()] * 3
        return PairScores(logps, logps, torch.full((3,), -1), torch.zeros(3), torch.zeros(3))

    numbers, _, _ = made({"M": of(-2.0)}, of(-1.0), same)
    text = "\n".join(numbers["summary"])
    assert "reference: \N{MINUS SIGN}3.0 ± 0.0 nats" in text
    assert "No part of the fall stands around an edit" in text
    assert "in 3 chosen equals rejected, which teaches nothing" in text


def test_summary_without_reference() -> None:
    numbers, _, _ = made({"M": REFERENCE}, None)
    text = "\n".join(numbers["summary"])
    assert "DPO's gradient lowers the correct token's logit at 100% of the 7 tokens" in text
    assert "likelier after the correct prefix (\N{MINUS SIGN}0.50 nats a token)" in text
    assert "There is no --reference" in text


@pytest.mark.parametrize("reference", [None, REFERENCE])
def test_page_is_wellformed_and_asks_nobody(reference: PairScores | None) -> None:
    html = rendered({"DPO <1>": FALLEN, "B & C": REFERENCE}, reference)
    found = Wellformed(html)
    assert found.loads == []
    assert "<script" not in html
    assert "@import" not in html
    assert "url(http" not in html
    assert "<script>alert('x')</script>" in found.text
    assert "1 < 2 & 3" in found.text
    assert "DPO <1>" in found.text
    assert html.count('role="img"') == (6 if reference else 4)
    assert html.count("aria-label") >= html.count('role="img"')
    for colour in ("#0072b2", "#1f1f1f"):  # light colours that a dark page could not show
        assert colour not in html.split("</style>")[1]
    assert "prefers-color-scheme: dark" in html
    assert ("rank correlation" in html) == (reference is not None)
    assert ("<h1>Why does" if reference else "<h1>Will the") in html


@pytest.mark.parametrize("place", range(len(PAIRS)))
def test_a_single_pair(place: int) -> None:
    """Of any kind: no difference, one the beginning of the other, nothing in common."""

    def one(all_of: PairScores) -> PairScores:
        kept = slice(place, place + 1)
        tensors = (all_of.first_difference, all_of.ches, all_of.ches_normalised)
        return PairScores(
            all_of.chosen_logps[kept],
            all_of.rejected_logps[kept],
            *(None if x is None else x[kept] for x in tensors),  # type: ignore[arg-type]
        )

    html = rendered({"M": one(FALLEN)}, one(REFERENCE), PAIRS[place : place + 1])
    Wellformed(html)
    assert "nan" not in html.split("</style>")[1].replace("finance", "")


def test_picture(tmp_path: Any) -> None:
    numbers, scored, base = made({"$a$ $^": FALLEN}, REFERENCE)
    draw(charts(lines_of(numbers, scored, base)), "$x$ $^", "$", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_are_shown_worst_first() -> None:
    change = FALLEN.change_from(REFERENCE)
    assert examples.fallen(change, 9) == [1, 0, 4]  # 4, 3 and 2 tokens after the edit
    assert examples.fallen(REFERENCE.change_from(REFERENCE), 9) == []
    assert examples.riskiest(REFERENCE, 3) == [4, 3, 1]  # 2 has no difference


def test_tokens_are_coloured_and_the_edit_framed() -> None:
    change = FALLEN.change_from(REFERENCE)
    html = examples.by_change(PAIRS[0], change, 0, tiny_tokenizer())
    assert (
        '<mark><span class="fall" style="--a:0.15" title="\N{MINUS SIGN}0.50 nats">4</span></mark>'
        in html
    )
    assert "<mark><span>5</span></mark>" not in html  # it has a note of its own
    assert html.count("<mark>") == 2
    assert html.count('style="--a:0.45"') == 3
    same = examples.by_change(PAIRS[2], change, 2, tiny_tokenizer())
    assert "<mark>" not in same


def test_letters_of_several_tokens_are_one_piece() -> None:
    tokenizer = tiny_tokenizer()
    text = "a\N{EURO SIGN}b"
    found = examples.pieces(tokenizer(text)["input_ids"], tokenizer)
    assert found == [("a", [0]), ("\N{EURO SIGN}", [1, 2, 3]), ("b", [4])]
    cut = tokenizer("\N{EURO SIGN}")["input_ids"][:2]
    assert [members for _, members in examples.pieces(cut, tokenizer)] == [[0, 1]]
    assert examples.pieces([], tokenizer) == []


def test_rank_correlation() -> None:
    def of(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    assert rank_correlation(of(1, 2, 3), of(10, 100, 1000)) == pytest.approx(1)
    assert rank_correlation(of(1, 2, 3), of(3, 2, 1)) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    assert rank_correlation(of(1, 2, 2, 3), of(1, 2, 3, 4)) == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )
    assert rank_correlation(of(1, 1, 1), of(1, 2, 3)) is None
    assert rank_correlation(of(1, 2), of(1, 2)) is None
