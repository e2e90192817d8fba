"""The public functions: hidden states in, loss or log-probs out, differentiable, with no
full-vocabulary logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdpop import checks, losses
from fastdpop.arguments import Given, Weighting, begun
from fastdpop.call import (
    LOGGED,
    Batch,
    LMHead,
    Loss,
    Options,
    Pairs,
    PairValues,
    Reference,
    RefLogps,
)
from fastdpop.choices import (
    EngineName,
    Form,
    GradReduction,
    LogpsReduction,
    Reduction,
    Statistic,
    words,
)
from fastdpop.distributed.parallel import Parallel, uncompiled_with_groups
from fastdpop.output import PreferenceOutput
from fastdpop.preference import logps, preference_loss
from fastdpop.stray import known_keywords
from fastdpop.transform import LogitTransform

if TYPE_CHECKING:  # not every build of torch has them
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Ranks = ProcessGroup | DeviceMesh

__all__ = ["LOGGED", "fused_dpop_loss", "fused_logps", "fused_preference_loss"]


@known_keywords
def fused_dpop_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ref_logps: RefLogps | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hidden_index: Tensor | None = None,
    beta: float = 0.3,
    lam: float = 50.0,
    form: Form = "inside",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    pairs: Pairs | None = None,
    pair_values: PairValues | None = None,
    shift_labels: bool = True,
    reduction: Reduction = "mean",
    engine: EngineName = "auto",
    workspace_bytes: int | None = None,
    statistics: Sequence[Statistic] = (),
    state_columns: int | None = None,
    check_finite: bool = False,
    group: Ranks | None = None,
    cp_group: Ranks | None = None,
    tp_group: Ranks | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    grad_reduction: GradReduction = "mean",
) -> PreferenceOutput:
    """DPO-Positive, Eq. 3 of Smaug (arXiv:2402.13228), from hidden states to loss and gradients.

    ``L = -log sigmoid(beta * (r_w - r_l - lam * max(0, -r_w)))`` with ``r = log pi(y|x) - log
    ref(y|x)``, w chosen and l rejected. Where the policy equals the reference the hinge is off
    (slope 0), so the first step is DPO's.

    Args:
        beta: inverse temperature of the Bradley-Terry model; the paper uses 0.3.
        lam: weight of the penalty; the paper uses 50; an author has seen little difference over [5, 500].
        form: where lambda stands: ``"inside"`` (Eq. 3), ``"outside"``: ``-log sigmoid(beta * (r_w -
            r_l) - lam * p)``, the same with ``lam_outside = beta * lam_inside``; or ``"additive"``:
            ``-log sigmoid(beta * (r_w - r_l)) + lam * p``.
        label_smoothing: probability in [0, 0.5) that a preference is flipped (cDPO).

    Everything else is as in :func:`fused_preference_loss`.
    """
    return fused_preference_loss(
        hidden,
        weight,
        labels,
        loss=losses.get("dpop", beta=beta, lam=lam, form=form, label_smoothing=label_smoothing),
        ref_logps=ref_logps,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        bias=bias,
        cu_seqlens=cu_seqlens,
        hidden_index=hidden_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        pairs=pairs,
        pair_values=pair_values,
        shift_labels=shift_labels,
        reduction=reduction,
        engine=engine,
        workspace_bytes=workspace_bytes,
        statistics=statistics,
        state_columns=state_columns,
        check_finite=check_finite,
        group=group,
        cp_group=cp_group,
        tp_group=tp_group,
        vocab_size=vocab_size,
        sequence_parallel=sequence_parallel,
        grad_reduction=grad_reduction,
    )


@known_keywords
@uncompiled_with_groups
def fused_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss: Loss = "dpop",
    ref_logps: RefLogps | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hidden_index: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    pairs: Pairs | None = None,
    pair_values: PairValues | None = None,
    shift_labels: bool = True,
    reduction: Reduction = "mean",
    engine: EngineName = "auto",
    workspace_bytes: int | None = None,
    statistics: Sequence[Statistic] = (),
    state_columns: int | None = None,
    check_finite: bool = False,
    group: Ranks | None = None,
    cp_group: Ranks | None = None,
    tp_group: Ranks | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    grad_reduction: GradReduction = "mean",
) -> PreferenceOutput:
    """Any preference loss, from hidden states to loss and gradients.

    Args:
        hidden: last hidden states, after the final norm: ``(S, T, H)``, or packed ``(positions, H)`` with `cu_seqlens`.
            Without `pairs`, S = 2B and the B chosen sequences come first. float64, float32, bfloat16 or float16.
        weight: ``(V, H)`` lm_head weight, in the dtype of `hidden` (under autocast, any); bias: ``(V,)``.
        labels: ``(S, T)`` or ``(positions,)`` int64, aligned with the input ids as in Hugging Face; -100 is not scored.
        loss: a name (:func:`fastdpop.losses.available`), a loss (:func:`fastdpop.losses.get`), or a function of
            :class:`~fastdpop.losses.PairLogps` (see :func:`fastdpop.losses.pairwise`).
        ref_logps: the reference's summed log-probs: ``(chosen, rejected)``, each ``(P,)``, or one ``(S,)`` tensor. In
            float64 they are compared with unrounded ones of the policy, in float32 with ones rounded alike (unless
            `hidden` is float64). With LD-DPO's token weights they must be weighted alike (`ld_alpha` of fused_logps).
            NaN, infinite or positive ones are errors. Refused, as `ref_hidden` is, by losses that read no reference.
        ref_hidden: the reference's hidden states instead, shaped as `hidden` up to H; scored in this call, without
            gradients, through `ref_weight` and `ref_bias`, or through the policy's lm_head where those are None.
        kl: 0-d estimate of KTO's reference point z_0 in nats; an error for losses that do not read it.
        cu_seqlens: ``(S + 1,)`` bounds of the packed sequences, from 0 to the number of positions.
        hidden_index: int64, shaped as `labels`: which row of `hidden`, then ``(N, H)``, is the state at each place, for
            states that several sequences share (:func:`fastdpop.pack`). Only places before scored ones are read.
        softcap, logit_scale, temperature: see :class:`fastdpop.transform.LogitTransform`.
        pairs: ``(P, 2)`` indices of chosen and rejected sequence; by default the first half against the second. A
            sequence may serve several pairs and is scored once; one that no pair uses is not scored. -1 stands for a
            side that does not exist, for losses that take unpaired data (KTO).
        pair_values: numbers that the data give for each pair, ``(P,)`` by name, finite, float64, float32 or integers.
            ``"weight"`` multiplies a pair's loss, whichever that is (at least 0; a mean stays one over pairs). Others
            are the loss's, which reads them as ``PairLogps.values``, a function of yours any: ``"margin"`` is in units
            of the implicit reward, after beta; ``"offset"`` in nats, before beta; ``"chosen_score"`` and
            ``"rejected_score"`` are rewards that someone gave; ``"list"`` is the id of the list that a pair is of.
        shift_labels: the hidden state at t predicts the label at t + 1. False: labels are already shifted.
        reduction: ``"mean"`` or ``"sum"`` over pairs, or ``"none"``: a ``(P,)`` loss, which costs a trained lm_head 4
            matrix products, not 3.
        engine: ``"auto"`` or a name in :func:`fastdpop.engines.available`.
        workspace_bytes: bound on scratch memory, gradients and the copied rows ``(N, H)`` excluded; 512 MiB by default,
            on a GPU a sixteenth of its memory if that is more. A pair beyond it is computed in pieces, twice.
        statistics: any of ``"entropy"``, ``"mean_logits"``, ``"token_accuracy"``, computed in the same pass, and
            ``"displacement"``: where log-probs of chosen completions fall, and the CHES score, as said there.
        state_columns: how many columns of `hidden`, from the left, are the state that the CHES score is of, where what
            adapters of the lm_head computed stands behind it; all by default.
        check_finite: raise if the loss is not finite (waits for the device).
        group: processes that have pairs of their own, as a process group or a device mesh of one dimension. Totals,
            means and losses that couple pairs are over the pairs of all of them; so is `loss`. One may have none.
        cp_group: processes that hold parts of every sequence, in any order, with labels that were shifted before
            (``shift_labels=False``). Log-probs and lengths of sequences are those of whole ones.
        tp_group: processes that hold parts of the lm_head: `weight` and `bias` are this one's rows, in the order of
            the ranks, as many as you like; labels, and hidden states, are the same everywhere.
        vocab_size: V, where the lm_head's last rows are padding, which is left out.
        sequence_parallel: with tp_group, `hidden` is this rank's ``(S, T / n, H)`` of the sequences.
        grad_reduction: how gradients of parameters are combined over `group` and `cp_group` afterwards: ``"mean"`` by
            DDP, FSDP and DeepSpeed, or ``"sum"``. The result is that of one process on the joined batch.

    Returns:
        :class:`PreferenceOutput`; `loss` is differentiable, once, in hidden, weight and bias.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it, its value and what was expected.
        NotImplementedError: a transform of torch.func, or forward-mode differentiation.
        RuntimeError: another rank of a group failed before the loss, or was given other settings.
        FloatingPointError: `check_finite` is set and the loss is not finite.
    """
    parallel = Parallel.of(group, cp_group, tp_group, grad_reduction)

    def given() -> Given:
        transform = LogitTransform(softcap, logit_scale, temperature)
        return Given(
            Batch(hidden, labels, cu_seqlens, shift_labels, hidden_index),
            LMHead(weight, bias, transform, engine, workspace_bytes),
            Reference(ref_logps, ref_hidden, ref_weight, ref_bias, kl),
            Options(
                losses.as_loss(loss),
                pairs,
                reduction,
                statistics,
                check_finite,
                pair_values,
                state_columns,
            ),
        )

    found = begun(given, hidden, parallel, vocab_size, sequence_parallel)
    return preference_loss(found, parallel)


@known_keywords
@uncompiled_with_groups
def fused_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hidden_index: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    shift_labels: bool = True,
    reduction: LogpsReduction = "sequence",
    token_weights: Tensor | None = None,
    ld_alpha: float | None = None,
    engine: EngineName = "auto",
    workspace_bytes: int | None = None,
    dtype: torch.dtype = torch.float32,
    cp_group: Ranks | None = None,
    tp_group: Ranks | None = None,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    grad_reduction: GradReduction = "mean",
) -> Tensor:
    """Differentiable log-probabilities of the labels, for anything that has no loss here.

    Args:
        reduction: ``"sequence"``: weighted sums, ``(S,)``; ``"token"``: one value per label, shaped
            as `labels`, 0 where not scored.
        token_weights: weight of every label in its sequence's sum, shaped as `labels`; not
            differentiable.
        ld_alpha: LD-DPO's weight, in [0, 1], of the tokens past the length of the shorter of
            sequences i and i + S / 2.
        dtype: of the result. ``torch.float64`` leaves a sequence's sum unrounded, for a reference
            that is compared with an unrounded policy: see `ref_logps`.

    The others are as in :func:`fused_preference_loss`. Costs 1 matrix product without gradients, 2
    with a frozen lm_head and 4 with a trained one, whose loss cannot be known here.

    Returns:
        float32, or float64 for float64 inputs or if `dtype` says so.

    Raises:
        ValueError, TypeError, NotImplementedError: as in :func:`fused_preference_loss`.
    """
    parallel = Parallel.of(None, cp_group, tp_group, grad_reduction)

    def given() -> Given:
        checks.choice("reduction", reduction, words(LogpsReduction))
        checks.choice("dtype", dtype, (torch.float32, torch.float64))
        transform = LogitTransform(softcap, logit_scale, temperature)
        return Given(
            Batch(hidden, labels, cu_seqlens, shift_labels, hidden_index),
            LMHead(weight, bias, transform, engine, workspace_bytes),
        )

    found = begun(given, hidden, parallel, vocab_size, sequence_parallel)
    return logps(found, Weighting(token_weights, ld_alpha), reduction, dtype, parallel)
