"""Reference log-probs held against the policy's own: what they would fit better than the sequences they are given for.

A reference may be another model than the policy was, and a policy moves. So closeness is never demanded (but with
`at_start`): a finding needs another explanation that fits much better, or numbers that no reference could give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpop.batch_check.report import Finding, between

_EXACT = 0.05
"""Share of a log-prob by which one explanation may miss, to be taken for the right one."""
_LEAST = 0.5
"""Nats that chosen and rejected must be apart, for their order to show."""
_GUESSED, _WORSE = 0.75, 3.0
"""A share of a guess's log-prob, and nats per token below the policy's; no reference that can read is there."""
_FEW, _MANY = 6, 12
"""Sequences of at least 5 tokens that say something of the others, and that say more."""
_OTHER = {False: (1.0, 0.5, 0.5), True: (0.7, 0.25, 0.4)}
"""For few and for many: a spread of the logarithm of reference over policy that is too much by itself, one that is too
much below a correlation, and that. Measured on 6,000 batches of 4 and 8 pairs: references with two layers less, with
noise in all weights, or before DPO and DPOP training stay below; of those of other batches 66 % and 97 % do not."""
_SWAP = "Give the chosen side first: ref_logps=(chosen, rejected), or (2B,) with all chosen sequences first"
_SUMS = (
    "A loss needs the sum over the scored tokens of each sequence, in nats, from the same labels: "
    "model(**batch, return_logps=True).logps under torch.no_grad()"
)
_RESCORE = "Score the reference on this very batch, or store its log-probs beside the pairs, by a key and not by place"


@dataclass(frozen=True)
class Scores:
    """P pairs' log-probs in nats, chosen and rejected beside each other, all ``(P, 2)`` float64.

    Attributes:
        policy, reference: sums over scored tokens.
        lengths: how many there are.
        whole: the policy's sums over all tokens, prompts too; None where they are not known.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    whole: Tensor | None = None

    def of(self, kept: Tensor) -> Scores:
        """Some of the pairs."""
        whole = None if self.whole is None else self.whole[kept]
        return Scores(self.policy[kept], self.reference[kept], self.lengths[kept], whole)


def check_references(
    scores: Scores, vocabulary: int | None = None, at_start: bool = False, noise: float = 2e-3
) -> list[Finding]:
    """The likeliest of the mistakes that fit; at most one finding.

    Args:
        vocabulary: tokens that the model knows.
        at_start: the reference is the policy, as it is.
        noise: nats per token that two passes of one model may differ by.
    """
    impossible = _impossible(scores.reference)
    if impossible:
        return [impossible]
    scores = scores.of((scores.lengths > 0).all(1) & (scores.policy < 0).all(1))
    if not len(scores.policy):
        return []
    for check in (_averaged, _scaled, _whole, _swapped, _moved):
        finding = check(scores)
        if finding:
            return [finding]
    finding = _unlikely(scores, vocabulary) or _opposed(scores) or _unrelated(scores)
    if finding:
        return [finding]
    return _stale(scores, noise) if at_start else []


def _impossible(reference: Tensor) -> Finding | None:
    """Numbers that are no log-probs."""
    finite = reference.isfinite()
    if not bool(finite.all()):
        count = int((~finite).sum())
        return Finding(
            "ref-not-finite",
            "error",
            f"{count} of {reference.numel()} reference log-probs are NaN or infinite",
            "Score the reference in float32 or bfloat16, and look at its own outputs",
        )
    positive = int((reference > 1e-3).sum())
    if positive:
        return Finding(
            "ref-positive",
            "error",
            f"{positive} of {reference.numel()} reference log-probs are above 0, up to {float(reference.max()):.1f}: "
            "log-probs never are",
            "Pass log-probs, not a loss (the negative of them), nor probabilities",
        )
    if not bool(reference.any()):
        return Finding(
            "ref-zero",
            "warning",
            "all reference log-probs are 0",
            "Score the reference model, or take a loss that needs none (simpo, orpo, cpo)",
        )
    return None


def _misses(scores: Scores, other: Tensor) -> Tensor:
    """``(P, 2)``: by how much the reference misses what it might be, as a share of that."""
    return (scores.reference - other).abs() / other.abs().clamp_min(1e-9)


def _fits(scores: Scores, other: Tensor) -> bool:
    """Whether the reference is that other thing in every sequence, and not the policy's log-prob in any."""
    miss, own = _misses(scores, other), _misses(scores, scores.policy)
    apart = float(own.min())
    return apart > 1e-3 and float(miss.max()) <= min(0.02, apart / 4)


def _averaged(scores: Scores) -> Finding | None:
    """Means over tokens: so little for so many tokens, in every sequence."""
    long = scores.lengths >= 5
    given, counts, sums = (x[long] for x in (scores.reference, scores.lengths, scores.policy))
    if len(given) < 2:
        return None
    ratio = (given * counts / sums).log()
    # Another model may be better, but not by the number of tokens in each sequence alike, nor near 0 everywhere.
    alike = float(ratio.abs().max()) <= 0.7 and float(ratio.std()) <= 0.35
    small = bool(((given > -0.15 * counts) & (given > 0.2 * sums) & (counts >= 8)).all())
    if not alike and not small:
        return None
    return Finding(
        "ref-averaged",
        "error" if alike else "warning",
        f"reference log-probs are {float(given.mean()):.2f} nats in the mean, over "
        f"{between(int(counts.min()), int(counts.max()))} tokens; the policy's are "
        f"{float((sums / counts).mean()):.2f} per token and {float(sums.mean()):.1f} in sum: these seem to be means "
        "over tokens, not sums",
        _SUMS,
    )


def _scaled(scores: Scores) -> Finding | None:
    """One factor for all, so exactly that it is no other model's."""
    ratio = (scores.reference / scores.policy).flatten()
    if len(ratio) < 4 or not bool((ratio > 0).all()):
        return None
    factor, spread = float(ratio.median()), float(ratio.log().std())
    varied = float(scores.policy.abs().log().std())
    exact = spread <= (0.01 if varied >= 0.1 else 0.001)  # other models of one text are alike, too
    if not exact or abs(math.log(factor)) < 0.2:
        return None
    return Finding(
        "ref-scaled",
        "error",
        f"every reference log-prob is {factor:.3g} times the policy's, to within {spread:.1%}",
        "Pass log-probs in nats as they are: not multiplied by beta, not divided by a length, not to base 2 or 10",
    )


def _whole(scores: Scores) -> Finding | None:
    """Sums over prompts too."""
    if scores.whole is None or not _fits(scores, scores.whole):
        return None
    return Finding(
        "ref-whole-sequence",
        "warning",
        f"reference log-probs are {float(scores.reference.mean()):.1f} nats in the mean, as the policy's over "
        f"prompt and completion ({float(scores.whole.mean()):.1f}); over completions these are "
        f"{float(scores.policy.mean()):.1f}",
        _SUMS,
    )


def _swapped(scores: Scores) -> Finding | None:
    """Each side's reference is the policy's log-prob of the other side."""
    own, given = _margins(scores)
    missed = _misses(scores, scores.policy.flip(1))
    straight, swapped = float((given - own).abs().sum()), float((given + own).abs().sum())
    factor = 5 if len(own) > 1 else 10
    if (
        float(missed.median()) > _EXACT
        or float(own.abs().mean()) < _LEAST
        or swapped * factor > straight
    ):
        return None
    evidence = f"each side's is {float(missed.median()):.1%} from the policy's other side"
    return _as_swapped(own, given, evidence)


def _opposed(scores: Scores) -> Finding | None:
    """Another model's, or an earlier one's, whose margins have the policy's size and the opposite sign."""
    own, given = _margins(scores)
    if len(own) < 4 or float(own.abs().mean()) < _LEAST:
        return None
    cosine = _cosine(own, given)
    return _as_swapped(own, given, f"their cosine is {cosine:.2f}") if cosine <= -0.8 else None


def _cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-9))


def _margins(scores: Scores) -> tuple[Tensor, Tensor]:
    """``(P,)`` chosen minus rejected, of policy and reference."""
    return tuple(x[:, 0] - x[:, 1] for x in (scores.policy, scores.reference))  # type: ignore[return-value]


def _as_swapped(own: Tensor, given: Tensor, evidence: str) -> Finding:
    return Finding(
        "ref-swapped",
        "warning",
        f"chosen minus rejected is {float(given.mean()):+.2f} nats in the mean for the reference and "
        f"{float(own.mean()):+.2f} for the policy, and {evidence}: the sides seem swapped",
        _SWAP,
    )


def _moved(scores: Scores) -> Finding | None:
    """The right numbers in other places: shuffled, sorted, or alternating."""
    own, given = scores.policy.T.flatten(), scores.reference.T.flatten()
    placed = own.argsort()[given.argsort().argsort()]  # where each one's like stands
    missed = float(((given - own[placed]) / own[placed]).abs().mean())
    straight = float(_misses(scores, scores.policy).mean())
    if len(own) < 4 or missed > 0.02 or straight < max(0.05, 10 * missed):
        return None
    other = int((placed != placed.sort().values).nonzero()[0])
    return Finding(
        "ref-order",
        "warning",
        f"reference log-probs are the policy's in another order ({missed:.1%} away, {straight:.0%} in the order "
        f"given): that of sequence {other} fits sequence {int(placed[other])}",
        "Keep them in the order of the batch, chosen sequences first; a shuffled data set shuffles them too",
    )


def _unlikely(scores: Scores, vocabulary: int | None) -> Finding | None:
    """Near a guess among all tokens, or below, where the policy knows better."""
    if vocabulary is None or int(scores.lengths.sum()) < 4:
        return None
    own, mean = (float(x.sum() / scores.lengths.sum()) for x in (scores.policy, scores.reference))
    guess = -math.log(vocabulary)
    if not (mean < _GUESSED * guess and mean < own - _WORSE):
        return None
    return Finding(
        "ref-unlikely",
        "warning",
        f"reference log-probs are {mean:.1f} nats per token in the mean, where a guess among all tokens has "
        f"{guess:.1f} and the policy {own:.1f}: the reference read other tokens, as with another tokenizer",
        "Score the reference on this batch's input_ids; a reference needs the policy's tokenizer",
    )


def _unrelated(scores: Scores) -> Finding | None:
    """Of other sequences: reference and policy part by other factors in each, and do not rise and fall together."""
    kept = scores.lengths >= 5
    own, given = (x[kept].abs().log() for x in (scores.policy, scores.reference))
    if len(own) < _FEW:
        return None
    ratio = given - own
    spread, together = float(ratio.std()), float(torch.corrcoef(torch.stack([own, given]))[0, 1])
    many = len(own) >= _MANY
    far, apart, loose = _OTHER[many]
    crossed = many and _cosine(*_margins(scores)) < 0.1
    if not (spread > far or (spread > apart and (together < loose or crossed))):
        return None
    return Finding(
        "ref-other-batch",
        "warning",
        f"reference log-probs are {math.exp(float(ratio.min())):.2g} to {math.exp(float(ratio.max())):.2g} times the "
        f"policy's, with a correlation of {together:.2f} over {len(own)} sequences: they seem to be of another batch, "
        "or of other tokens",
        _RESCORE,
    )


def _stale(scores: Scores, noise: float) -> list[Finding]:
    """Not the policy's, where they must be."""
    off = (scores.reference - scores.policy).abs()
    if bool((off <= 5 * noise * scores.lengths + 0.01 * scores.policy.abs()).all()):
        return []
    return [
        Finding(
            "ref-stale",
            "warning",
            f"policy and reference differ by {float(off.mean()):.2f} nats per sequence in the mean (at most "
            f"{float(off.max()):.2f}), expected none before the first step where both are one model",
            "Score the reference anew, with the model that training starts from, in the same dtype and with dropout "
            "off; a cache may be of earlier weights",
        )
    ]


def differences(scores: Scores) -> list[str]:
    """How far policy and reference are apart, as a fact."""
    policy = scores.policy
    if torch.equal(scores.reference, scores.reference.float().double()):  # what it was rounded to
        policy = policy.float().double()
    off = float((scores.reference - policy).abs().mean())
    return [
        f"log-probs per sequence: policy {float(scores.policy.mean()):.2f}, reference "
        f"{float(scores.reference.mean()):.2f} nats; {off:.2g} apart in the mean (0 but for rounding before the first "
        "step, if the reference is this model)"
    ]
