"""A preference loss, from arguments to output: checks, rows, one of two ways through the lm_head, and what is returned.

With other processes, all make sure first that each of them will come as far as the lm_head
(:mod:`.distributed.agreement`); what follows is the same for one process, which is by itself the whole batch.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpop import checks, given_logps, pair_values
from fastdpop.arguments import Given, Weighting, device_of
from fastdpop.call import DISPLACEMENT, Batch, Call, LMHead, Options, Reference
from fastdpop.distributed import collectives
from fastdpop.distributed.agreement import meeting
from fastdpop.distributed.pairs import joined_pairs, whole_sequences
from fastdpop.distributed.parallel import Parallel
from fastdpop.losses import ranking
from fastdpop.losses.trial import tried
from fastdpop.output import PreferenceOutput
from fastdpop.pair_loss import PairLoss, Totals
from fastdpop.rows import Rows, default_pairs

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""Of an object in its repr: it differs between processes."""


class _Prepared(NamedTuple):
    """A call whose arguments are in order."""

    call: Call
    rows: Rows
    ref_logps: Tensor | None
    ref_call: Call | None
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Whole:
    """The batch that this process's pairs and tokens are a part of; by itself, all of it.

    Attributes:
        totals: pairs, sides and chosen tokens; None by itself.
        pairs_of: pairs of each process.
    """

    parallel: Parallel
    totals: tuple[int, int, int] | None = None
    pairs_of: Sequence[int] = ()

    @property
    def count(self) -> int | None:
        """Pairs, where there are others."""
        return None if self.totals is None else self.totals[0]


class _Computed(NamedTuple):
    """
    Attributes:
        total: the loss, differentiable.
        losses: ``(P,)`` of pairs; sums: ``(S,)`` log-probs of sequences.
        found: ``(K, N)`` statistics of rows; logps: ``(N,)`` their log-probs.
    """

    total: Tensor
    losses: Tensor
    sums: Tensor
    found: Tensor
    logps: Tensor


def preference_loss(given: Given, parallel: Parallel) -> PreferenceOutput:
    """:func:`fastdpop.fused_preference_loss`."""
    batch, head, reference, options = given
    if parallel.alone:
        prepared, whole = _prepared(batch, head, reference, options, parallel), _Whole(parallel)
    else:
        with meeting(parallel, device_of(batch.hidden)) as brought:
            prepared = _prepared(batch, head, reference, options, parallel)
            brought.settings = _settings(prepared, options, reference)
            brought.layout = _layout(batch, prepared.rows)
            brought.tokens = _tokens(prepared.rows, parallel)
            brought.totals = Totals.of(prepared.rows).numbers()
        whole = _Whole(parallel, brought.totals, brought.pairs_of)
        if whole.count == 0:
            raise ValueError(
                "the batch holds 0 pairs on every rank of group, expected at least one"
            )
    rows, count = prepared.rows, batch.sequences
    totals = Totals.of(rows)
    if whole.totals is not None:
        totals = Totals.given(whole.totals, batch.hidden.device)
    kl = reference.kl
    summed = sequences_over(parallel, rows, count)
    loss = PairLoss(
        rows,
        options.loss,
        totals,
        ref_logps=_ref_logps(prepared, summed),
        kl=None if kl is None else kl.detach(),
        statistics=options.names,
        mean=options.reduction == "mean",
        count=whole.count,
        summed=summed,
        values=prepared.values,
    )
    computed = _computed(prepared.call, loss, options, whole)
    with torch.no_grad():
        output = _output(computed, prepared.call, loss, options, count)
    if options.check_finite:
        _check_finite(
            output.loss,
            hidden=batch.hidden,
            weight=head.weight,
            bias=head.bias,
            ref_hidden=reference.hidden,
            ref_weight=reference.weight,
            ref_bias=reference.bias,
            kl=kl,
        )
    return output


def _prepared(
    batch: Batch, head: LMHead, reference: Reference, options: Options, parallel: Parallel
) -> _Prepared:
    """Checks, and the rows: all that can go wrong with arguments."""
    traits, kl = options.loss.traits, reference.kl
    batch.check(empty=parallel.data is not None)
    options.check(batch.hidden.shape[-1])
    count, device = batch.sequences, batch.hidden.device
    call = Call.of(batch.hidden, head)
    pairs = checks.pairs(
        options.pairs, count, traits.accepts_unpaired, device, empty=parallel.data is not None
    )
    if pairs is None:
        pairs = default_pairs(count, device)
    reference.check(options.loss)
    if kl is not None:
        checks.kl(kl, device)
    checks.split_sequences(parallel.context is not None, batch.shift, traits.ld_alpha)
    if parallel.context is not None and options.displacement:
        raise ValueError(
            f"statistics contains {DISPLACEMENT!r}, expected others with cp_group: where completions begin to differ, "
            "parts of them do not know"
        )
    coupled = _coupled(options, kl)
    if parallel.data is not None and not coupled:
        tried(options.loss, device)
    if parallel.data is not None and coupled and options.reduction == "none":
        raise ValueError(
            "reduction is 'none', expected 'mean' or 'sum' with group=: this loss couples pairs, whose derivatives "
            "go to other ranks"
        )
    values = pair_values.checked(
        options.pair_values, options.loss, len(pairs), device, options.check_finite
    )
    if ranking.LIST in traits.needs:
        values = ranking.placed(pairs, values, parallel.data.rank if parallel.data else 0)
    by_pair = traits.ld_alpha is not None and options.pairs is not None
    ref_logps = _given_logps(reference, batch, pairs, by_pair)
    ref_call = _ref_call(reference, batch, head)
    rows = batch.rows(head.vocabulary, pairs, ld_alpha=traits.ld_alpha)
    if ref_logps is not None:
        # Behind the rows, whose sizes a GPU has been waited for: there is nothing left to wait for.
        ref_logps = given_logps.sound(ref_logps, pairs)
    _warn_where_none_is_scored(rows, parallel)
    return _Prepared(call, rows, ref_logps, ref_call, values)


def _given_logps(reference: Reference, batch: Batch, pairs: Tensor, by_pair: bool) -> Tensor | None:
    """The reference's log-probs ``(2, P)`` that a caller gave."""
    if reference.logps is None:
        return None
    given = checks.ref_logps(reference.logps, pairs, batch.sequences, by_pair)
    # Beside float64 log-probs of rows, none of whose sums is ever rounded.
    return given.double() if batch.hidden.dtype == torch.float64 else given


def _ref_call(reference: Reference, batch: Batch, head: LMHead) -> Call | None:
    """The reference's hidden states and the lm_head that they go through."""
    if reference.hidden is None:
        return None
    checks.like("ref_hidden", reference.hidden, "hidden", batch.hidden)
    if reference.weight is not None:
        own = head.weight
        head = replace(head, weight=reference.weight, bias=reference.bias)
        checks.projection(
            reference.hidden, head.weight, head.bias, prefix="ref_", empty=head.shard is not None
        )
        checks.same_vocabulary(head.weight, own)
    with torch.no_grad():
        return Call.of(reference.hidden, head, "ref_")


def _coupled(options: Options, kl: Tensor | None) -> bool:
    traits = options.loss.traits
    return traits.couples_pairs or (traits.couples_pairs_without_kl and kl is None)


def _settings(prepared: _Prepared, options: Options, given: Reference) -> str:
    """What ranks must have in common, in words."""
    loss = _ADDRESS.sub("", repr(options.loss))
    reference = "none"
    if prepared.ref_logps is not None:
        reference = f"log-probs in {prepared.ref_logps.dtype}"
    elif prepared.ref_call is not None:
        reference = f"hidden states through {_of_call(prepared.ref_call)}"
    return (
        f"loss {loss}, reduction {options.reduction!r}, statistics {options.names}, "
        f"displacement {options.displacement}, reference {reference}, kl {given.kl is not None}, "
        f"pair_values {list(prepared.values)}, check_finite {options.check_finite}, "
        f"{_of_call(prepared.call)}"
    )


def _of_call(call: Call) -> str:
    spec = call.spec
    vocabulary = len(call.weight) if spec.shard is None else spec.shard.vocabulary
    return (
        f"lm_head {vocabulary} x {call.weight.shape[1]} in {call.weight.dtype}, "
        f"bias {call.bias is not None}, {spec.transform}, products in {spec.compute_dtype}, "
        f"gradients {tuple(spec.needs_grad)}"
    )


def _layout(batch: Batch, rows: Rows) -> str:
    """What ranks that share sequences must have in common."""
    return f"{batch.sequences} sequences in pairs {rows.input_pairs().tolist()}"


def _tokens(rows: Rows, parallel: Parallel) -> str:
    """What ranks that share tokens must have in common."""
    if parallel.tensor is None:
        return ""
    place = torch.arange(1, len(rows.index) + 1, device=rows.index.device)
    mark = int(((rows.index * 1_000_003 + rows.targets) * place).sum())
    return f", {len(rows.index)} scored tokens with the checksum {mark}"


def logps(
    given: Given,
    weighting: Weighting,
    reduction: str,
    dtype: torch.dtype,
    parallel: Parallel,
) -> Tensor:
    """:func:`fastdpop.fused_logps`."""
    batch, head, *_ = given
    if parallel.alone:
        call, rows = _scored(batch, head, weighting, reduction, parallel)
    else:
        with meeting(parallel, device_of(batch.hidden)) as brought:
            call, rows = _scored(batch, head, weighting, reduction, parallel)
            brought.settings = (
                f"reduction {reduction!r}, dtype {dtype}, ld_alpha {weighting.ld_alpha}, token_weights "
                f"{weighting.token_weights is not None}, {_of_call(call)}"
            )
            brought.layout, brought.tokens = _layout(batch, rows), _tokens(rows, parallel)
    row_logps, _ = call.row_logps(rows, ())
    if reduction == "token":
        values = row_logps[rows.members].to(torch.promote_types(row_logps.dtype, dtype))
        flat = values.new_zeros(batch.labels.numel())
        return flat.index_put((rows.label_index,), values).reshape(batch.labels.shape)
    sums, summed = rows.sum_per_sequence(row_logps), sequences_over(parallel, rows, batch.sequences)
    if summed is not None:
        sums = collectives.scaled_back(summed(sums), parallel.equal_share)
    sums = sums.to(torch.promote_types(row_logps.dtype, dtype))
    # All of them, of a length that a compiler knows.
    return sums.new_zeros(batch.sequences).index_put((rows.inputs,), sums)


def _scored(
    batch: Batch, head: LMHead, weighting: Weighting, reduction: str, parallel: Parallel
) -> tuple[Call, Rows]:
    batch.check()
    call, count = Call.of(batch.hidden, head), batch.sequences
    checks.weighting(*weighting, batch.labels, count, reduction)
    checks.split_sequences(parallel.context is not None, batch.shift, weighting.ld_alpha)
    rows = batch.rows(
        head.vocabulary,
        default_pairs(count, batch.labels.device),
        keep_unpaired=True,
        token_weights=weighting.token_weights,
        ld_alpha=weighting.ld_alpha,
    )
    _warn_where_none_is_scored(rows, parallel)
    return call, rows


def _warn_where_none_is_scored(rows: Rows, parallel: Parallel) -> None:
    """Once, as Python shows a warning: such a batch has a loss, and teaches nothing.

    How many rows there are is known on the host, except to a compiler. Of other processes' tokens it is not.
    """
    if torch.compiler.is_compiling() or parallel.data is not None or parallel.context is not None:
        return
    if len(rows.index) == 0:
        warnings.warn(
            "no token of the batch is scored, so that nothing can be learned from it: its labels are all -100, or only "
            "the first of a sequence, which nothing predicts, is not",
            stacklevel=1,  # one place, whichever function it is
        )


def sequences_over(
    parallel: Parallel, rows: Rows, sequences: int
) -> Callable[[Tensor], Tensor] | None:
    """Adds up what is known of each sequence over ``cp_group``, for a loss in which each rank has a part
    (:attr:`.Parallel.equal_share`); None where sequences are whole.
    """
    group = parallel.context
    if group is None:
        return None
    return partial(
        whole_sequences, rows=rows, sequences=sequences, group=group, factor=float(group.size)
    )


def _computed(call: Call, loss: PairLoss, options: Options, whole: _Whole) -> _Computed:
    """The loss, and all that is known once it is."""
    parallel, coupled = whole.parallel, _coupled(options, loss.kl)
    none, data = options.reduction == "none", parallel.data
    one_pass = call.spec.needs_grad.lm_head and not (coupled or none or parallel.context)
    if one_pass:
        # The loss of a pair is known as soon as its log-probs are.
        total, sums, found, row_logps = call.pair_loss(loss, whole.totals)
        with torch.no_grad():
            values = loss.losses(sums, found)
    else:
        row_logps, found = call.row_logps(loss.rows, loss.statistics)
        sums = loss.rows.sum_per_sequence(row_logps)
        if loss.summed is not None:
            sums = loss.summed(sums)
        if data is not None and coupled:
            pairs, own = joined_pairs(loss.pairs(sums, found), whole.pairs_of, data)
            values = loss.of_pairs(pairs)[own]
        else:
            values = loss.losses(sums, found)
        total = values if none else values.sum() * loss.share
        # What ranks with parts of the same sequences compute of a loss, all of them do.
        total = collectives.scaled_back(total, parallel.equal_share)
    if data is not None and not none:
        # In float64: totals of ranks may nearly cancel.
        total = collectives.sum_over(total.double(), data, parallel.factor(data))
    return _Computed(total.to(call.spec.result_dtype), values, sums, found, row_logps)


def _ref_logps(prepared: _Prepared, summed: Callable[[Tensor], Tensor] | None) -> Tensor | None:
    """The reference's log-probs ``(2, P)``, arbitrary where a side is absent; None without one."""
    if prepared.ref_call is None:
        return prepared.ref_logps
    rows = prepared.rows
    with torch.no_grad():
        logps, _ = prepared.ref_call.row_logps(rows, ())
        sums = rows.sum_per_sequence(logps)
        sums = sums if summed is None else summed(sums)
    return sums[rows.pairs.clamp_min(0)].T.contiguous()


def _output(
    computed: _Computed, call: Call, loss: PairLoss, options: Options, sequences: int
) -> PreferenceOutput:
    """Everything that is returned, in the result dtype; only the loss has a gradient."""
    total, values, sums, found, logps = computed
    values, sums = values.detach(), sums.detach()
    pairs, rows, dtype = loss.pairs(sums, found), loss.rows, total.dtype
    chosen_rewards, rejected_rewards = loss.function.rewards(pairs)
    chosen_rewards = chosen_rewards * pairs.chosen_present
    rejected_rewards = rejected_rewards * pairs.rejected_present
    both = pairs.chosen_present & pairs.rejected_present
    margins = chosen_rewards - rejected_rewards
    won = torch.where(margins.isnan(), margins, margins > 0)
    accuracy = won.masked_fill(~both, 0.0).sum() / both.sum().clamp_min(1)
    penalty = ratio_w = ratio_l = None
    if pairs.ref_chosen is not None:
        penalty = (0.0 - pairs.chosen_logratios).relu().to(dtype)
        ratio_w = pairs.chosen_logratios.to(dtype)
        ratio_l = pairs.rejected_logratios.to(dtype)
    own_lengths = loss.lengths
    lengths = own_lengths.new_zeros(sequences).index_put((rows.inputs,), own_lengths)
    means: dict[str, Any] = {}
    for name in options.logged:
        line = found[loss.statistics.index(name)]
        over = rows.unweighted().sum_per_sequence(line)
        mean = (over if loss.summed is None else loss.summed(over)) / own_lengths.clamp_min(1)
        means[name] = line.new_zeros(sequences).index_put((rows.inputs,), mean.to(dtype))
    if options.displacement:
        own = call.displacement(rows, logps, options.state_columns)._asdict()
        means |= {n: v if v.dtype == torch.bool else v.to(dtype) for n, v in own.items()}
    return PreferenceOutput(
        loss=total,
        losses=values.to(dtype),
        chosen_logps=pairs.chosen.to(dtype),
        rejected_logps=pairs.rejected.to(dtype),
        chosen_logratios=ratio_w,
        rejected_logratios=ratio_l,
        chosen_rewards=chosen_rewards.to(dtype),
        rejected_rewards=rejected_rewards.to(dtype),
        margins=margins.to(dtype),
        accuracy=accuracy.to(dtype),
        penalty=penalty,
        lengths=lengths,
        pairs=rows.input_pairs(),
        **means,
    )


def _check_finite(loss: Tensor, **inputs: Tensor | None) -> None:
    """The loss is finite; if it is not, the message names the input that is not finite either."""
    if bool(torch.isfinite(loss).all()):
        return
    wrong = [
        name
        for name, value in inputs.items()
        if value is not None and not bool(torch.isfinite(value).all())
    ]
    cause = (
        f"{' and '.join(wrong)} not finite"
        if wrong
        else "every input is finite, so the loss overflowed"
    )
    raise FloatingPointError(f"the loss is not finite: {cause}")
