"""The operators: schemas, shapes and autograd, registered with torch.library once for all engines.

``torch.compile`` and ``opcheck`` see five opaque operators; inside, the engine named by the
``engine`` argument does the work.

    fastdpop::lay_out             labels -> rows (sizes depend on the data)
    fastdpop::row_logps           rows -> log-probs; differentiable, through a stored direction
                                  (frozen head, 2 units) or by computing the logits again
    fastdpop::row_logps_backward  its gradients
    fastdpop::pair_loss           rows -> loss and gradients of whole pairs in one pass (trained
                                  head)
    fastdpop::scale               a gradient times what comes from above, in the input's dtype
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastdpop import engines, losses
from fastdpop.engines.base import Coefficients, Gradients, PairLossPlan, Problem, Wanted
from fastdpop.head import Head
from fastdpop.pairing import Totals, pair_logps
from fastdpop.rows import Rows
from fastdpop.rows import lay_out as lay_out_rows

_PIECE = 2**19
"""Numbers that are scaled at once on a CPU."""

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


def _problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Tensor,
    head: Sequence[float],
    compute_dtype: torch.dtype,
    workspace_bytes: int,
) -> Problem:
    softcap, logit_scale, temperature = head
    return Problem(
        hidden=hidden.contiguous(),
        weight=weight,
        bias=bias,
        targets=targets,
        groups=groups.tolist(),
        head=Head(softcap or None, logit_scale, temperature),
        compute_dtype=compute_dtype,
        workspace_bytes=workspace_bytes,
    )


def head_numbers(head: Head) -> list[float]:
    """The head's transform as an operator argument; 0 stands for no softcap."""
    return [head.softcap or 0.0, head.logit_scale, head.temperature]


def _result_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def _names(statistics: str) -> tuple[str, ...]:
    return tuple(statistics.split(",")) if statistics else ()


def _outputs(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = (like.new_empty(NO_TENSOR) if g is None else g for g in gradients)
    return hidden, weight, bias


@custom_op("fastdpop::scale", mutates_args=())
def scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor`` rounded once to ``dtype``; `factor` is 0-d, or ``(rows, 1)``.

    A product with a 16-bit result goes through a full-size temporary on CPUs; pieces that fit the
    cache don't.
    """
    result = torch.empty_like(gradient, dtype=dtype)
    if gradient.device.type != "cpu" or gradient.dim() == 0:
        return torch.mul(gradient, factor, out=result)
    step = max(1, _PIECE * gradient.shape[0] // max(gradient.numel(), 1))
    for start in range(0, gradient.shape[0], step):
        rows = slice(start, start + step)
        own = factor[rows] if factor.dim() else factor
        torch.mul(gradient[rows], own, out=result[rows])
    return result


@scale.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


@custom_op("fastdpop::lay_out", mutates_args=())
def lay_out(
    labels: Tensor,
    vocab_size: int,
    cu_seqlens: Tensor | None,
    pairs: Tensor | None,
    shift: bool,
    token_weights: Tensor | None,
    ld_alpha: float | None,
) -> list[Tensor]:
    """:func:`fastdpop.rows.lay_out` with empty tensors for None."""
    rows = lay_out_rows(
        labels,
        vocab_size,
        cu_seqlens=cu_seqlens,
        pairs=pairs,
        shift=shift,
        token_weights=token_weights,
        ld_alpha=ld_alpha,
    )
    return rows_to(rows)


@lay_out.register_fake
def _(
    labels: Tensor,
    vocab_size: int,
    cu_seqlens: Tensor | None,
    pairs: Tensor | None,
    shift: bool,
    token_weights: Tensor | None,
    ld_alpha: float | None,
) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    rows, sequences, bounds = size(), size(), size()
    given = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    count = pairs.shape[0] if pairs is not None else (given // 2 if given % 2 == 0 else 0)
    weighted = token_weights is not None or ld_alpha is not None

    def longs(*shape: Any, device: torch.device = labels.device) -> Tensor:
        return labels.new_empty(shape, dtype=torch.int64, device=device)

    members = size() if ld_alpha is not None else 0
    of_weights = members if ld_alpha is not None else rows
    weights = labels.new_empty((of_weights,), dtype=torch.float64)
    return [
        longs(rows),
        longs(rows),
        longs(sequences + 1),
        longs(members),
        weights if weighted else longs(*NO_TENSOR),
        longs(3, bounds, device=torch.device("cpu")),
        longs(count, 2),
        longs(count),
        longs(sequences),
    ]


@custom_op("fastdpop::row_logps", mutates_args=())
def row_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Tensor,
    head: Sequence[float],
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    engine: str,
    statistics: str,
    keep_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of rows.

    Args:
        hidden: ``(N, H)``; weight: ``(V, H)``; bias: ``(V,)``; targets: ``(N,)``; groups: ``(G +
            1,)`` bounds of row groups.
        head: see :func:`head_numbers`.
        engine: an engine's name.
        statistics: names, joined by commas.
        keep_direction: also form d logp / d hidden (frozen head), so that backward is a product
            with it.

    Returns:
        logps ``(N,)`` (differentiable), lse ``(N,)``, statistics ``(K, N)``, direction ``(N, H)``
        or empty.
    """
    problem = _problem(hidden, weight, bias, targets, groups, head, compute_dtype, workspace_bytes)
    names = _names(statistics)
    direction = hidden.new_empty(NO_TENSOR)
    with _engine_context(hidden.device):
        if keep_direction:
            result, direction = engines.get(engine).logps_and_direction(problem, names)
        else:
            result = engines.get(engine).logps(problem, names)
    return result.logps, result.lse, result.statistics, direction


@row_logps.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Tensor,
    head: Sequence[float],
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    engine: str,
    statistics: str,
    keep_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.new_empty(hidden.shape[:1], dtype=_result_dtype(compute_dtype))
    table = rows.new_empty((len(_names(statistics)), hidden.shape[0]))
    direction = hidden.new_empty(hidden.shape if keep_direction else NO_TENSOR)
    return rows, torch.empty_like(rows), table, direction


@custom_op("fastdpop::row_logps_backward", mutates_args=())
def row_logps_backward(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Tensor,
    lse: Tensor,
    wanted: Sequence[bool],
    head: Sequence[float],
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(gradient * logps)`` with respect to hidden, weight and bias; empty where
    not wanted.
    """
    problem = _problem(hidden, weight, bias, targets, groups, head, compute_dtype, workspace_bytes)
    with _engine_context(hidden.device):
        found = engines.get(engine).gradients(problem, lse, gradient, Wanted(*wanted))
    # Fixed coefficients: the only rounding left is the one to the inputs' dtypes.
    tensors = (hidden, weight, hidden if bias is None else bias)
    typed = (None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True))
    return _outputs(Gradients(*typed), gradient)


@row_logps_backward.register_fake
def _(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Tensor,
    lse: Tensor,
    wanted: Sequence[bool],
    head: Sequence[float],
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    none = gradient.new_empty(NO_TENSOR)
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else none,
        torch.empty_like(weight, memory_format=torch.contiguous_format)
        if wanted[1]
        else none.clone(),
        torch.empty_like(bias) if wanted[2] and bias is not None else none.clone(),
    )


def _row_logps_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, groups, *options, _, keep_direction = inputs
    _, lse, _, direction = output
    ctx.keep_direction = keep_direction
    ctx.options = options
    ctx.set_materialize_grads(False)
    if keep_direction:
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(direction)
    else:
        ctx.save_for_backward(hidden, weight, bias, targets, groups, lse)


def _row_logps_backward(
    ctx: Any, gradient: Tensor | None, *unused: Tensor | None
) -> tuple[Any, ...]:
    none = (None,) * 8
    if gradient is None:
        return None, None, None, *none
    if ctx.keep_direction:
        (direction,) = ctx.saved_tensors
        return scale(direction, gradient[:, None], ctx.dtype), None, None, *none
    hidden, weight, bias, targets, groups, lse = ctx.saved_tensors
    wanted = [bool(w) for w in ctx.needs_input_grad[:3]]
    found = row_logps_backward(
        gradient.contiguous(), hidden, weight, bias, targets, groups, lse, wanted, *ctx.options
    )
    return *(g if w else None for g, w in zip(found, wanted, strict=True)), *none


row_logps.register_autograd(_row_logps_backward, setup_context=_row_logps_context)


@custom_op("fastdpop::pair_loss", mutates_args=())
def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    reference: Tensor | None,
    kl: Tensor | None,
    loss: str,
    mean: bool,
    wanted: Sequence[bool],
    head: Sequence[float],
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    engine: str,
    statistics: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients in one pass, for a loss that treats each pair by itself.

    Args:
        hidden: ``(N, H)`` rows in the order of the layout; weight: ``(V, H)``; bias: ``(V,)``.
        rows: what :func:`lay_out` gave.
        reference: ``(2, P)`` reference log-probs of chosen and rejected.
        kl: 0-d, KTO's reference point.
        loss: a key of :func:`fastdpop.losses.key_of`.
        mean: average over pairs instead of summing.
        wanted: which of the gradients with respect to hidden, weight and bias to form.

    Returns:
        loss, 0-d (differentiable); sequence log-probs ``(S,)``; statistics ``(K, N)``; and the
        gradients of the loss, in the result dtype, empty where not wanted: they are what backward
        scales.
    """
    # A layout without rows has neither members nor weights to tell apart from None, and needs
    # neither.
    layout = rows_from(rows, members=rows[3].numel() > 0, weights=rows[4].numel() > 0)
    problem = _problem(
        hidden, weight, bias, layout.targets, layout.groups[0], head, compute_dtype, workspace_bytes
    )
    names = _names(statistics)
    function = losses.by_key(loss)
    share = 1.0 / len(layout.pairs) if mean else 1.0

    @functools.cache
    def totals() -> Totals:
        return Totals.of(layout, problem.result_dtype)

    def value(part: Rows, logps: Tensor, found: Tensor, ids: Tensor) -> Tensor:
        aligned = None
        if "aligned_logps" in names:
            aligned = part.unweighted().sums(found[names.index("aligned_logps")])
        own_reference = None if reference is None else reference[:, ids]
        pairs = pair_logps(part, logps, totals(), reference=own_reference, aligned=aligned, kl=kl)
        return function(pairs).sum() * share

    def coefficients(first: int, last: int, logps: Tensor, statistics: Tensor) -> Tensor:
        part = layout.part(first, last)
        p0, p1 = layout.groups[2, first], layout.groups[2, last]
        with _autograd_allowed():
            sums = part.sums(logps).requires_grad_()
            total = value(part, sums, statistics, layout.order[p0:p1])
            # A loss may ignore the policy altogether.
            gradient = torch.autograd.grad(total, sums)[0] if total.requires_grad else sums * 0.0
        return part.spread(gradient.detach())

    plan = _plan(layout, reference, function, share, problem.result_dtype)
    with _engine_context(hidden.device):
        result, gradients = engines.get(engine).logps_and_gradients(
            problem, names, _Callback(coefficients, plan), Wanted(*wanted)
        )
        if plan is not None and plan.losses is not None and plan.sums is not None:
            return (
                plan.losses.sum() * share,
                plan.sums,
                result.statistics,
                *_outputs(gradients, plan.sums),
            )
        logps = layout.sums(result.logps)
        all_pairs = torch.arange(len(layout.pairs), device=layout.pairs.device)
        with _autograd_allowed():
            total = value(layout, logps, result.statistics, all_pairs)
    if total.requires_grad:
        raise ValueError(
            "the loss holds a tensor that requires gradients, which a pass over single pairs does "
            "not give: detach it, or let the loss couple pairs (a plain function does)"
        )
    return total, logps, result.statistics, *_outputs(gradients, logps)


@dataclasses.dataclass(frozen=True)
class _Callback:
    """Coefficients of whole groups, and what they are in plain numbers where that can be said."""

    function: Coefficients
    plan: PairLossPlan | None

    def __call__(self, first: int, last: int, logps: Tensor, statistics: Tensor) -> Tensor:
        return self.function(first, last, logps, statistics)


def _plan(
    layout: Rows,
    reference: Tensor | None,
    loss: losses.PreferenceLoss,
    share: float,
    dtype: torch.dtype,
) -> PairLossPlan | None:
    """The loss in plain numbers, if every group is one pair with two sides and unweighted tokens."""
    if reference is None or layout.members is not None or layout.weights is not None:
        return None
    if dtype != torch.float32 or not dataclasses.is_dataclass(loss):
        return None
    _, sequences, pairs = layout.groups.diff(dim=1)
    if not ((sequences == 2).all() and (pairs == 1).all()):
        return None
    return PairLossPlan(
        offsets=layout.offsets,
        order=layout.order,
        reference=reference.to(dtype).contiguous(),
        loss=type(loss).__name__,
        options={f.name: getattr(loss, f.name) for f in dataclasses.fields(loss)},
        share=share,
    )


def rows_from(tensors: Sequence[Tensor], *, members: bool, weights: bool) -> Rows:
    """The layout that :func:`lay_out` returned, with None for the fields it does not have."""
    index, targets, offsets, of_members, of_weights, *rest = tensors
    return Rows(
        index,
        targets,
        offsets,
        of_members if members else None,
        of_weights if weights else None,
        *rest,
    )


def rows_to(rows: Rows) -> list[Tensor]:
    """The layout as an operator argument: its inverse, with empty tensors for None."""
    return [rows.index.new_empty(NO_TENSOR) if t is None else t for t in rows.tensors()]


@pair_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    reference: Tensor | None,
    kl: Tensor | None,
    loss: str,
    mean: bool,
    wanted: Sequence[bool],
    head: Sequence[float],
    compute_dtype: torch.dtype,
    workspace_bytes: int,
    engine: str,
    statistics: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _result_dtype(compute_dtype)

    def new(*shape: Any) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    return (
        new(),
        new(rows[8].shape[0]),
        new(len(_names(statistics)), hidden.shape[0]),
        new(*hidden.shape) if wanted[0] else new(*NO_TENSOR),
        new(*weight.shape) if wanted[1] else new(*NO_TENSOR),
        new(weight.shape[0]) if wanted[2] else new(*NO_TENSOR),
    )


def _pair_loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, rows, *_ = inputs
    ctx.row_tensors = len(rows)
    ctx.wanted = inputs[8]
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])


def _pair_loss_backward(
    ctx: Any, gradient: Tensor | None, *unused: Tensor | None
) -> tuple[Any, ...]:
    of_rows: list[None] = [None] * ctx.row_tensors
    none = (None,) * 10
    if gradient is None:
        return None, None, None, of_rows, *none
    scaled = (
        scale(g, gradient, dtype) if want and dtype is not None else None
        for g, want, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
    )
    return *scaled, of_rows, *none


pair_loss.register_autograd(_pair_loss_backward, setup_context=_pair_loss_context)
