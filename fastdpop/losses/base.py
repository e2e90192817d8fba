"""What a preference loss is: a function of a few sequence log-probabilities.

A loss maps :class:`PairLogps`, the log-probabilities of P pairs, to P loss values. It knows nothing
of vocabularies, hidden states or engines; engines know of a loss only that it can be called. Losses
are frozen dataclasses: their options are their fields, and two losses with the same options are the
same loss.

    total = get("dpop", beta=0.3, lam=50.0) + 0.1 * get("sft")       # weighted sums are losses too

A loss of your own is a plain function of ``PairLogps``; decorate it with :func:`.trial.pairwise` when
every pair's value depends on that pair alone, and a trained lm_head then costs 3 matrix products
instead of 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, ClassVar, NoReturn

import torch
from torch import Tensor

from fastdpop.names import hint

WEIGHT = "weight"
"""The value of a pair that any loss is multiplied by."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of P pairs, all float64 (float32 on a device without it), all shaped
    ``(P,)`` unless said otherwise.

    Attributes:
        chosen, rejected: summed policy log-probabilities of the completions, in nats
            (differentiable).
        chosen_lengths, rejected_lengths: numbers of scored tokens, as floats. 0 for an empty
            completion.
        ref_chosen, ref_rejected: the reference's log-probabilities, or None when the call has no
            reference; float32 if the caller gave them so. A loss reads `chosen_logratios` and
            `rejected_logratios`, which round the policy's alike before they compare.
        chosen_aligned_logps, rejected_aligned_logps: token sums of ``logp - log sum_v p_v^2`` under
            the policy (no gradient), which WPO's weights need; None unless the loss lists
            ``"aligned_logps"`` in its ``statistics``.
        chosen_present, rejected_present: bool masks; a side of an unpaired example that does not
            exist is False and has log-probability and length 0.
        kl: 0-d tensor, KTO's reference point z_0, or None.
        batch_pairs, batch_sides, batch_chosen_tokens: totals over the whole batch (0-d tensors),
            the same in every chunk of it, so that a loss normalised by the batch is still a sum
            over pairs.
        values: numbers that the data give for each pair, by name; see `pair_values` of
            :func:`fastdpop.fused_preference_loss`. Empty where none were given.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_aligned_logps: Tensor | None
    rejected_aligned_logps: Tensor | None
    chosen_present: Tensor
    rejected_present: Tensor
    kl: Tensor | None
    batch_pairs: Tensor
    batch_sides: Tensor
    batch_chosen_tokens: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict, hash=False)

    @property
    def chosen_logratios(self) -> Tensor:
        """``log pi(y_w|x) - log ref(y_w|x)``, ``(P,)``."""
        chosen, ref_chosen = rounded_alike(self.chosen, self.ref_chosen)
        return chosen - ref_chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """``log pi(y_l|x) - log ref(y_l|x)``, ``(P,)``."""
        rejected, ref_rejected = rounded_alike(self.rejected, self.ref_rejected)
        return rejected - ref_rejected

    if not TYPE_CHECKING:  # to a type checker it says that there are all names

        def __getattr__(self, name: str) -> NoReturn:
            """Of a name that is none of these."""
            meant = hint(name, (f.name for f in fields(PairLogps))) if name[0] != "_" else ""
            raise AttributeError(f"PairLogps has no attribute {name!r}{meant}")

    def __getitem__(self, index: Tensor | slice) -> PairLogps:
        """The same batch restricted to some pairs; whole-batch totals stay."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own |= {
            name: value[index]
            for name, value in own.items()
            if value is not None and name not in _NOT_BY_PAIR
        }
        own["values"] = {name: value[index] for name, value in self.values.items()}
        return PairLogps(**own)


_NOT_BY_PAIR = frozenset({"kl", "batch_pairs", "batch_sides", "batch_chosen_tokens", "values"})


def rounded_alike(logps: Tensor, ref_logps: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of policy and reference to be compared, in the policy's dtype, or a
    ValueError when the call has no reference.

    The policy is rounded as the reference was: log-probabilities that are equal then have a
    log-ratio of exactly 0.
    """
    if ref_logps is None:
        raise ValueError(
            "this loss reads the reference's log-probabilities: pass ref_logps= or ref_hidden="
        )
    return logps.to(ref_logps.dtype).to(logps.dtype), ref_logps.to(logps.dtype)


@dataclass(frozen=True)
class Traits:
    """What the caller of a loss must know before calling it.

    Attributes:
        needs_reference: the loss reads the reference's log-probabilities.
        accepts_unpaired: a pair may lack one side (index -1).
        uses_kl: the loss reads ``kl`` when it is given.
        couples_pairs: the value of one pair depends on other pairs' log-probabilities, always.
        couples_pairs_without_kl: the same, but only in a call without ``kl``.
        statistics: row statistics that the loss reads (names as in :mod:`fastdpop.engines`).
        ld_alpha: weight of the tokens past the shorter completion's length (LD-DPO), or None for
            plain sums.
        reads: names of the pairs' values that the loss can read, besides ``"weight"``, which every
            loss is multiplied by; None for a function that may read any, and the reference too.
        needs: names of those that it cannot do without.
    """

    needs_reference: bool = True
    accepts_unpaired: bool = False
    uses_kl: bool = False
    couples_pairs: bool = False
    couples_pairs_without_kl: bool = False
    statistics: tuple[str, ...] = ()
    ld_alpha: float | None = None
    reads: tuple[str, ...] | None = ()
    needs: tuple[str, ...] = ()

    @property
    def may_read_reference(self) -> bool:
        """Whether a reference has an effect, needed or not."""
        return self.needs_reference or self.reads is None

    @staticmethod
    def of_sum(parts: tuple[Traits, ...]) -> Traits:
        """Traits of a weighted sum of losses."""
        alphas = {part.ld_alpha for part in parts}
        if len(alphas) > 1:
            raise ValueError(
                f"the losses of a sum weigh tokens differently (ld_alpha "
                f"{sorted(alphas, key=str)}): wrap the whole sum in length_desensitised instead"
            )
        return Traits(
            needs_reference=any(part.needs_reference for part in parts),
            accepts_unpaired=all(part.accepts_unpaired for part in parts),
            uses_kl=any(part.uses_kl for part in parts),
            couples_pairs=any(part.couples_pairs for part in parts),
            couples_pairs_without_kl=any(part.couples_pairs_without_kl for part in parts),
            statistics=_union(part.statistics for part in parts),
            ld_alpha=alphas.pop(),
            reads=None
            if any(part.reads is None for part in parts)
            else _union(part.reads or () for part in parts),
            needs=_union(part.needs for part in parts),
        )


def _union(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(sorted({name for of_part in names for name in of_part}))


class PreferenceLoss:
    """Base of all losses. Subclasses are frozen dataclasses that define ``__call__`` and, where it
    differs, ``_traits``.
    """

    _traits: ClassVar[Traits] = Traits()

    @property
    def traits(self) -> Traits:
        """What the caller must know before calling this loss."""
        return self._traits

    def __call__(self, pairs: PairLogps) -> Tensor:
        """The loss of every pair, ``(P,)``, differentiable in ``pairs.chosen`` and
        ``pairs.rejected``.
        """
        raise TypeError(f"{type(self).__name__} does not define __call__(pairs)")

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards ``beta * logratio`` of chosen and rejected, ``(P,)`` each, for logging.

        A loss without a reference uses the log-probability in the place of the log-ratio; a loss
        without beta, beta = 1.
        """
        beta = getattr(self, "beta", 1.0)
        if not self.traits.needs_reference or pairs.ref_chosen is None:
            return beta * pairs.chosen, beta * pairs.rejected
        return beta * pairs.chosen_logratios, beta * pairs.rejected_logratios

    def __add__(self, other: PreferenceLoss) -> PreferenceLoss:
        if not isinstance(other, PreferenceLoss):
            return NotImplemented
        return WeightedSum(_terms(self) + _terms(other))

    def __mul__(self, weight: float) -> PreferenceLoss:
        if not isinstance(weight, (int, float)):
            return NotImplemented
        return WeightedSum(tuple((float(weight) * own, loss) for own, loss in _terms(self)))

    __rmul__ = __mul__


def check_loss(loss: object) -> None:
    """
    Raises:
        TypeError: it is no loss, but its name, for one.
    """
    if not isinstance(loss, PreferenceLoss):
        raise TypeError(
            f"loss is {loss!r}, expected a PreferenceLoss, as fastdpop.losses.get(name) gives it"
        )


def by_pair(loss: Callable[[PairLogps], Tensor], pairs: PairLogps) -> Tensor:
    """The loss of every pair, ``(P,)``, of one that may be a user's.

    Raises:
        ValueError: it is of another shape or dtype, or has no gradient where the pairs have one.
    """
    values = loss(pairs)
    if not isinstance(values, Tensor) or values.shape != pairs.chosen.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the loss {called(loss)} returned {got}, expected one value per pair: a tensor of shape "
            f"{tuple(pairs.chosen.shape)}"
        )
    if not values.is_floating_point():
        raise ValueError(
            f"the loss {called(loss)} returned {values.dtype}, expected floating point"
        )
    wanted = torch.is_grad_enabled() and pairs.chosen.requires_grad
    if wanted and not values.requires_grad:
        raise ValueError(
            f"the loss {called(loss)} does not depend on pairs.chosen or pairs.rejected in a way that autograd sees, "
            "so that nothing can be learned: .detach(), .item(), torch.tensor(...) or torch.no_grad() cut it off"
        )
    return values


def called(loss: object) -> str:
    """How a message names a loss: a user's function by itself, not by what stands around it."""
    return f"{getattr(loss, 'function', loss)!r:.120}"


def _terms(loss: PreferenceLoss) -> tuple[tuple[float, PreferenceLoss], ...]:
    return loss.terms if isinstance(loss, WeightedSum) else ((1.0, loss),)


@dataclass(frozen=True)
class WeightedSum(PreferenceLoss):
    """``sum_k weight_k * loss_k``; its rewards are those of the first loss. Made by ``+`` and
    ``*``.
    """

    terms: tuple[tuple[float, PreferenceLoss], ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("terms is empty, expected at least one (weight, loss)")
        for weight, loss in self.terms:
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {loss!r} is {weight}, expected a finite number")
        self.traits  # an inconsistent sum fails where it is written  # noqa: B018

    @property
    def traits(self) -> Traits:
        return Traits.of_sum(tuple(loss.traits for _, loss in self.terms))

    def __call__(self, pairs: PairLogps) -> Tensor:
        return functools.reduce(
            torch.add, (weight * by_pair(loss, pairs) for weight, loss in self.terms)
        )

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.terms[0][1].rewards(pairs)


@dataclass(frozen=True)
class LengthDesensitised(PreferenceLoss):
    """LD-DPO (arXiv:2409.06411, Eq. 10): ``log pi(y) = sum_{t <= l} logp_t + alpha * sum_{t > l}
    logp_t``, with l the length of the shorter completion of the pair. Works with any loss, for
    policy and reference alike.
    """

    loss: PreferenceLoss
    alpha: float

    def __post_init__(self) -> None:
        check_loss(self.loss)
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not number or not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha is {self.alpha!r}, expected a value in [0, 1]")
        inner = self.loss.traits.ld_alpha
        if inner is not None:
            raise ValueError(
                f"loss is {self.loss!r}, expected one without token weights of its own (ld_alpha {inner}), which "
                f"alpha={self.alpha} would take the place of"
            )
        if "list" in self.loss.traits.needs:
            raise ValueError(
                f"loss is {self.loss!r}, expected one of pairs: a completion of a ranking has no one partner "
                "whose length says where its tail begins"
            )

    @property
    def traits(self) -> Traits:
        # The engine weighs the tokens, so the loss receives sums that are already desensitised.
        return replace(self.loss.traits, ld_alpha=self.alpha)

    def __call__(self, pairs: PairLogps) -> Tensor:
        return by_pair(self.loss, pairs)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        return self.loss.rewards(pairs)


def length_desensitised(loss: PreferenceLoss, alpha: float) -> PreferenceLoss:
    """The loss with LD-DPO's token weights; see :class:`LengthDesensitised`."""
    return LengthDesensitised(loss, alpha)


@dataclass(frozen=True)
class FunctionLoss(PreferenceLoss):
    """A user's function as a loss. ``beta`` only scales the logged rewards."""

    function: Callable[[PairLogps], Tensor]
    own_traits: Traits
    beta: float = 1.0

    @property
    def traits(self) -> Traits:
        return self.own_traits

    def __call__(self, pairs: PairLogps) -> Tensor:
        try:
            return by_pair(self.function, pairs)
        except KeyError as error:
            name = error.args[0] if error.args else None
            if not isinstance(name, str) or name in pairs.values:
                raise
            raise ValueError(
                f"the loss {called(self)} raises KeyError: {name!r}, which pair_values does not have (names there: "
                f"{sorted(pairs.values) or 'none'}): if it is a value of the pairs, pass pair_values={{{name!r}: ...}}"
            ) from error

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """``beta * logratio`` when the call has a reference, whether or not the function reads it;
        else ``beta * logp``.
        """
        if pairs.ref_chosen is None:
            return self.beta * pairs.chosen, self.beta * pairs.rejected
        return self.beta * pairs.chosen_logratios, self.beta * pairs.rejected_logratios
