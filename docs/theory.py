"""Measures the numbers of docs/theory.md and draws its picture: python docs/theory.py

On SmolLM2-135M-Instruct, about a quarter of an hour on one core. The formulas used here are those that
tests/theory holds against autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from fastdpop.data.tokens import tokenize
from fastdpop.demo import load_smollm2, messages

LAMBDAS = (0.0, 0.5, 5.0, 50.0, 500.0)
"""Those of which shares are given; 0 is DPO."""
TESTED = 6
"""Pairs that tests/theory measures again."""
STEPPED = (12, 6)
"""Pairs whose gradients with respect to all parameters are taken, at the reference and after DPO;
each takes some 8 seconds."""
DPO_STEPS = 10
"""Of the short DPO run after which they are taken again."""


class EditPair(NamedTuple):
    """Two completions of a prompt that differ in one token.

    ``edit`` is the index, within the completion, of that token. ``shipped`` is False where the
    corrupted number had another number of tokens, and only its first wrong digit was taken over.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    edit: int
    shipped: bool


def edit_pairs(tokenizer: Any, split: str, count: int | None = None) -> list[EditPair]:
    """The first ``count`` shipped pairs of a split at edit (Hamming) distance 1, mended if need be.

    A pair whose corrupted number has more or fewer digits than the right one is mended: its
    rejected completion becomes the chosen one with one digit replaced. Pairs in which that is
    impossible, since a digit stands against a space or a point, are left out.
    """
    digits = {tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)}
    pairs = []
    for row in tokenize(messages(split, count), tokenizer, name=split, progress=False)[0]:
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        both = zip(chosen, rejected, strict=False)
        places = [k for k, tokens in enumerate(both) if tokens[0] != tokens[1]]
        edit, shipped = places[0], len(chosen) == len(rejected) and len(places) == 1
        if not shipped:
            if not {chosen[edit], rejected[edit]} <= digits:
                continue
            rejected = [*chosen[:edit], rejected[edit], *chosen[edit + 1 :]]
        pairs.append(EditPair(row["prompt_ids"], chosen, rejected, edit, shipped))
    return pairs


class Contexts(NamedTuple):
    """What the model says of a pair's completions: rows of float64 logits, ``(rows, vocabulary)``.

    ``before`` and ``edit`` have one context, ``chosen`` and ``rejected`` are the rows after the
    edit, in each completion's own context, and ``hidden`` the final hidden states of those.
    """

    before: Tensor
    edit: Tensor
    chosen: Tensor
    rejected: Tensor
    hidden: tuple[Tensor, Tensor]


@torch.no_grad()
def contexts(model: Any, pair: EditPair) -> Contexts:
    """The logits of a pair, float64 products of the model's own hidden states and lm_head."""
    ids = torch.tensor([pair.prompt + pair.chosen, pair.prompt + pair.rejected])
    hidden = model.model(ids).last_hidden_state[:, len(pair.prompt) - 1 : -1].double()
    weight = model.lm_head.weight.double()
    chosen = hidden[0] @ weight.T
    after = hidden[:, pair.edit + 1 :]
    return Contexts(
        before=chosen[: pair.edit],
        edit=chosen[pair.edit],
        chosen=chosen[pair.edit + 1 :],
        rejected=after[1] @ weight.T,
        hidden=(after[0], after[1]),
    )


def token_logps(logits: Tensor, ids: list[int]) -> Tensor:
    """The log-probability of each row's token, ``(rows,)``."""
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


class Thresholds(NamedTuple):
    """Of every token after the edit: the lambda beyond which a gradient points the right way.

    Below zero where DPO's does so already.

    Attributes:
        own: of the correct token's own logit (j = i).
        worst: of the logit, of all others, that needs the greatest lambda (j != i).
        logp: of the log-probability of the correct token, in the chosen context, when all logits
            move along the gradient.
        head: as ``logp``, when the logits move because the lm_head does.
        fall: by how much the correct token is likelier after the chosen prefix,
            ``s_i{y_w} - s_i{y_l}``.
        wrong_ids, wrong_mass: ``(tokens, lambdas)``: the share of the other tokens whose logits are
            pushed up at each of ``LAMBDAS``, by number, and by probability after the rejected prefix.
    """

    own: Tensor
    worst: Tensor
    logp: Tensor
    head: Tensor
    fall: Tensor
    wrong_ids: Tensor
    wrong_mass: Tensor


def thresholds(found: Contexts, targets: list[int]) -> Thresholds:
    """The lambdas of the tokens after the edit, from the two softmaxes in closed form.

    All of them are a ratio minus 1. With q = 1 - s_i, summed over the other tokens and not
    subtracted, that of the own logit is q{y_l} / q{y_w} - 1.
    """
    index = torch.tensor(targets)[:, None]
    # Probabilities of the other tokens; the correct one's place is 0.
    others = [
        logits.softmax(-1).scatter(-1, index, 0.0) for logits in (found.chosen, found.rejected)
    ]
    q_w, q_l = (row.sum(-1) for row in others)
    square = q_w.square() + others[0].square().sum(-1)
    product = q_w * q_l + (others[0] * others[1]).sum(-1)
    h_w, h_l = found.hidden
    alike = (h_w * h_l).sum(-1) / h_w.square().sum(-1)
    logs = [row.log() for row in others]
    ratios = (logs[1] - logs[0]).scatter(-1, index, -torch.inf)  # log of s_j{y_l} / s_j{y_w}
    wrong = [ratios > torch.log1p(torch.tensor(lam)).double() for lam in LAMBDAS]
    return Thresholds(
        own=q_l / q_w - 1,
        worst=ratios.amax(-1).exp() - 1,
        logp=product / square - 1,
        head=alike * product / square - 1,
        fall=q_l - q_w,
        wrong_ids=torch.stack([up.sum(-1) / (up.shape[-1] - 1) for up in wrong], -1),
        wrong_mass=torch.stack([(up * others[1]).sum(-1) / q_l for up in wrong], -1),
    )


PARTS = ("before", "edit", "after", "rejected")


def completion_logps(model: Any, pair: EditPair) -> tuple[Tensor, Tensor]:
    """Token log-probs of the chosen and of the rejected completion, differentiable."""
    ids = torch.tensor([pair.prompt + pair.chosen, pair.prompt + pair.rejected])
    logits = model(ids, logits_to_keep=len(pair.chosen) + 1).logits[:, :-1]
    return token_logps(logits[0], pair.chosen), token_logps(logits[1], pair.rejected)


def gram(model: Any, pair: EditPair) -> Tensor:
    """Inner products, ``(4, 4)`` float64, of the gradients, with respect to all parameters, of the
    log-probs of :data:`PARTS`: of the chosen completion before, at and after the edit, and of the
    rejected completion.
    """
    chosen, rejected = completion_logps(model, pair)
    sums = (chosen[: pair.edit], chosen[pair.edit], chosen[pair.edit + 1 :], rejected)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(part.sum(), parameters, retain_graph=True) for part in sums]
    return products(gradients, gradients)


def products(left: list[Any], right: list[Any]) -> Tensor:
    """Inner products, ``(left, right)`` float64, of gradients given as one tensor per parameter."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for tensors in zip(*left, *right, strict=True):
        rows = torch.stack([tensor.flatten() for tensor in tensors]).double()
        total += rows[: len(left)] @ rows[len(left) :].T
    return total


def effects(inner: Tensor, lam: float) -> Tensor:
    """By how much a step along DPOP's negative gradient moves the log-probs of :data:`PARTS`, per
    unit of learning rate and of ``beta sigmoid(-z)``, to first order. ``lam`` 0 is DPO.
    """
    return inner @ torch.tensor([1 + lam, 1 + lam, 1 + lam, -1.0], dtype=torch.float64)


DIRECTIONS = ("gradient, DPO", "gradient, hinge", "signs, DPO", "signs, DPOP at lambda 50")


def batch_step(model: Any, batch: list[EditPair], held_out: list[EditPair]) -> Tensor:
    """First-order changes, ``(2, 4)``, of the summed chosen log-prob after the edit: of the batch
    that a step is taken on, and of other pairs, along each of :data:`DIRECTIONS`.

    The pairs' factors ``beta sigmoid(-z)`` are left out, as are the hinges' conditions: all are on.
    Signs are Adam's first step.
    """
    parameters = list(model.parameters())

    def summed(pairs: list[EditPair], weights: tuple[float, float, float]) -> list[Tensor]:
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for pair in pairs:
            chosen, rejected = completion_logps(model, pair)
            until, after = chosen[: pair.edit + 1].sum(), chosen[pair.edit + 1 :].sum()
            value = weights[0] * until + weights[1] * after + weights[2] * rejected.sum()
            torch._foreach_add_(total, torch.autograd.grad(value, parameters))
        return total

    afters = [summed(pairs, (0.0, 1.0, 0.0)) for pairs in (batch, held_out)]
    dpo, hinge = summed(batch, (1.0, 1.0, -1.0)), summed(batch, (1.0, 1.0, 0.0))
    signs = [tensor.sign() for tensor in dpo]
    positive = [(d + 50 * h).sign() for d, h in zip(dpo, hinge, strict=True)]
    return products(afters, [dpo, hinge, signs, positive])


def train_with_dpo(model: Any, pairs: list[EditPair], steps: int) -> None:
    """``fastdpop demo``'s DPO in short: AdamW at a learning rate of 5e-6, 4 pairs a step, beta 0.3."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6, weight_decay=0.0)
    batches = [pairs[4 * step : 4 * step + 4] for step in range(steps)]
    with torch.no_grad():
        margins = [
            [(a.sum() - b.sum()).item() for a, b in (completion_logps(model, p) for p in batch)]
            for batch in batches
        ]
    for batch, references in zip(batches, margins, strict=True):
        for pair, reference in zip(batch, references, strict=True):
            chosen, rejected = completion_logps(model, pair)
            z = 0.3 * (chosen.sum() - rejected.sum() - reference)
            (-torch.nn.functional.logsigmoid(z) / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


class Mean(NamedTuple):
    """A mean over tokens, and its standard error with pairs as the independent units."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.error:.4f}"


def mean(by_pair: Iterable[Tensor]) -> Mean:
    """The mean of the tokens of all pairs."""
    rows = [row.double() for row in by_pair]
    sums = torch.stack([row.sum() for row in rows])
    counts = torch.tensor([float(len(row)) for row in rows], dtype=torch.float64)
    value = sums.sum() / counts.sum()
    spread = (sums - value * counts) / counts.mean()
    return Mean(value.item(), (spread.std() / len(rows) ** 0.5).item())


def quantiles(values: Tensor) -> str:
    points = torch.tensor([0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
    return "median {:.3g}, 90% {:.3g}, 99% {:.3g}, greatest {:.3g}".format(
        *values.quantile(points).tolist()
    )


class Measured(NamedTuple):
    """Of one pair: its thresholds, and the log-probs of the chosen tokens before the edit, and after
    it in the chosen and in the rejected context.
    """

    thresholds: Thresholds
    before: Tensor
    chosen: Tensor
    rejected: Tensor


def measure(pair: EditPair, found: Contexts) -> Measured:
    after = pair.chosen[pair.edit + 1 :]
    return Measured(
        thresholds(found, after),
        token_logps(found.before, pair.chosen[: pair.edit]),
        token_logps(found.chosen, after),
        token_logps(found.rejected, after),
    )


def report(rows: list[Measured]) -> None:
    """Print the shares of wrong-way gradients, and the log-probs around the edit."""
    found = [row.thresholds for row in rows]
    print(f"{len(rows)} pairs, {sum(len(row.chosen) for row in rows)} tokens after the edit")
    print("log-prob after, chosen prefix  ", mean(row.chosen for row in rows))
    print("log-prob after, rejected prefix", mean(row.rejected for row in rows))
    print(
        "the difference, mean of a pair ", mean((r.chosen - r.rejected).mean()[None] for r in rows)
    )
    print("log-prob before                ", mean(row.before for row in rows))
    apart = [row.chosen.mean() - row.before.mean() for row in rows if len(row.before)]
    print("after - before, mean of a pair ", mean(gap[None] for gap in apart))
    print("fall of the probability        ", mean(t.fall for t in found))
    print("the same where it is wrong     ", mean(t.fall[t.fall > 0] for t in found))
    for name in ("own", "logp", "head", "worst"):
        values = [getattr(row, name) for row in found]
        shares = ", ".join(f"{lam:g}: {mean(v > lam for v in values)}" for lam in LAMBDAS)
        print(f"{name}: {quantiles(torch.cat(values))}; wrong at lambda {shares}")
    for name in ("wrong_ids", "wrong_mass"):
        values = [getattr(row, name) for row in found]
        shares = (f"{lam:g}: {mean(v[:, i] for v in values)}" for i, lam in enumerate(LAMBDAS))
        print(f"{name}:", ", ".join(shares))


def report_steps(model: Any, tokenizer: Any) -> None:
    """Print what steps of all parameters do, at the reference and after a short run of DPO."""
    train, test = (
        [pair for pair in edit_pairs(tokenizer, split) if pair.shipped]
        for split in ("train", "test")
    )
    for steps, count in zip((0, DPO_STEPS), STEPPED, strict=True):
        train_with_dpo(model, train, steps)
        with torch.no_grad():
            scored = [(p.edit, completion_logps(model, p)[0]) for p in test[: STEPPED[0]]]
        print(f"\nAfter {steps} steps of DPO; held-out chosen log-prob before and after the edit:")
        print(mean(row[:edit] for edit, row in scored))
        print(mean(row[edit + 1 :] for edit, row in scored))
        moved = batch_step(model, train[-4:], test[:4])
        for name, (own, other) in zip(DIRECTIONS, moved.T.tolist(), strict=True):
            print(f"a batch's step along {name}: own {own:.3g}, held-out {other:.3g}")
        for pair in test[:count]:
            inner = gram(model, pair)
            dpo, hinge = effects(inner, 0.0)[2], effects(inner, 1.0)[2] - effects(inner, 0.0)[2]
            print(f"after the edit: DPO {dpo:.3g}, hinge {hinge:.3g}, lambda {-dpo / hinge:.3g}")


BLUE, ORANGE, GREEN, INK = "#0072B2", "#D55E00", "#009E73", "#222222"  # of Okabe and Ito


def draw(found: list[Thresholds], path: Path) -> None:
    """The share of tokens that DPOP's gradient pushes the right way, against lambda."""
    figure, axes = plt.subplots(figsize=(8.4, 4.6), dpi=130, layout="constrained")
    lams = torch.logspace(-2, 4, 400).double()
    curves = (
        ("own", BLUE, "-", "the correct token's logit is pushed up"),
        ("logp", GREEN, "--", "its log-probability rises"),
        ("worst", ORANGE, "-", "no wrong token's logit is pushed up"),
    )
    for name, colour, line, label in curves:
        values = torch.cat([getattr(row, name) for row in found])
        share = (values[:, None] <= lams).double().mean(0)
        axes.plot(lams, share, line, color=colour, linewidth=2.2, label=label)
        if name != "logp":
            marks = torch.tensor(LAMBDAS[1:]).double()
            heights = (values[:, None] <= marks).double().mean(0)
            axes.plot(marks, heights, "o", color=colour, markersize=6)
            up = name == "own"
            for mark, height in zip(marks.tolist(), heights.tolist(), strict=True):
                axes.annotate(
                    f"{height:.1%}",
                    (mark, height),
                    xytext=(-5, 6) if up else (7, -12),
                    ha="right" if up else "left",
                    textcoords="offset points",
                    color=colour,
                    fontsize=9,
                )
    _dress(axes, (torch.cat([row.own for row in found]) <= 0).double().mean().item())
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def _dress(axes: Axes, dpo: float) -> None:
    axes.axhline(dpo, color="#6B6B6B", linewidth=1, linestyle=":")
    axes.text(
        0.0105, dpo - 0.045, f"DPO (λ = 0), correct token: {dpo:.1%}", color="#6B6B6B", fontsize=9
    )
    for mark in LAMBDAS[1:]:
        axes.axvline(mark, color="#E0E0E0", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(1e-2, 1e4)
    axes.set_ylim(0, 1.09)
    axes.set_xticks([0.01, 0.1, 0.5, 5, 50, 500, 10_000])
    axes.set_xticklabels(["0.01", "0.1", "0.5", "5", "50", "500", "10,000"])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("λ, where the hinge is on", color=INK)
    axes.set_ylabel("share of the tokens after the edit", color=INK)
    axes.set_title(
        "How large λ must be for the gradient to point the right way",
        loc="left",
        fontsize=12,
        color=INK,
    )
    axes.legend(loc="lower right", frameon=False, fontsize=9.5)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    pairs = [pair for split in ("train", "test") for pair in edit_pairs(tokenizer, split)]
    rows = [measure(pair, contexts(model, pair)) for pair in pairs]
    for title, some in (
        ("All pairs", rows),
        ("Shipped as they are", list(itertools.compress(rows, (pair.shipped for pair in pairs)))),
        ("Those of the tests", rows[:TESTED]),
    ):
        print(f"\n{title}:")
        report(some)
    draw(
        [row.thresholds for row in rows],
        Path(__file__).with_name("assets") / "theory-lambda.png",
    )
    report_steps(model, tokenizer)


if __name__ == "__main__":
    main()
