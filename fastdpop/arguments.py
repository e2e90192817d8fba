"""What a caller of a public function gave, before anything is computed: a split lm_head and split sequences are put in
order, and processes hear whether all of them were given the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpop import checks
from fastdpop.call import NO_OPTIONS, NO_REFERENCE, Batch, LMHead, Options, Reference
from fastdpop.distributed import collectives
from fastdpop.distributed.agreement import meeting
from fastdpop.distributed.parallel import Parallel, Shard


class Given(NamedTuple):
    """What a caller gave; of log-probs alone, the first two."""

    batch: Batch
    head: LMHead
    reference: Reference = NO_REFERENCE
    options: Options = NO_OPTIONS


class Weighting(NamedTuple):
    """How much each token counts in its sequence's sum."""

    token_weights: Tensor | None
    ld_alpha: float | None


def device_of(hidden: Any) -> torch.device:
    """Where the tensors are, of arguments that nobody has checked yet."""
    return hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")


def begun(
    given: Callable[[], Given],
    hidden: object,
    parallel: Parallel,
    vocab_size: int | None,
    sequence_parallel: bool,
) -> Given:
    """What a caller gave, with the lm_head as one of a vocabulary that may be split over ``tp_group``, and hidden
    states as whole sequences.

    Args:
        given: makes it, if the arguments are in order.

    Raises:
        TypeError, ValueError: an argument is not as described; RuntimeError: another rank's is not.
    """
    if parallel.alone:
        checks.flag("sequence_parallel", sequence_parallel)
        if sequence_parallel:
            raise ValueError("sequence_parallel is set without tp_group, expected both")
        return _cut(given(), vocab_size, 0)
    group = parallel.tensor
    with meeting(parallel, device_of(hidden)) as brought:
        found = given()
        batch, head, reference = found.batch, found.head, found.reference
        parallel.check()
        checks.flag("sequence_parallel", sequence_parallel)
        checks.head(head.weight, head.bias)
        brought.rows = len(head.weight)
        if sequence_parallel:
            if group is None:
                raise ValueError("sequence_parallel is set without tp_group, expected both")
            checks.sequence_parallel("hidden", batch.hidden, batch.labels, group.size)
            brought.tokens = f"hidden {tuple(batch.hidden.shape)} of {batch.hidden.dtype}"
            if reference.hidden is not None:
                checks.sequence_parallel("ref_hidden", reference.hidden, batch.labels, group.size)
                brought.tokens += (
                    f", ref_hidden {tuple(reference.hidden.shape)} of {reference.hidden.dtype}"
                )
        if group is None:
            found = _cut(found, vocab_size, 0)
        elif vocab_size is not None:
            checks.vocabulary(vocab_size)
        brought.settings = ", ".join(
            (
                f"grad_reduction {parallel.grad_reduction!r}",
                f"sequence_parallel {sequence_parallel}",
                f"vocab_size {vocab_size}",
            )
        )
    if group is None:
        return found
    start, whole = sum(brought.rows_of[: group.rank]), sum(brought.rows_of)
    found = _cut(found, vocab_size, start, whole)
    whole = whole if vocab_size is None else vocab_size
    shard = Shard(group, min(start, whole), whole)
    head = replace(found.head, shard=shard, joined=sequence_parallel)
    batch, reference = found.batch, found.reference
    if sequence_parallel:
        batch = replace(batch, hidden=collectives.along_sequence(batch.hidden, group))
        if reference.hidden is not None:
            whole_hidden = collectives.along_sequence(reference.hidden.detach(), group)
            reference = reference._replace(hidden=whole_hidden)
    return found._replace(batch=batch, head=head, reference=reference)


def _cut(given: Given, vocab_size: int | None, start: int, whole: int | None = None) -> Given:
    """Without the rows of the lm_head that stand for no token; the first of this rank's is `start`, of `whole`."""
    if vocab_size is None:
        return given
    _, head, reference, _ = given
    checks.head(head.weight, head.bias)
    rows = len(head.weight)
    checks.vocabulary(vocab_size, rows if whole is None else whole)
    kept = min(max(vocab_size - start, 0), rows)
    if kept == rows:
        return given

    def cut(tensor: Tensor | None) -> Tensor | None:
        return tensor[:kept] if isinstance(tensor, Tensor) else tensor

    return given._replace(
        head=replace(head, weight=head.weight[:kept], bias=cut(head.bias)),
        reference=reference._replace(weight=cut(reference.weight), bias=cut(reference.bias)),
    )
