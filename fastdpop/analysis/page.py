"""A report as one HTML page that asks nobody for anything: no scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import fastdpop
from fastdpop.analysis import examples
from fastdpop.analysis.charts import Chart, as_svg
from fastdpop.analysis.gradients import PAPERS_LAMBDA
from fastdpop.analysis.numbers import Numbers, Scored
from fastdpop.analysis.score import PARTS, Pair
from fastdpop.analysis.style import CSS
from fastdpop.analysis.words import compact, percent, plain, signed, with_error

_PAPER = "https://arxiv.org/abs/2402.13228"
_CHES = "https://arxiv.org/abs/2410.08847"


def page(
    numbers: Numbers,
    found: Mapping[str, Chart],
    pairs: Sequence[Pair],
    models: Sequence[Scored],
    reference: Scored | None,
    tokenizer: Any,
    shown: int,
) -> str:
    """The whole page.

    Args:
        found: the pictures, by name.
        shown: how many pairs are shown of each kind.
    """
    everyone = [*numbers["models"], *([numbers["reference"]] if numbers["reference"] else [])]
    names = " and ".join(model["name"] for model in numbers["models"])
    does = "Why does the chosen log-prob fall?" if reference else "Will the chosen log-prob fall?"
    title = f"{does} {names}"
    body = [
        _head(numbers, title),
        _section("Where it changed", _WHERE, [_change_table(numbers)], found, ("parts", "change"))
        if numbers["reference"]
        else "",
        _section(
            "Log-probs around the edit",
            _AROUND,
            [_around_table(everyone)],
            found,
            ("around", "position"),
        ),
        _section("Wrong-way gradients", _WRONG, [_wrong_table(everyone)], found, ("lambda",)),
        _section(
            "CHES: which pairs will displace",
            _ABOUT_CHES,
            [_ches_table(everyone)],
            found,
            ("ches",),
        ),
        _fallen(pairs, models, reference, tokenizer, shown),
        _riskiest(pairs, reference or models[0], tokenizer, shown),
        _files(numbers),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


_WHERE = (
    "The log-prob of a completion is the sum over its tokens, so its change is, too: before the first token that "
    "differs, at it, and after it. DPO's wrong-way gradient shows as a fall after the edit."
)
_AROUND = (
    "Means over tokens, in nats, with standard errors over pairs. A healthy model finds tokens after the edit "
    "likelier than those before it, since it has read more, and likelier after the correct prefix than after the "
    f'wrong one (<a href="{_PAPER}">the DPOP paper</a>, section 5.2: \N{MINUS SIGN}0.37 against \N{MINUS SIGN}0.86).'
)
_WRONG = (
    f"Chosen and rejected have the same tokens after the edit, in other contexts. With <i>s<sub>w</sub></i> and "
    f"<i>s<sub>l</sub></i> the probability of such a token after the chosen and after the rejected prefix, DPO's "
    f"gradient at its own logit is <i>s<sub>l</sub></i> &minus; <i>s<sub>w</sub></i> "
    f'(<a href="{_PAPER}">paper</a>, Eq. 2, from Eq. 4): where the model is right, it points down. While its penalty '
    f"is on, DPOP's is (1 + &lambda;)(1 &minus; <i>s<sub>w</sub></i>) &minus; "
    f"(1 &minus; <i>s<sub>l</sub></i>) (appendix B.2), which points up for &lambda; "
    f"&gt; (<i>s<sub>w</sub></i> &minus; <i>s<sub>l</sub></i>) / (1 &minus; <i>s<sub>w</sub></i>)."
)
_ABOUT_CHES = (
    "The inner product of the sums of the last hidden states of the rejected and the chosen completion, less the "
    f'squared norm of the chosen one\'s (<a href="{_CHES}">arXiv:2410.08847</a>); length-normalised, of means. The '
    "higher, the likelier a step of preference training lowers the chosen log-prob."
)


def _head(numbers: Numbers, title: str) -> str:
    pairs, reference = numbers["pairs"], numbers["reference"]
    against = f", against {escape(reference['name'])}" if reference else ", without a reference"
    of = (
        f" of {pairs['read']:,}, drawn with seed {pairs['seed']}"
        if pairs["read"] > pairs["count"]
        else ""
    )
    lines = "".join(f"<li>{escape(line)}</li>\n" for line in numbers["summary"])
    return (
        f"<h1>{escape(title)}</h1>\n"
        f'<p class="muted">{pairs["count"]:,} pairs{of} of {escape(pairs["source"])}{against}</p>\n'
        f'<div class="card"><ul class="summary">\n{lines}</ul></div>'
    )


def _section(
    title: str, about: str, tables: Sequence[str], found: Mapping[str, Chart], names: Sequence[str]
) -> str:
    figures = "\n".join(_figure(found[name]) for name in names if name in found)
    return (
        f"<h2>{escape(title)}</h2>\n<p>{about}</p>\n"
        + "\n".join(tables)
        + f'\n<div class="charts">\n{figures}\n</div>'
    )


def _figure(chart: Chart) -> str:
    label = escape(f"{chart.title}. {chart.about}", quote=True)
    svg = as_svg(chart).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return (
        f'<figure class="card"><h3>{escape(chart.title)}</h3>\n{svg}\n'
        f"<figcaption>{escape(chart.about)}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">\n'
        f"<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _change_table(numbers: Numbers) -> str:
    rows = []
    for model in numbers["models"]:
        change = model["change"]
        parts = change["chosen"]["parts"]
        rows.append(
            [
                model["name"],
                with_error(change["chosen"], 1, sign=True),
                *(signed(parts[part], 1) for part in PARTS),
                with_error(change["rejected"], 1, sign=True),
                percent(change["share_of_pairs_where_chosen_fell"]),
                percent(change["accuracy"]),
            ]
        )
    head = [
        "nats a pair",
        "chosen",
        *(f"{part} the edit" for part in PARTS),
        "rejected",
        "chosen fell",
        "gained on rejected",
    ]
    return _table(head, rows, "Change of log-probs against the reference")


def _around_table(everyone: Sequence[Numbers]) -> str:
    rows = [
        [model["name"]]
        + [with_error(model["around_edit"]["chosen"][part]) for part in PARTS]
        + [with_error(model["around_edit"]["rejected"]["after"])]
        for model in everyone
    ]
    head = ["nats a token", *(f"chosen, {part}" for part in PARTS), "rejected, after"]
    return _table(head, rows, "Mean log-probs before, at and after the edit")


def _wrong_table(everyone: Sequence[Numbers]) -> str:
    rows = []
    for model in everyone:
        wrong = model["wrong_way"]
        needed = wrong["smallest_lambda"]
        rows.append(
            [
                model["name"],
                f"{wrong['tokens']:,}",
                percent(wrong["share"]),
                signed(wrong["mean_gradient"], 3),
                *(compact(needed[name]) for name in ("median", "p90", "p99")),
                percent(needed["share_enough"][f"{PAPERS_LAMBDA:g}"]),
            ]
        )
    head = ["", "aligned tokens", "wrong way", "mean gradient", "lambda, median", "90%", "99%"]
    return _table(
        [*head, f"{PAPERS_LAMBDA:g} is enough"],
        rows,
        "Wrong-way gradients and the lambda that turns them",
    )


def _ches_table(everyone: Sequence[Numbers]) -> str:
    changed = any(model["change"] for model in everyone)
    rows = []
    for model in everyone:
        raw, mean, change = model["ches"], model["ches_normalised"], model["change"]
        correlation = change and change["rank_correlation_with_ches_normalised"]
        rows.append(
            [
                model["name"],
                *(plain(mean[q], 2) for q in ("p10", "median", "p90", "max")),
                plain(raw["median"], 0),
                *([signed(correlation)] if changed else []),
            ]
        )
    head = ["length-normalised", "10%", "median", "90%", "highest", "CHES, median"]
    return _table(head + ["rank correlation with the change"] * changed, rows, "CHES")


def _fallen(
    pairs: Sequence[Pair],
    models: Sequence[Scored],
    reference: Scored | None,
    tokenizer: Any,
    shown: int,
) -> str:
    """The pairs whose chosen log-prob fell most, of each model."""
    if reference is None:
        return ""
    html = ["<h2>Pairs whose chosen log-prob fell most</h2>", _KEY]
    for model in models:
        change = model.scores.change_from(reference.scores)
        places = examples.fallen(change, shown)
        if not places:
            html.append(f"<p>{escape(model.name)}: the chosen log-prob fell in no pair.</p>")
        for i in places:
            fell, other = (
                signed(float(change.sums(side)[i]), 1) for side in ("chosen", "rejected")
            )
            what = f"{model.name}: chosen {fell} nats, rejected {other}"
            html.append(_card(what, pairs[i], examples.by_change(pairs[i], change, i, tokenizer)))
    return "\n".join(html)


def _riskiest(pairs: Sequence[Pair], base: Scored, tokenizer: Any, shown: int) -> str:
    scores = base.scores
    assert scores.ches_normalised is not None
    places = examples.riskiest(scores, shown)
    html = [f"<h2>Pairs at most risk, by {escape(base.name)}</h2>", _PUSH_KEY]
    for i in places:
        what = f"length-normalised CHES {plain(float(scores.ches_normalised[i]))}"
        html.append(_card(what, pairs[i], examples.by_push(pairs[i], base.push, i, tokenizer)))
    return "\n".join(html) if places else ""


_KEY = (
    '<p class="key"><span><i class="fall" style="--a:0.6"></i>less likely than with the reference, by '
    f'{examples.STRONGEST:g} nats or more</span><span><i class="rise" style="--a:0.6"></i>more likely</span>'
    '<span><i class="edit"></i>differs from the other completion</span></p>'
)
_PUSH_KEY = (
    "<p>The highest length-normalised CHES. Colours: which way DPO's first step pushes the logit of a token that both "
    'completions have after the edit.</p>\n<p class="key"><span><i class="fall" style="--a:0.6"></i>down, the wrong '
    'way</span><span><i class="rise" style="--a:0.6"></i>up</span><span><i class="edit"></i>differs from the other '
    "completion</span></p>"
)


def _card(what: str, pair: Pair, content: str) -> str:
    place = f" <small>{escape(str(pair['place']))}</small>" if pair.get("place") else ""
    return f'<article class="card"><h3>{escape(what)}{place}</h3>\n{content}\n</article>'


def _files(numbers: Numbers) -> str:
    everyone = [*numbers["models"], *([numbers["reference"]] if numbers["reference"] else [])]
    items = "".join(
        f"<li>{escape(m['name'])}: <code>{escape(m['path'])}</code></li>\n" for m in everyone
    )
    return (
        f"<h2>What was compared</h2>\n<ul>\n{items}</ul>\n"
        f'<p class="muted">Made by fastdpop {escape(fastdpop.__version__)} analyze. All numbers are in '
        "<code>analysis.json</code> beside this page.</p>"
    )
