"""What an attached model makes of a fused function's results."""

from __future__ import annotations

from torch import Tensor, nn

from fastdpop.output import PreferenceOutput


def by_sequence(result: PreferenceOutput) -> Tensor:
    """The ``(S,)`` log-probs of a result, in the order of the batch."""
    logps = result.chosen_logps.new_zeros(len(result.lengths))
    for side, values in enumerate((result.chosen_logps, result.rejected_logps)):
        sequences = result.pairs[:, side]
        present = sequences >= 0
        logps[sequences[present]] = values[present]
    return logps


def with_router_loss(
    model: nn.Module, loss: Tensor, router_loss: Tensor | None, weight: float | None
) -> Tensor:
    """Add the load-balancing loss as a mixture of experts itself does when it gets labels.

    Raises:
        ValueError: it is given a weight, and is not there.
    """
    if router_loss is None:
        if weight:
            raise ValueError(
                f"router_loss_weight is {weight}, but {type(model).__name__} reports no router loss, expected a "
                "mixture of experts with output_router_logits=True"
            )
        return loss
    if weight is not None:
        return loss + weight * router_loss.to(loss.device)
    config = getattr(model, "config", None)
    text_config = getattr(config, "text_config", None)
    for owner in (model, config, text_config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            coefficient = getattr(owner, name, None)
            if coefficient is not None:
                return loss + coefficient * router_loss.to(loss.device)
    raise RuntimeError(
        f"{type(model).__name__} reports an aux_loss, but no router_aux_loss_coef is found in it or its config"
    )
