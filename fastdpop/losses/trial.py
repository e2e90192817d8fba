"""The claim that a loss treats every pair by itself, tried on made-up pairs.

Engines evaluate such a loss a few pairs at a time. One that compares pairs would then, in silence, give other
gradients than its value says.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from .base import FunctionLoss, PairLogps, PreferenceLoss, Traits, WeightedSum, by_pair, called
from .options import KIND, check, positive

Function = Callable[[PairLogps], Tensor]

_TRIED: weakref.WeakValueDictionary[int, PreferenceLoss] = weakref.WeakValueDictionary()
"""Losses whose claim has been tried, by their id, which is theirs for as long as they are here."""


_FRACTIONS, _FLAGS = (0.5, 0.875, 0.25), (1.0, 0.0, 1.0)
"""Values of three pairs: in (0, 1), as weights, margins, scores and probabilities may all be; or of labels."""


class _MadeUp(dict[str, Tensor]):
    """Values of three pairs under any name that a function asks for."""

    def __init__(self, values: tuple[float, ...], device: torch.device) -> None:
        super().__init__()
        self.values_of_pairs, self.device = values, device

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Tensor:
        self[name] = torch.tensor(self.values_of_pairs, dtype=torch.float64, device=self.device)
        return self[name]

    def get(self, name: str, default: object = None) -> Tensor:
        return self[name]


@overload
def pairwise(function: Function, *, beta: float = ...) -> FunctionLoss: ...


@overload
def pairwise(*, beta: float = ...) -> Callable[[Function], FunctionLoss]: ...


def pairwise(
    function: Function | None = None, *, beta: float = 1.0
) -> FunctionLoss | Callable[[Function], FunctionLoss]:
    """Declare that a function of ``PairLogps`` treats every pair by itself, so that a trained
    lm_head costs 3 matrix products, not 4.

    The claim is tried on three made-up pairs at once: the function must give each the value it
    gives it alone, and a gradient. With options, ``@pairwise(beta=0.1)`` decorates too.

    Args:
        beta: scales the logged rewards, and nothing else.

    Raises:
        TypeError: it is no function, or it is a loss already.
        ValueError: the value of a pair depends on the others, or on no log-prob.
    """
    check("pairwise", "beta", beta, positive(1.0).metadata[KIND])
    if function is None:
        return functools.partial(pairwise, beta=beta)
    if isinstance(function, (PreferenceLoss, type)) or not callable(function):
        raise TypeError(f"function is {function!r}, expected a function of PairLogps")
    loss = FunctionLoss(function, Traits(needs_reference=False, reads=None), beta)
    _try(
        loss, torch.device("cpu"), "Pass it undecorated: the whole batch is then evaluated together"
    )
    return loss


def tried(loss: PreferenceLoss, device: torch.device) -> PreferenceLoss:
    """The loss, if its claim that pairs do not meet is true; tried once for each object that is not wholly ours.

    Args:
        device: where the pairs are, and with them what a loss may have of its own.

    Raises:
        ValueError: the value of a pair depends on the others, or on no log-prob.
    """
    if not _is_ours(loss) and _TRIED.get(id(loss)) is not loss:
        _try(
            loss,
            device,
            "A loss that compares pairs says so: _traits = losses.Traits(couples_pairs=True)",
        )
        _TRIED[id(loss)] = loss
    return loss


def _is_ours(loss: PreferenceLoss) -> bool:
    """Whether it, and what it holds, is of this package's classes; :func:`pairwise` has tried functions."""
    if isinstance(loss, WeightedSum):
        return all(_is_ours(part) for _, part in loss.terms)
    if type(loss).__module__.rpartition(".")[0] != __package__:
        return False
    inner = getattr(loss, "loss", None)
    return not isinstance(inner, PreferenceLoss) or _is_ours(inner)


def _made_up(values: tuple[float, ...], device: torch.device) -> PairLogps:
    """Three pairs. No two of anything that a function may compute are the same, log-ratios among them."""

    def numbers(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    logps, near = numbers(-40.0, -75.5, -12.25), numbers(0.5, -1.25, 0.125)
    lengths, there = numbers(11.0, 23.0, 5.0), numbers(1.0, 1.0, 1.0).bool()
    return PairLogps(
        chosen=logps.clone().requires_grad_(),
        rejected=(logps.flip(0) - 3.0).requires_grad_(),
        chosen_lengths=lengths,
        rejected_lengths=lengths + 2.0,
        ref_chosen=logps + near,
        ref_rejected=logps.flip(0) - 3.0 - 0.7 * near.flip(0),
        chosen_aligned_logps=-lengths,
        rejected_aligned_logps=-0.7 * lengths - near,
        chosen_present=there,
        rejected_present=there,
        kl=logps.new_tensor(0.5),
        batch_pairs=logps.new_tensor(3.0),
        batch_sides=logps.new_tensor(6.0),
        batch_chosen_tokens=lengths.sum(),
        values=_MadeUp(values, device),
    )


def _try(loss: PreferenceLoss, device: torch.device, otherwise: str) -> None:
    """
    Args:
        otherwise: what to do about a loss that couples pairs.

    Raises:
        ValueError: see :func:`tried`, or the loss takes no made-up pairs.
    """
    with torch.inference_mode(False), torch.enable_grad():
        try:
            together, apart = _both_ways(loss, _made_up(_FRACTIONS, device))
        except (AttributeError, NameError):
            raise
        except Exception:  # whatever a user's function raises, of values that its data never have
            pairs = _made_up(_FLAGS, device)
            try:
                together, apart = _both_ways(loss, pairs)
            except Exception as error:
                raise ValueError(
                    f"{called(loss)} cannot be tried: on three made-up pairs, all at once and one by one"
                    f"{', with values ' + str(dict(pairs.values)) if pairs.values else ''}, it raises "
                    f"{type(error).__name__} ({error}). {otherwise}"
                ) from error
    # A loss may compute in float32, and products of three rows are rounded otherwise than those of one.
    near = 1e-5 * together.detach().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    if not torch.allclose(together, apart, rtol=1e-5, atol=near, equal_nan=True):
        raise ValueError(
            f"{called(loss)} is not pairwise: on three pairs at once it gives {together.tolist()}, one by one "
            f"{apart.tolist()}; or it is another function in each call. {otherwise}"
        )


def _both_ways(loss: PreferenceLoss, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """The losses of three pairs, at once and one by one."""
    return by_pair(loss, pairs), torch.cat([by_pair(loss, pairs[i : i + 1]) for i in range(3)])
