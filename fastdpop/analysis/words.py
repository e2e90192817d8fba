"""The summary of a report, in sentences made of its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from fastdpop.analysis.gradients import PAPERS_LAMBDA
from fastdpop.analysis.numbers import Numbers
from fastdpop.analysis.score import PARTS
from fastdpop.train.report import Moved, moved

MINUS = "\N{MINUS SIGN}"


def summary(numbers: Numbers) -> list[str]:
    """What the numbers say, the pairs' own first, then of each model."""
    lines = [_pairs(numbers["pairs"])]
    for model in numbers["models"]:
        if model["change"] is None:
            lines += _alone(model)
        else:
            lines += _changed(model, numbers["reference"])
    return lines


def signed(value: float | None, digits: int = 2) -> str:
    """With its sign, or a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    if round(value, digits) == 0:
        return f"{0:.{digits}f}"
    return f"{value:+.{digits}f}".replace("-", MINUS)


def plain(value: float | None, digits: int = 2) -> str:
    """With a sign if it is negative, or a dash for none."""
    return signed(value, digits).removeprefix("+")


def compact(value: float | None) -> str:
    """A positive number in about three digits, or a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def percent(value: float | None) -> str:
    """Of a share."""
    return "\N{EN DASH}" if value is None else f"{value:.0%}"


def with_error(mean: Numbers, digits: int = 2, *, sign: bool = False) -> str:
    """A mean and its standard error."""
    text = (signed if sign else plain)(mean["mean"], digits)
    error = mean["standard_error"]
    return text if error is None else f"{text} ± {error:.{digits}f}"


def _pairs(pairs: Numbers) -> str:
    distance = pairs["edit_distance"]
    low = distance["positional"]["median"] < 0.2
    text = (
        f"{pairs['count']:,} pairs whose completions differ in {percent(distance['positional']['median'])} of "
        f"their tokens by position and in {percent(distance['levenshtein']['median'])} by Levenshtein (medians)"
    )
    if low:
        text += ": a low edit distance, at which DPO tends to lower the chosen log-prob"
    if pairs["equal"]:
        text += f"; in {pairs['equal']:,} chosen equals rejected, which teaches nothing"
    return text + "."


def _risk(model: Numbers) -> str:
    """What DPO's gradient does to a model as it is."""
    wrong = model["wrong_way"]
    if not wrong["tokens"]:
        return "No token stands on both sides after the first difference, so Eq. 2 has nothing to push the wrong way."
    needed = wrong["smallest_lambda"]
    return (
        f"DPO's gradient lowers the correct token's logit at {percent(wrong['share'])} of the "
        f"{wrong['tokens']:,} tokens that both completions have after the edit (Eq. 2); DPOP's raises it at "
        f"{percent(needed['share_enough'][f'{PAPERS_LAMBDA:g}'])} of them with a lambda of {PAPERS_LAMBDA:g} while "
        f"its penalty is on, and at half of them "
        + (
            "with none."
            if needed["median"] is None
            else f"with one above {compact(needed['median'])}."
        )
    )


def _alone(model: Numbers) -> list[str]:
    chosen, rejected = (
        model["around_edit"][side]["after"]["mean"] for side in ("chosen", "rejected")
    )
    lines = [f"{model['name']}: {_risk(model)}"]
    if chosen is not None and rejected is not None:
        verdict = "likelier" if chosen > rejected else "not likelier"
        lines.append(
            f"{model['name']}: tokens after the edit are {verdict} after the correct prefix "
            f"({plain(chosen)} nats a token) than after the wrong one ({plain(rejected)})."
        )
    lines.append(
        "There is no --reference, so nothing can be said of what training has changed: this is the risk before it. "
        "Where it is high, train with DPOP, or leave out the pairs with the highest CHES."
    )
    return lines


def _changed(model: Numbers, reference: Numbers) -> list[str]:
    change, name = model["change"], model["name"]
    chosen, fell = change["chosen"], change["share_of_pairs_where_chosen_fell"]
    verdict = _verdict(chosen)
    moved = {"falls": "fell", "rises": "rose", "stays": "did not move beyond chance"}[verdict]
    lines = [
        f"{name}: the chosen completions' log-prob {moved} against the reference: "
        f"{with_error(chosen, 1, sign=True)} nats on average, lower in {percent(fell)} of the pairs. The rejected "
        f"ones' changed by {with_error(change['rejected'], 1, sign=True)}; chosen gained on rejected in "
        f"{percent(change['accuracy'])} of the pairs."
    ]
    parts = [signed(chosen["parts"][part], 1) for part in PARTS]
    lines.append(
        f"{name}: of the chosen completions' change, {parts[0]} nats stand before the edit, {parts[1]} at it and "
        f"{parts[2]} after it."
    )
    if verdict == "falls":
        lines += [
            f"{name}: {_meaning(change)}",
            f"{name}: what to try: {_advice(model, reference)}",
        ]
    elif verdict == "rises":
        lines.append(
            f"{name}: chosen completions became likelier, as they should: nothing to mend."
        )
    return lines


def _verdict(mean: Numbers) -> str:
    """By two standard errors, as a run's own last lines have it; by the sign where there is no error."""
    if mean["mean"] is None:
        return "stays"
    found = moved(mean["mean"], mean["standard_error"] or 0.0)
    return {Moved.DOWN: "falls", Moved.UP: "rises"}.get(found, "stays")


def _meaning(change: Numbers) -> str:
    """Where the fall stands, and what that is a sign of."""
    parts = change["chosen"]["parts"]
    before, _, after = (change["around_edit"]["chosen"][part]["mean"] or 0.0 for part in PARTS)
    where = min(parts, key=parts.__getitem__)
    fallen = sum(min(0.0, value) for value in parts.values())
    if fallen == 0:
        return "No part of the fall stands around an edit: the pairs in which it fell have none."
    text = (
        f"{percent(parts[where] / fallen)} of the fall stands {where} the edit; a token before it changed by "
        f"{signed(before)} nats, one after it by {signed(after)}. "
    )
    if where == "at":
        return text + (
            "The correct token itself became less likely: chosen and rejected are pushed down together, and "
            "something else takes their probability."
        )
    if after < before:
        return text + (
            "Tokens after the edit are the same in both completions: lowering the rejected one has lowered them, too, "
            "the failure that section 3 of the DPOP paper derives (Eq. 2)."
        )
    return text + (
        "Tokens before the edit follow the same prefix in both completions, where DPO has no gradient of its own: the "
        "model drifts as a whole. A high learning rate or too many steps do that."
    )


def _advice(model: Numbers, reference: Numbers) -> str:
    needed: Sequence[float | None] = [
        reference["wrong_way"]["smallest_lambda"]["p90"],
        model["wrong_way"]["smallest_lambda"]["p90"],
    ]
    known = [x for x in needed if x is not None]
    lam = max([PAPERS_LAMBDA, *known]) if len(known) == len(needed) else PAPERS_LAMBDA
    text = (
        f"DPOP (--loss dpop, lambda {PAPERS_LAMBDA:g}"
        + (
            f"; {compact(lam)} turns the gradient at 90% of the tokens"
            if lam > PAPERS_LAMBDA
            else ""
        )
        + "), whose penalty holds the chosen log-prob up. A larger beta only slows the fall down (figure 4 of the "
        "paper); fewer steps or a lower learning rate do, too."
    )
    correlation = model["change"]["rank_correlation_with_ches_normalised"]
    if correlation is not None and correlation < -0.3:
        text += (
            f" CHES of the reference tells which pairs fall (rank correlation {signed(correlation)}): leave out the "
            "highest ones."
        )
    return text
