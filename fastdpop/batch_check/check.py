"""``fastdpop.check_batch``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdpop.batch_check.labels import check_ids, check_labels, check_scored
from fastdpop.batch_check.report import BatchReport, Finding
from fastdpop.batch_check.text import shown
from fastdpop.batch_check.view import read_batch
from fastdpop.batch_check.vocabulary import Vocabulary


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
    view = read_batch(batch, pairs, cu_seqlens, shift_labels)
    vocabulary = Vocabulary.of(model, tokenizer)
    findings: list[Finding] = check_ids(view, vocabulary) + check_labels(view)
    findings += check_scored(view, vocabulary)
    report = BatchReport.of(findings, [], shown(view, vocabulary, show_pairs))
    if verbose:
        print(report)
    return report
