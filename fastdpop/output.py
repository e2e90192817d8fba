"""What a fused loss returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastdpop.measures import means, shown


@dataclass(frozen=True, repr=False)
class PreferenceOutput:
    """Loss and logged values of P pairs of S sequences; float32, or float64 for float64 inputs.

    Only `loss` is differentiable. A side that an unpaired example lacks counts 0 in every value.

    Attributes:
        loss: 0-d for ``reduction="mean"`` or ``"sum"``, ``(P,)`` for ``"none"``.
        losses: ``(P,)`` loss of every pair.
        chosen_logps, rejected_logps: ``(P,)`` summed policy log-probs, in nats.
        chosen_logratios, rejected_logratios: ``(P,)`` these less the reference's; None without a
            reference.
        chosen_rewards, rejected_rewards: ``(P,)`` implicit rewards: ``beta * logratio``, without a
            reference what the loss has in its place (simpo, orpo and alpha_po a function of the mean
            log-prob of a token), of a sum the first loss's. DPOP's penalty stands apart, in `penalty`.
        margins: ``(P,)`` chosen minus rejected reward.
        accuracy: 0-d, the part of the pairs with a positive margin, of those that have both sides.
        penalty: ``(P,)`` DPOP's hinge ``max(0, log ref(y_w|x) - log pi(y_w|x))`` in nats, not
            scaled by lambda; None without a reference.
        lengths: ``(S,)`` scored tokens of each input sequence that a pair uses, else 0; int64.
        pairs: ``(P, 2)`` which input sequence is each pair's chosen and its rejected one, else -1; int64.
        entropy, mean_logits, token_accuracy: ``(S,)`` token means over each input sequence (0 for
            an empty one, and for one that no pair uses) of the statistics in
            :data:`fastdpop.engines.STATISTICS`; None unless asked for.
        first_logps: ``(P,)`` chosen log-prob, in nats, of the first scored token in which a pair's completions differ;
            rejected_first_logps: the rejected one's of its token there; after_logps: mean chosen log-prob of the tokens
            after it. 0 where there is no such token.
        differs: ``(P,)`` bool, whether there is one on the chosen side. Not where a side is absent, or where the chosen
            completion is the beginning of the rejected one.
        ches: ``(P,)`` CHES score (arXiv:2410.08847), the higher, the more the pair will lower its own chosen log-prob;
            ches_normalised: of mean hidden states instead of summed ones. 0 where a side is absent. These six are None
            unless ``"displacement"`` is asked for.
    """

    loss: Tensor
    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor
    penalty: Tensor | None
    lengths: Tensor
    pairs: Tensor
    chosen_logratios: Tensor | None = None
    rejected_logratios: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    token_accuracy: Tensor | None = None
    first_logps: Tensor | None = None
    rejected_first_logps: Tensor | None = None
    after_logps: Tensor | None = None
    differs: Tensor | None = None
    ches: Tensor | None = None
    ches_normalised: Tensor | None = None

    def metrics(self) -> dict[str, float]:
        """What to log, under TRL's names: ``loss`` (the mean of losses for ``reduction="none"``), ``rewards/chosen``,
        ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen`` and ``logps/rejected``; with
        a reference ``logratios/chosen``, ``logratios/rejected``, ``penalty`` and ``hinge_on``, the part of the pairs
        whose hinge is on; and of the statistics that were asked for ``entropy``, ``logits/chosen``,
        ``logits/rejected``, ``mean_token_accuracy``, ``ches``, ``ches_normalised``, ``logps/first_difference`` and
        ``logps/after_difference``.

        Each is the mean over the pairs of this process that have the sides that it is of (of the middle four, over
        their tokens), and left out where there are none. Waits for the device, once.
        """
        return means(self)

    def __repr__(self) -> str:
        return shown(self)
