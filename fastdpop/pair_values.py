"""Numbers that the data give for each pair: a weight, a margin, a reward that someone gave a completion.

What they mean is their loss's affair, ``"weight"`` apart, which :mod:`fastdpop.pair_loss` multiplies any loss by. This
module sees to it that a loss gets those that it reads, as float64, and none that nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.library import custom_op

from fastdpop import checks
from fastdpop.losses.base import WEIGHT, PreferenceLoss, called
from fastdpop.names import hint
from fastdpop.rows import wide_dtype


def checked(
    given: object, loss: PreferenceLoss, pairs: int, device: torch.device, wait: bool
) -> dict[str, Tensor]:
    """The values by name, ``(P,)`` each, in the order of the names; empty where none were given.

    Args:
        wait: look at them on a GPU too, which takes waiting for it.

    Raises:
        TypeError, ValueError: they are not as :func:`fastdpop.fused_preference_loss` describes them, the loss does not
            read one, or it needs another.
    """
    found = _mapping(given)
    missing = [name for name in loss.traits.needs if name not in found]
    if missing:
        given_now = f"pair_values has {sorted(found)}" if found else "pair_values is not given"
        expected = ", ".join(f"{name!r}: ..." for name in missing)
        raise ValueError(f"{given_now}, and {called(loss)} needs more: pair_values={{{expected}}}")
    for name, value in found.items():
        if not readable(loss, [name]):
            known = sorted({WEIGHT, *(loss.traits.reads or ()), *loss.traits.needs})
            raise ValueError(
                f"pair_values contains {name!r}{hint(name, known)}, which {called(loss)} does not read, expected names "
                f"among {known}"
            )
        checks.pair_value(_called(name), value, pairs, device)
    return {name: pair_value(found[name], name, wait) for name in sorted(found)}


def readable(loss: PreferenceLoss, names: Iterable[str]) -> list[str]:
    """Those of the names whose values the loss can be given."""
    reads, needs = loss.traits.reads, loss.traits.needs
    return [name for name in names if reads is None or name in (WEIGHT, *reads, *needs)]


def _mapping(given: object) -> dict[str, Tensor]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"pair_values is {type(given).__name__}, expected a mapping from names to tensors"
        )
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"pair_values contains {name!r}, expected names that are strings")
    return dict(given)


def _called(name: str) -> str:
    return f"pair_values[{name!r}]"


@custom_op("fastdpop::pair_value", mutates_args=())
def pair_value(value: Tensor, name: str, wait: bool) -> Tensor:
    """Numbers ``(P,)`` as float64, which they are: finite, and for a weight not negative.

    An operator, since what depends on values is none of a compiler's business.
    """
    wide = value.to(wide_dtype(value.device), copy=True)
    if wait or value.device.type == "cpu":
        low = 0.0 if name == WEIGHT else -torch.inf
        wrong = ~(wide.isfinite() & (wide >= low))
        if not value.is_floating_point():  # the id of a list may have more digits than a float
            wrong |= wide.to(value.dtype) != value
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0, 0])
            expected = "a finite number of at least 0" if name == WEIGHT else "a finite number"
            raise ValueError(
                f"{_called(name)} is {value[place].item()} for pair {place}, expected {expected}, "
                f"which {wide.dtype} can hold"
            )
    return wide


@pair_value.register_fake
def _(value: Tensor, name: str, wait: bool) -> Tensor:
    return value.new_empty(value.shape, dtype=wide_dtype(value.device))
