"""Reference log-probs held against the policy's own: what they would fit better than the sequences they are given for.

A reference may be another model than the policy was, and a policy moves. So closeness is never demanded (but with
`at_start`): a finding needs another explanation that fits much better, or numbers that no reference could give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fastdpop.batch_check.report import Finding

_EXACT = 0.05
"""Share of a log-prob by which one explanation may miss, to be taken for the right one."""
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
    worse = _unlikely(scores, vocabulary) or _unrelated(scores)
    if worse:
        return [worse]
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


def _fits(scores: Scores, other: Tensor, exact: float = _EXACT) -> bool:
    """Whether the reference is that other thing, and not the policy's log-prob."""
    miss, own = _misses(scores, other).flatten(), _misses(scores, scores.policy).flatten()
    return float(miss.median()) <= exact and float(miss.median()) * 4 <= float(own.median())


def _averaged(scores: Scores) -> Finding | None:
    """Means over tokens: so little for so many tokens, in every sequence."""
    long = scores.lengths >= 8
    if int(long.sum()) < 2:
        return None
    means = (scores.policy / scores.lengths)[long]
    given, counts = scores.reference[long], scores.lengths[long]
    ratio = (given / means).log()
    # Another model may be better, but not by the number of tokens, in each sequence alike.
    if not float(ratio.abs().max()) <= 0.7 or not float(ratio.std()) <= 0.35:
        return None
    return Finding(
        "ref-averaged",
        "error",
        f"reference log-probs are {float(given.mean()):.2f} nats in the mean, over {int(counts.min())} to "
        f"{int(counts.max())} tokens; the policy's mean per token is {float(means.mean()):.2f}, its sum "
        f"{float(scores.policy[long].mean()):.1f}: these are means over tokens, not sums",
        _SUMS,
    )


def _scaled(scores: Scores) -> Finding | None:
    """One factor for all, so exactly that it is no other model's."""
    ratio = (scores.reference / scores.policy).flatten()
    if len(ratio) < 4 or not bool((ratio > 0).all()):
        return None
    factor, spread = float(ratio.median()), float(ratio.log().std())
    varied = float(scores.policy.abs().log().std())
    if not (spread <= 0.01 and abs(math.log(factor)) >= 0.2 and varied >= 0.1):
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
    """The sides' order: margins of the opposite sign, pair by pair."""
    own = scores.policy[:, 0] - scores.policy[:, 1]
    given = scores.reference[:, 0] - scores.reference[:, 1]
    straight, swapped = float((given - own).abs().sum()), float((given + own).abs().sum())
    flipped = scores.policy.flip(1)
    near = float(_misses(scores, flipped).median()) <= _EXACT
    size = float(own.abs().mean())
    if size < 0.5 or swapped * (5 if near and len(own) > 1 else 10) > straight or not near:
        return None
    return Finding(
        "ref-swapped",
        "warning",
        f"chosen minus rejected is {float(given.mean()):+.2f} nats for the reference and {float(own.mean()):+.2f} for "
        f"the policy, and each side's reference is {float(_misses(scores, flipped).median()):.1%} from the policy's "
        "other side: the sides seem swapped",
        _SWAP,
    )


def _moved(scores: Scores) -> Finding | None:
    """The right numbers in other places: shuffled, sorted, or alternating."""
    own, given = scores.policy.T.flatten(), scores.reference.T.flatten()
    if len(own) < 4 or float(_misses(scores, scores.policy).median()) < 0.1:
        return None
    missed = ((own.sort().values - given.sort().values).abs() / own.sort().values.abs()).max()
    if float(missed) > _EXACT:
        return None
    order = [0] * len(own)
    for at, source in zip(given.argsort().tolist(), own.argsort().tolist(), strict=True):
        order[at] = source
    return Finding(
        "ref-order",
        "warning",
        f"reference log-probs are the policy's in another order (sequence 0 has that of {order[0]}, 1 that of "
        f"{order[1]}), to within {float(missed):.1%}",
        "Keep them in the order of the batch, chosen sequences first; a shuffled data set shuffles them too",
    )


def _unlikely(scores: Scores, vocabulary: int | None) -> Finding | None:
    """Worse than a guess among all tokens."""
    if vocabulary is None or int(scores.lengths.sum()) < 4:
        return None
    mean, guess = float(scores.reference.sum() / scores.lengths.sum()), -math.log(vocabulary)
    own = float(scores.policy.sum() / scores.lengths.sum())
    if not (mean < guess - 1.0 and mean < own - 1.0):
        return None
    return Finding(
        "ref-unlikely",
        "warning",
        f"reference log-probs are {mean:.1f} nats per token in the mean, less than a guess among all tokens "
        f"({guess:.1f}); the policy's are {own:.1f}: the reference read other tokens, as with another tokenizer",
        "Score the reference on this batch's input_ids; a reference needs the policy's tokenizer",
    )


def _unrelated(scores: Scores) -> Finding | None:
    """Of other sequences: what they have in common with the policy's is no more than chance gives."""
    own, given, counts = (x.flatten() for x in (scores.policy, scores.reference, scores.lengths))
    kept = (counts >= 5) & (given < 0)
    if int(kept.sum()) < 6:
        return None
    ratio = (given[kept] / own[kept]).log()
    spread, varied = float(ratio.std()), float(own[kept].abs().log().std())
    return _other(spread, varied, ratio)


def _other(spread: float, varied: float, ratio: Tensor) -> Finding | None:
    if not (spread > 0.5 and varied > 0.2):
        return None
    return Finding(
        "ref-other-batch",
        "warning",
        f"reference log-probs are {math.exp(float(ratio.min())):.2g} to {math.exp(float(ratio.max())):.2g} times the "
        "policy's: they do not go with these sequences. They seem to be of another batch, or of other tokens",
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
    off = float((scores.reference - scores.policy).abs().mean())
    return [
        f"log-probs per sequence: policy {float(scores.policy.mean()):.2f}, reference "
        f"{float(scores.reference.mean()):.2f} nats; {off:.2g} apart in the mean (0 before the first step, if the "
        "reference is this model)"
    ]
