"""The operators: schemas, shapes and autograd, registered with torch.library once for all engines.

``torch.compile`` and ``opcheck`` see opaque operators; inside, the engine that the `spec` names
does the work.

    fastdpop::rows_from_labels    labels -> rows (sizes depend on the data)
    fastdpop::row_logps           rows -> log-probs; differentiable, through d logp / d hidden, which
                                  it has kept (frozen lm_head, 2 matrix products), or by computing
                                  the logits again
    fastdpop::row_logps_backward  its gradients
    fastdpop::pair_loss           rows -> loss and gradients of whole pairs in one pass (trained
                                  lm_head, 3 matrix products)
    fastdpop::scale               a gradient times what comes from above, in the input's dtype

A `spec` is a :meth:`fastdpop.spec.Spec.text`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastdpop import checks, engines, losses
from fastdpop.engines.base import Engine, EngineOutput, Gradients, GroupLoss, NeedsGrad, Problem
from fastdpop.losses.trial import tried
from fastdpop.pair_loss import PairLoss, Totals
from fastdpop.rows import Rows, wide_dtype
from fastdpop.rows import rows_from_labels as _rows_from_labels
from fastdpop.scale import no_second_derivative, scale
from fastdpop.spec import Spec

NO_TENSOR = (0,)
"""Shape of an output that was not asked for: operators cannot return None."""


@contextlib.contextmanager
def _autograd_allowed() -> Iterator[None]:
    """Let autograd record inside an operator, where the dispatcher has switched it off.

    A loss is a user's function of a few numbers, so its derivative comes from autograd; the
    operator around it is opaque.
    """
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


@contextlib.contextmanager
def _engine_context(device: torch.device) -> Iterator[None]:
    """Where an engine computes: without autocast, which would round its products, and with a GPU's
    own device current, or kernels would be launched on another one.
    """
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.autocast(device.type, enabled=False), current:
        yield


def _engine(spec: Spec) -> Engine:
    """The engine of a spec, with the other processes that hold a part of the lm_head."""
    engine = engines.get(spec.engine)
    if spec.shard is None:
        return engine
    from fastdpop.distributed.vocabulary import VocabularyParallel

    return VocabularyParallel(engine, spec.shard.group, spec.shard.start, spec.shard.vocabulary)


def _problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: list[int],
    spec: Spec,
) -> Problem:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            checks.storage(name, tensor)  # in backward, too
    return Problem(
        hidden=hidden.contiguous(),
        weight=weight,
        bias=bias,
        targets=targets,
        groups=groups,
        transform=spec.transform,
        compute_dtype=spec.compute_dtype,
        workspace_bytes=spec.workspace_bytes,
    )


def _filled(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, empty where there is none."""
    hidden, weight, bias = (like.new_empty(NO_TENSOR) if g is None else g for g in gradients)
    return hidden, weight, bias


# ---- rows ---------------------------------------------------------------------------------------


@custom_op("fastdpop::rows_from_labels", mutates_args=())
def rows_from_labels(
    labels: Tensor,
    vocab_size: int,
    pairs: Tensor,
    cu_seqlens: Tensor | None,
    shift: bool,
    keep_unpaired: bool,
    token_weights: Tensor | None,
    ld_alpha: float | None,
    hidden_index: Tensor | None = None,
    positions: int = 0,
) -> list[Tensor]:
    """:func:`fastdpop.rows.rows_from_labels`, as :meth:`fastdpop.rows.Rows.tensors`."""
    found = _rows_from_labels(
        labels,
        vocab_size,
        pairs,
        cu_seqlens=cu_seqlens,
        shift=shift,
        keep_unpaired=keep_unpaired,
        token_weights=token_weights,
        ld_alpha=ld_alpha,
        hidden_index=hidden_index,
        positions=positions,
    )
    return found.tensors()


@rows_from_labels.register_fake
def _(
    labels: Tensor,
    vocab_size: int,
    pairs: Tensor,
    cu_seqlens: Tensor | None,
    shift: bool,
    keep_unpaired: bool,
    token_weights: Tensor | None,
    ld_alpha: float | None,
    hidden_index: Tensor | None = None,
    positions: int = 0,
) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    count, members, sequences, bounds = size(), size(), size(), size()
    weighted = token_weights is not None or ld_alpha is not None

    def longs(*shape: Any, device: torch.device = labels.device) -> Tensor:
        return labels.new_empty(shape, dtype=torch.int64, device=device)

    weights = labels.new_empty((members,), dtype=torch.float64)
    return Rows(
        index=longs(count),
        targets=longs(count),
        members=longs(members),
        offsets=longs(sequences + 1),
        label_index=longs(members),
        weights=weights if weighted else None,
        groups=longs(3, bounds, device=torch.device("cpu")),
        pairs=longs(*pairs.shape),
        order=longs(pairs.shape[0]),
        inputs=longs(sequences),
    ).tensors()


# ---- log-probs of rows --------------------------------------------------------------------------


@custom_op("fastdpop::row_logps", mutates_args=())
def row_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Tensor,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of rows.

    Args:
        hidden: ``(N, H)``; weight: ``(V, H)``; bias: ``(V,)``; targets: ``(N,)``; groups: ``(G +
            1,)`` bounds of the groups in rows, on the CPU.

    Returns:
        logps ``(N,)`` (differentiable), lse ``(N,)``, statistics ``(K, N)``, and d logp / d hidden
        ``(N, H)`` where that is all that backward needs (a frozen lm_head), else empty.
    """
    s = Spec.parse(spec)
    engine = _engine(s)
    problem = _problem(hidden, weight, bias, targets, groups.tolist(), s)
    with _engine_context(hidden.device):
        if _keeps_dlogp_dhidden(s.needs_grad):
            found = engine.logps_and_dlogp_dhidden(problem, s.statistics)
        else:
            found = engine.logps(problem, s.statistics)
    kept = hidden.new_empty(NO_TENSOR) if found.dlogp_dhidden is None else found.dlogp_dhidden
    return found.logps, found.lse, found.statistics, kept


def _keeps_dlogp_dhidden(needs_grad: NeedsGrad) -> bool:
    return needs_grad.hidden and not needs_grad.lm_head


@row_logps.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Tensor,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = Spec.parse(spec)
    logps = hidden.new_empty(hidden.shape[:1], dtype=s.result_dtype)
    statistics = logps.new_empty((len(s.statistics), hidden.shape[0]))
    kept = hidden.new_empty(hidden.shape if _keeps_dlogp_dhidden(s.needs_grad) else NO_TENSOR)
    return logps, torch.empty_like(logps), statistics, kept


@custom_op("fastdpop::row_logps_backward", mutates_args=())
def row_logps_backward(
    dlogp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Tensor,
    lse: Tensor,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(dlogp * logps)`` with respect to hidden, weight and bias; empty where
    the spec does not need them.
    """
    s = Spec.parse(spec)
    problem = _problem(hidden, weight, bias, targets, groups.tolist(), s)
    with _engine_context(hidden.device):
        found = _engine(s).gradients(problem, lse, dlogp, s.needs_grad)
    # The derivatives are final: the only rounding left is the one to the inputs' dtypes.
    tensors = (hidden, weight, hidden if bias is None else bias)
    typed = (None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True))
    return _filled(Gradients(*typed), dlogp)


@row_logps_backward.register_fake
def _(
    dlogp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Tensor,
    lse: Tensor,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_grad = Spec.parse(spec).needs_grad

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return dlogp.new_empty(NO_TENSOR)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return (
        like(hidden, needs_grad.hidden),
        like(weight, needs_grad.weight),
        like(bias, needs_grad.bias),
    )


def _row_logps_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, groups, ctx.spec = inputs
    _, lse, _, kept = output
    ctx.set_materialize_grads(False)
    if _keeps_dlogp_dhidden(Spec.parse(ctx.spec).needs_grad):
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(kept)
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, groups, lse)


def _row_logps_backward(ctx: Any, dlogp: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    others = (None, None, None)  # targets, groups, spec
    if dlogp is None:
        return None, None, None, *others
    spec = Spec.parse(ctx.spec)
    if _keeps_dlogp_dhidden(spec.needs_grad):
        (kept,) = ctx.saved_tensors
        return scale(kept, dlogp[:, None], ctx.dtype), None, None, *others
    needs_grad = NeedsGrad(*(bool(needed) for needed in ctx.needs_input_grad[:3]))
    own = replace(spec, needs_grad=needs_grad).text()
    found = row_logps_backward(dlogp.contiguous(), *ctx.saved_tensors, own)
    return *(g if n else None for g, n in zip(found, needs_grad, strict=True)), *others


row_logps.register_autograd(_row_logps_backward, setup_context=_row_logps_context)
row_logps_backward.register_autograd(no_second_derivative)


# ---- the loss of whole pairs --------------------------------------------------------------------


@custom_op("fastdpop::pair_loss", mutates_args=())
def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    ref_logps: Tensor | None,
    kl: Tensor | None,
    values: Tensor | None,
    totals: Sequence[float] | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients in one pass, for a loss that treats each pair by itself.

    Args:
        hidden: ``(N, H)`` rows in the order of the layout; weight: ``(V, H)``; bias: ``(V,)``.
        rows: what :func:`rows_from_labels` gave.
        ref_logps: ``(2, P)`` reference log-probs of chosen and rejected.
        kl: 0-d, KTO's reference point.
        values: ``(K, P)`` float64, a line for each name of the spec's.
        totals: pairs, sides and chosen tokens of a batch of which these rows are a part; None where they are all
            of it.

    Returns:
        loss, 0-d (differentiable), these rows' share of it; sequence log-probs ``(S,)`` in float64;
        statistics ``(K, N)``; log-probs ``(N,)`` of rows; and the gradients of the loss, in the
        result dtype, empty where not needed: they are what backward scales.
    """
    s = Spec.parse(spec)
    layout = Rows.of_tensors(rows)
    whole = Totals.of(layout) if totals is None else Totals.given(totals, hidden.device)
    with _autograd_allowed():
        function = tried(losses.by_key(s.loss), hidden.device)
    loss = PairLoss(
        layout,
        function,
        whole,
        ref_logps,
        kl,
        s.statistics,
        mean=s.reduction == "mean",
        count=None if totals is None else int(totals[0]),
        values={} if values is None else dict(zip(s.values, values, strict=True)),
    )
    problem = _problem(hidden, weight, bias, layout.targets, layout.bounds, s)
    with _engine_context(hidden.device):
        found = _engine(s).logps_and_gradients(
            problem,
            s.statistics,
            GroupLoss(_autograd_allowed()(loss.dlogp), loss.plan()),
            s.needs_grad,
        )
        total, sequence_logps = _total(loss, found)
    if total.requires_grad:
        raise ValueError(
            "the loss holds a tensor that requires gradients, which a pass over single pairs does "
            "not give: detach it, or let the loss couple pairs (a plain function does)"
        )
    total = total.to(s.result_dtype)
    gradients = _filled(found.gradients, found.logps)
    return total, sequence_logps, found.statistics, found.logps, *gradients


def _total(loss: PairLoss, found: EngineOutput) -> tuple[Tensor, Tensor]:
    """The loss of the batch, and the log-probs of its sequences."""
    if found.losses is not None and found.sequence_logps is not None:
        return found.losses.double().sum() * loss.share, found.sequence_logps
    sequence_logps = loss.rows.sum_per_sequence(found.logps)
    with _autograd_allowed():
        return loss.total(sequence_logps, found.statistics), sequence_logps


@pair_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    ref_logps: Tensor | None,
    kl: Tensor | None,
    values: Tensor | None,
    totals: Sequence[float] | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    s = Spec.parse(spec)
    sequences = Rows(*rows).inputs.shape[0]

    def new(*shape: Any, needed: bool = True) -> Tensor:
        return hidden.new_empty(shape if needed else NO_TENSOR, dtype=s.result_dtype)

    return (
        new(),
        hidden.new_empty((sequences,), dtype=wide_dtype(hidden.device)),
        new(len(s.statistics), hidden.shape[0]),
        new(hidden.shape[0]),
        new(*hidden.shape, needed=s.needs_grad.hidden),
        new(*weight.shape, needed=s.needs_grad.weight),
        new(weight.shape[0], needed=s.needs_grad.bias),
    )


def _pair_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, rows, _, _, _, _, ctx.spec = inputs
    ctx.row_tensors = len(rows)
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])


def _pair_loss_backward(ctx: Any, factor: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    of_rows: list[None] = [None] * ctx.row_tensors
    others = (None,) * 5  # ref_logps, kl, values, totals, spec
    if factor is None:
        return None, None, None, of_rows, *others
    needs_grad = Spec.parse(ctx.spec).needs_grad
    scaled = (
        scale(gradient, factor, dtype) if needed and dtype is not None else None
        for gradient, needed, dtype in zip(ctx.saved_tensors, needs_grad, ctx.dtypes, strict=True)
    )
    return *scaled, of_rows, *others


pair_loss.register_autograd(_pair_loss_backward, setup_context=_pair_loss_context)
