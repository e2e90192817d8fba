"""Hidden states and a head that a caller passes to the fused functions, held against the model's own."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdpop import instead
from fastdpop.batch_check.report import Finding
from fastdpop.batch_check.scores import Runner
from fastdpop.batch_check.view import BatchView

_NEAR = 0.1
"""Relative difference of hidden states that are the same, in 16 bits and by other kernels."""
_SAME = 0.01
"""Relative difference of weights that are."""
_TAKE = (
    "Take the states that the lm_head gets: last_hidden_state of the model inside (model.model(...)), behind its "
    "final norm, for this very batch"
)


class _Passing(NamedTuple):
    """How far the given states are from what went into a module and came out of it, as a share of that."""

    name: str
    into: float
    out_of: float


def check_hidden(runner: Runner, view: BatchView) -> list[Finding]:
    """What is passed as `hidden`, if it is not what the model's head gets.

    Raises:
        ValueError: its width is another one.
    """
    assert view.hidden is not None
    wrong = int((~view.hidden.isfinite()).sum())
    if wrong:
        return [
            Finding(
                "hidden-not-finite",
                "error",
                f"{wrong} of {view.hidden.numel()} numbers of hidden are NaN or infinite",
                "Look at the model's outputs: float16 overflows above 65504",
            )
        ]
    off, passing = _passed(runner, view, view.hidden)
    if off <= _NEAR:
        return []
    *layers, last = passing or [_Passing("", 1.0, 1.0)]
    if last.into <= _NEAR:
        return [
            Finding(
                "hidden-before-norm",
                "error",
                f"hidden is what goes into the model's final norm ({last.name}), {last.into:.1%} away from that and "
                f"{off:.0%} from what the lm_head gets",
                _TAKE,
            )
        ]
    best = min(layers, key=lambda layer: layer.out_of, default=last)
    if best.out_of <= _NEAR:
        return [
            Finding(
                "hidden-of-other-layer",
                "error",
                f"hidden is what {best.name} gives, {best.out_of:.1%} away from that and {off:.0%} from what the "
                "lm_head gets",
                _TAKE,
            )
        ]
    return [
        Finding(
            "hidden-differs",
            "warning",
            f"hidden is {off:.0%} away from what the model's lm_head gets for this batch, and is no layer's output: "
            "of another batch, other weights or shifted",
            _TAKE,
        )
    ]


def _passed(runner: Runner, view: BatchView, hidden: Tensor) -> tuple[float, list[_Passing]]:
    """How far the given states are from what the head gets, and from what passes modules, in the order of calls."""
    passing: list[_Passing] = []
    at_head: list[float] = []
    kept = view.attended

    def away(value: Any) -> float:
        """From states of the same places; 1 from anything else."""
        if not isinstance(value, Tensor) or value.shape != hidden.shape:
            return 1.0
        return _difference(hidden.to(value.device)[kept], value.detach()[kept])

    def head(module: nn.Module, args: Any) -> None:
        width = args[0].shape[-1]
        if hidden.shape[-1] != width:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}, expected (2B, T, {width}), as wide as the lm_head"
            )
        at_head.append(away(args[0]))

    output = runner.model.get_output_embeddings()
    hooks = [output.register_forward_pre_hook(head)]
    for name, module in runner.model.named_modules():

        def after(module: nn.Module, args: Any, result: Any, name: str = name) -> None:
            result = result[0] if isinstance(result, tuple) else result
            if isinstance(result, Tensor) and result.shape == hidden.shape and not at_head:
                passing.append(_Passing(name, away(args[0] if args else None), away(result)))

        if module is not output:
            hooks.append(module.register_forward_hook(after))
    try:
        runner.logps(view)
    finally:
        for hook in hooks:
            hook.remove()
    return at_head[0], passing


def _difference(value: Tensor, other: Tensor) -> float:
    """Relative, of all numbers together."""
    return float((value.float() - other.float()).norm() / other.float().norm().clamp_min(1e-12))


def check_weight(model: Any, weight: Tensor) -> list[Finding]:
    """What is passed as `weight`, if it is not the head's.

    Raises:
        TypeError, ValueError: it is no tensor, or does not have its shape.
    """
    own = model.get_output_embeddings().weight.detach()
    embedding = model.get_input_embeddings().weight.detach()
    if not isinstance(weight, Tensor):
        raise TypeError(instead.of_no_tensor("weight", weight, "a torch.Tensor"))
    if weight.shape != own.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected {tuple(own.shape)}, that of the model's lm_head"
        )
    off = _difference(weight.detach().to(own.device), own)
    if off <= _SAME:
        return []
    advice = "Pass model.get_output_embeddings().weight of the model that hidden comes from"
    if (
        embedding.shape == own.shape
        and _difference(weight.to(embedding.device), embedding) <= _SAME
    ):
        return [
            Finding(
                "head-is-embedding",
                "error",
                f"weight is the model's input embedding, {off:.0%} away from its lm_head: the two are not tied",
                advice,
            )
        ]
    return [
        Finding(
            "head-differs", "warning", f"weight is {off:.0%} away from the model's lm_head", advice
        )
    ]
