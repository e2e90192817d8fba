"""TRL's ``DPOTrainer`` on fastdpop, as a class of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from trl.trainer.dpo_trainer import DPOTrainer

from fastdpop.integrations.trl.models import AttachedWhenSet, checked_settings
from fastdpop.integrations.trl.step import Inputs, precomputed, step, with_own_cache


class FastDPOTrainer(DPOTrainer):
    """TRL's ``DPOTrainer`` whose step is fastdpop's. It takes the same arguments, and

    Args:
        engine, workspace_bytes: as in :func:`fastdpop.attach`.

    ``args`` may be a ``DPOConfig`` or a :class:`FastDPOConfig`. Everything that ``DPOTrainer`` logs is logged, and
    ``penalty``, DPOP's hinge in nats.

    Raises:
        ValueError: the data are images, the loss types are not known or do not go together, or a setting asks for
            another implementation of the loss.
        RuntimeError: the model has no output embedding that can be read, as when it is quantised.
    """

    model = AttachedWhenSet("model")
    ref_model = AttachedWhenSet("ref_model")

    def __init__(
        self, *args: Any, engine: str = "auto", workspace_bytes: int | None = None, **kwargs: Any
    ) -> None:
        self._fastdpop = checked_settings(engine, workspace_bytes)
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: Inputs, return_outputs: bool) -> Any:
        return step(self, model, inputs, return_outputs)

    def compute_ref_log_probs(self, *model_and_inputs: Any) -> tuple[Tensor, Tensor]:
        return precomputed(self, *model_and_inputs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return super()._precompute_ref_logps(with_own_cache(self, dataset), name, batch_size)
