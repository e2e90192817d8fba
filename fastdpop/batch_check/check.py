"""``fastdpop.check_batch``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdpop import checks
from fastdpop.batch_check.labels import (
    check_ids,
    check_labels,
    check_length,
    check_scored,
    hidden_text,
    leading_padding,
)
from fastdpop.batch_check.pairs import check_pairs
from fastdpop.batch_check.references import Scores, check_references, differences
from fastdpop.batch_check.report import BatchReport, Finding
from fastdpop.batch_check.text import layout, shown
from fastdpop.batch_check.view import BatchView, read_batch, references_of
from fastdpop.batch_check.vocabulary import Vocabulary

_HARMLESS = {
    *("bos-twice", "chosen-equals-rejected", "completion-empty", "end-not-scored"),
    *("pairs-contradict", "pairs-repeated", "prompt-repeated", "sequence-not-scored"),
}
"""Findings after which a model's log-probs still mean what they should."""


def check_batch(
    model: Any,
    batch: Mapping[str, Any],
    ref_logps: Any = None,
    *,
    tokenizer: Any = None,
    pairs: Any = None,
    cu_seqlens: Tensor | None = None,
    shift_labels: bool = True,
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    at_start: bool = False,
    max_pairs: int = 8,
    show_pairs: int = 1,
    verbose: bool = True,
) -> BatchReport:
    """Look at a batch before it is trained on: print what is scored in it, and what looks wrong.

    Silent mistakes are what it is for: labels that are shifted already, a prompt or padding that is scored, chosen and
    rejected interleaved, reference log-probs that are swapped, averaged, scaled or of another batch, dropout. Each
    finding has a stable code, which docs/check.md explains.

    The model runs on a few pairs at most, without gradients and without dropout; it is left as it was, as are its
    gradients and the random state. A model that is sharded over processes does not run: all of them would have to.

    Args:
        model: a Hugging Face causal language model, attached or not, or what stands around one (PEFT, DDP,
            ``torch.compile``). None: only what needs no model is checked.
        batch: what the model is called with: ``input_ids`` and ``labels`` ``(2B, T)``, chosen sequences first, and
            ``attention_mask``. Also TRL's, with ``completion_mask`` in the place of labels, and what
            :func:`fastdpop.pack` gives.
        ref_logps: the reference's log-probs as for the loss, a pair of ``(B,)`` tensors or one ``(2B,)``, in nats;
            those in the batch (``ref_chosen_logps``, ``ref_rejected_logps``) by default.
        tokenizer: shows tokens as text. By default the one beside the model, if that is on this machine.
        pairs, cu_seqlens, shift_labels: as for :func:`fastdpop.fused_preference_loss`, where the call has them.
        hidden, weight: what you pass to the fused functions yourself: the hidden states ``(2B, T, H)`` of `batch`, and
            the lm_head's weight ``(V, H)``. They are compared with what the model's own head gets and has.
        at_start: nothing has been trained yet and the reference is this model, so that its log-probs must be the
            model's own; else another reference is as good as any that goes with the tokens.
        max_pairs: at most so many pairs go through the model.
        show_pairs: so many are printed.
        verbose: print the report. It is returned in any case.

    Returns:
        The findings. As a condition it is true if there are none.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    for name, value in (("max_pairs", max_pairs), ("show_pairs", show_pairs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} is {value!r}, expected a number of pairs")
    checks.flag("at_start", at_start)
    checks.flag("verbose", verbose)
    reason = _unable(model)
    view = read_batch(batch, pairs, cu_seqlens, shift_labels, hidden)
    references = references_of(batch, ref_logps, view)
    vocabulary = Vocabulary.of(model, tokenizer)
    findings = without_model(view, vocabulary, given=pairs is not None or "pairs" in batch)
    facts = layout(view, vocabulary)
    kept = view.pairs[:max_pairs]
    if not _goes_on(findings):
        reason = reason or "repair what was found, and look again"
    elif not kept:
        reason = reason or ("max_pairs is 0" if view.pairs else "there is no pair with both sides")
    if model is not None and reason is None:
        part = view.rows([row for side in zip(*kept, strict=True) for row in side])
        given = None if references is None else references[: len(kept)]
        found, said = _with_model(model, part, given, vocabulary, at_start, weight)
        findings, facts = findings + found, facts + said
    elif model is not None:
        facts.append(f"the model was not run: {reason}")
    findings += _of_weights(model)
    report = BatchReport.of(findings, facts, shown(view, vocabulary, show_pairs))
    if verbose:
        print(report)
    return report


def check_computed(
    model: Any,
    batch: Mapping[str, Any],
    logps: Tensor,
    ref_logps: Tensor | None,
    tokenizer: Any,
    at_start: bool = False,
    copies: bool = False,
) -> list[Finding]:
    """The findings of a batch that was computed already: the model is only looked at.

    Args:
        logps, ref_logps: ``(2B,)`` the log-probs of policy and reference; None: there is none.
        at_start: nothing has been trained yet, and dropout is thought to be off.
        copies: the optimizer trains copies of the weights.
    """
    from fastdpop.batch_check.model import check_dropout, dropouts, noise  # they need transformers

    view, vocabulary = read_batch(batch), Vocabulary.of(model, tokenizer)
    findings = without_model(view, vocabulary)
    references = references_of({}, ref_logps, view)
    if references is not None and _goes_on(findings):
        scores = scores_of(view, logps.detach().cpu().double(), references)
        findings += check_references(scores, vocabulary.size)
        off = float(((scores.policy - scores.reference).abs() / scores.lengths.clamp_min(1)).mean())
        if at_start and off > noise(model):
            evidence = (
                f"; policy and reference are {off:.2g} nats per token apart before the first step"
            )
            findings += check_dropout(dropouts(model), evidence)
    return findings if copies else findings + _of_weights(model)


def without_model(view: BatchView, vocabulary: Vocabulary, given: bool = False) -> list[Finding]:
    """What the tokens alone show.

    Args:
        given: which sequences are pairs was said, and does not follow from their order.
    """
    findings = check_ids(view, vocabulary) + check_labels(view)
    if findings:  # of which tokens are scored, such labels say nothing
        return findings
    findings = hidden_text(view, vocabulary)
    if findings:  # nor such a mask of what padding is
        return findings
    return check_length(view, vocabulary) + _of_sequences(view, vocabulary, given)


def _of_sequences(view: BatchView, vocabulary: Vocabulary, given: bool) -> list[Finding]:
    """What shows where ids, labels and mask go together."""
    findings = leading_padding(view, vocabulary)
    if findings:  # of where sequences begin
        return findings
    findings = check_scored(view, vocabulary)
    if any(finding.code == "nothing-scored" for finding in findings):
        return findings
    return findings + check_pairs(view, given)


def _goes_on(findings: list[Finding]) -> bool:
    """Whether log-probs are worth looking at."""
    return all(finding.code in _HARMLESS for finding in findings)


def _unable(model: Any) -> str | None:
    """Why a model does not run here; None if it does.

    Raises:
        TypeError: it is no causal language model.
    """
    if model is None:
        return None
    from fastdpop.batch_check.scores import why_not  # it needs transformers

    return why_not(model)


def _of_weights(model: Any) -> list[Finding]:
    if model is None:
        return []
    from fastdpop.batch_check.model import check_weights  # it needs transformers

    return check_weights(model)


def _with_model(
    model: Any,
    view: BatchView,
    references: Tensor | None,
    vocabulary: Vocabulary,
    at_start: bool,
    weight: Tensor | None,
) -> tuple[list[Finding], list[str]]:
    """What shows when the model runs; and facts."""
    # They need transformers, which the rest does not.
    from fastdpop.batch_check.hidden import check_hidden, check_weight
    from fastdpop.batch_check.model import check_likelihood, check_padding, measured_dropout, noise
    from fastdpop.batch_check.scores import running

    with running(model) as runner:
        findings: list[Finding] = []
        if weight is not None:
            findings += check_weight(runner.model, weight)
        if view.hidden is not None:
            findings += check_hidden(runner, view)
        logps = runner.logps(view)
        findings += check_likelihood(view, logps, vocabulary)
        findings += measured_dropout(runner, view, logps)
        findings += check_padding(runner, view, logps)
        if references is None:
            mean = float((logps * view.scored).sum(1).mean())
            return findings, [
                f"log-probs per sequence: {mean:.2f} nats in the mean; no reference was given"
            ]
        scores = scores_of(
            view, (logps * view.scored).sum(1), references, (logps * view.attended).sum(1)
        )
        findings += check_references(scores, vocabulary.size, at_start, noise(runner.model))
    return findings, differences(scores)


def scores_of(
    view: BatchView, policy: Tensor, references: Tensor, whole: Tensor | None = None
) -> Scores:
    """Pair by pair.

    Args:
        policy, whole: ``(S,)`` sums over scored tokens, and over all.
        references: ``(P, 2)``.
    """
    index = torch.tensor(view.pairs)
    lengths = view.lengths.double()[index]
    return Scores(policy[index], references, lengths, None if whole is None else whole[index])
