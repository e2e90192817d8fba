"""The public functions: hidden states in, loss or log-probs out, differentiable, with no
full-vocabulary logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpop import checks, losses
from fastdpop.call import LOGGED, Batch, Call, LMHead, Loss, Options, Pairs, Reference, RefLogps
from fastdpop.output import PreferenceOutput
from fastdpop.pair_loss import PairLoss, Totals
from fastdpop.rows import Rows, default_pairs
from fastdpop.transform import LogitTransform

__all__ = ["LOGGED", "fused_dpop_loss", "fused_logps", "fused_preference_loss"]


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
    form: str = "inside",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    pairs: Pairs | None = None,
    shift_labels: bool = True,
    reduction: str = "mean",
    engine: str = "auto",
    workspace_bytes: int | None = None,
    statistics: Sequence[str] = (),
    check_finite: bool = False,
) -> PreferenceOutput:
    """DPO-Positive, Eq. 3 of Smaug (arXiv:2402.13228), from hidden states to loss and gradients.

    ``L = -log sigmoid(beta * (r_w - r_l - lam * max(0, -r_w)))`` with ``r = log pi(y|x) - log
    ref(y|x)``, w chosen and l rejected. Where the policy equals the reference the hinge is off
    (slope 0), so the first step is DPO's.

    Args:
        beta: inverse temperature of the Bradley-Terry model; the paper uses 0.3.
        lam: weight of the penalty; the paper uses 50 and reports little difference over [5, 500].
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
        shift_labels=shift_labels,
        reduction=reduction,
        engine=engine,
        workspace_bytes=workspace_bytes,
        statistics=statistics,
        check_finite=check_finite,
    )


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
    shift_labels: bool = True,
    reduction: str = "mean",
    engine: str = "auto",
    workspace_bytes: int | None = None,
    statistics: Sequence[str] = (),
    check_finite: bool = False,
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
        shift_labels: the hidden state at t predicts the label at t + 1. False: labels are already shifted.
        reduction: ``"mean"`` or ``"sum"`` over pairs, or ``"none"``: a ``(P,)`` loss, which costs a trained lm_head 4
            matrix products, not 3.
        engine: ``"auto"`` or a name in :func:`fastdpop.engines.available`.
        workspace_bytes: bound on scratch memory, gradients and the copied rows ``(N, H)`` excluded; 512 MiB by default,
            on a GPU a sixteenth of its memory if that is more. A pair beyond it is computed in pieces, twice.
        statistics: any of ``"entropy"``, ``"mean_logits"``, ``"token_accuracy"``, computed in the same pass.
        check_finite: raise if the loss is not finite (waits for the device).

    Returns:
        :class:`PreferenceOutput`; `loss` is differentiable, once, in hidden, weight and bias.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it, its value and what was expected.
        NotImplementedError: a transform of torch.func, or forward-mode differentiation.
        FloatingPointError: `check_finite` is set and the loss is not finite.
    """
    transform = LogitTransform(softcap, logit_scale, temperature)
    head = LMHead(weight, bias, transform, engine, workspace_bytes)
    reference = Reference(ref_logps, ref_hidden, ref_weight, ref_bias, kl)
    batch = Batch(hidden, labels, cu_seqlens, shift_labels, hidden_index)
    options = Options(losses.as_loss(loss), pairs, reduction, statistics, check_finite)
    return _preference_loss(batch, head, reference, options)


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
    reduction: str = "sequence",
    token_weights: Tensor | None = None,
    ld_alpha: float | None = None,
    engine: str = "auto",
    workspace_bytes: int | None = None,
    dtype: torch.dtype = torch.float32,
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
    checks.choice("reduction", reduction, ("sequence", "token"))
    checks.choice("dtype", dtype, (torch.float32, torch.float64))
    transform = LogitTransform(softcap, logit_scale, temperature)
    batch = Batch(hidden, labels, cu_seqlens, shift_labels, hidden_index)
    batch.check()
    call = Call.of(hidden, LMHead(weight, bias, transform, engine, workspace_bytes))
    checks.weighting(token_weights, ld_alpha, labels, batch.sequences, reduction)
    rows = batch.rows(
        len(weight),
        default_pairs(batch.sequences, labels.device),
        keep_unpaired=True,
        token_weights=token_weights,
        ld_alpha=ld_alpha,
    )
    logps, _ = call.row_logps(rows, ())
    if reduction == "token":
        values = logps[rows.members].to(torch.promote_types(logps.dtype, dtype))
        flat = values.new_zeros(labels.numel())
        return flat.index_put((rows.label_index,), values).reshape(labels.shape)
    sums = rows.sum_per_sequence(logps).to(torch.promote_types(logps.dtype, dtype))
    # All of them, of a length that a compiler knows.
    return sums.new_zeros(batch.sequences).index_put((rows.inputs,), sums)


def _preference_loss(
    batch: Batch, head: LMHead, reference: Reference, options: Options
) -> PreferenceOutput:
    """:func:`fused_preference_loss`."""
    traits, kl = options.loss.traits, reference.kl
    options.check()
    batch.check()
    count, device = batch.sequences, batch.hidden.device
    call = Call.of(batch.hidden, head)
    pairs = checks.pairs(options.pairs, count, traits.accepts_unpaired, device)
    if pairs is None:
        pairs = default_pairs(count, device)
    reference.check(traits.needs_reference)
    if kl is not None:
        checks.kl(kl, traits.uses_kl, device)

    rows = batch.rows(len(head.weight), pairs, ld_alpha=traits.ld_alpha)
    by_pair = traits.ld_alpha is not None and options.pairs is not None
    loss = PairLoss(
        rows,
        options.loss,
        Totals.of(rows),
        ref_logps=_ref_logps(reference, batch, head, rows, pairs, by_pair),
        kl=None if kl is None else kl.detach(),
        statistics=options.names,
        mean=options.reduction == "mean",
    )
    coupled = traits.couples_pairs or (traits.couples_pairs_without_kl and kl is None)
    if call.spec.needs_grad.lm_head and not coupled and options.reduction != "none":
        # The loss of a pair is known as soon as its log-probs are: one pass.
        total, sums, found = call.pair_loss(loss)
        with torch.no_grad():
            values = loss.losses(sums, found)
    else:
        row_logps, found = call.row_logps(rows, loss.statistics)
        sums = rows.sum_per_sequence(row_logps)
        values = loss.losses(sums, found)
        total = values
        if options.reduction != "none":
            total = values.mean() if options.reduction == "mean" else values.sum()
    total = total.to(call.spec.result_dtype)
    with torch.no_grad():
        output = _output(total, values.detach(), sums.detach(), found, loss, options, count)
    if options.check_finite:
        checks.finite(
            output.loss,
            hidden=batch.hidden,
            weight=head.weight,
            bias=head.bias,
            ref_hidden=reference.hidden,
            ref_weight=reference.weight,
            ref_bias=reference.bias,
            ref_logps=None if reference.logps is None else loss.ref_logps,
            kl=kl,
        )
    return output


def _ref_logps(
    reference: Reference, batch: Batch, head: LMHead, rows: Rows, pairs: Tensor, by_pair: bool
) -> Tensor | None:
    """The reference's log-probs ``(2, P)``, arbitrary where a side is absent; None without one."""
    if reference.hidden is None:
        if reference.logps is None:
            return None
        given = checks.ref_logps(reference.logps, pairs, batch.sequences, by_pair)
        # Beside float64 log-probs of rows, none of whose sums is ever rounded.
        return given.double() if batch.hidden.dtype == torch.float64 else given
    checks.like("ref_hidden", reference.hidden, "hidden", batch.hidden)
    if reference.weight is not None:
        own = head.weight
        head = head._replace(weight=reference.weight, bias=reference.bias)
        checks.projection(reference.hidden, head.weight, head.bias, prefix="ref_")
        checks.same_vocabulary(head.weight, own)
    with torch.no_grad():
        logps, _ = Call.of(reference.hidden, head, "ref_").row_logps(rows, ())
        sums = rows.sum_per_sequence(logps)
    return sums[rows.pairs.clamp_min(0)].T.contiguous()


def _output(
    total: Tensor,
    values: Tensor,
    sums: Tensor,
    found: Tensor,
    loss: PairLoss,
    options: Options,
    sequences: int,
) -> PreferenceOutput:
    """Everything that is returned, in the result dtype, from the log-probs ``(S,)`` of the layout's
    sequences and the statistics ``(K, N)`` of its rows.
    """
    pairs, rows, dtype = loss.pairs(sums, found), loss.rows, total.dtype
    chosen_rewards, rejected_rewards = loss.function.rewards(pairs)
    chosen_rewards = chosen_rewards * pairs.chosen_present
    rejected_rewards = rejected_rewards * pairs.rejected_present
    both = pairs.chosen_present & pairs.rejected_present
    margins = chosen_rewards - rejected_rewards
    accuracy = ((margins > 0) & both).sum() / both.sum().clamp_min(1).to(dtype)
    penalty = None
    if pairs.ref_chosen is not None:
        penalty = (0.0 - pairs.chosen_logratios).relu().to(dtype)
    lengths = rows.lengths.new_zeros(sequences).index_put((rows.inputs,), rows.lengths)
    means: dict[str, Any] = {}
    for name in options.statistics:
        line = found[loss.statistics.index(name)]
        mean = rows.unweighted().sum_per_sequence(line) / rows.lengths.clamp_min(1)
        means[name] = line.new_zeros(sequences).index_put((rows.inputs,), mean.to(dtype))
    return PreferenceOutput(
        loss=total,
        losses=values.to(dtype),
        chosen_logps=pairs.chosen.to(dtype),
        rejected_logps=pairs.rejected.to(dtype),
        chosen_rewards=chosen_rewards.to(dtype),
        rejected_rewards=rejected_rewards.to(dtype),
        margins=margins.to(dtype),
        accuracy=accuracy,
        penalty=penalty,
        lengths=lengths,
        **means,
    )
