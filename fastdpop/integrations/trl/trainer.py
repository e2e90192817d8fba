"""TRL's ``DPOTrainer`` on fastdpop, as a class of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from trl.trainer.dpo_trainer import DPOTrainer

from fastdpop.call import Loss
from fastdpop.choices import EngineName
from fastdpop.integrations.trl import metrics, references, values
from fastdpop.integrations.trl.models import AttachedWhenSet, checked_settings
from fastdpop.integrations.trl.order import by_prompt, without_padding_warning
from fastdpop.integrations.trl.step import Inputs, precomputed, step
from fastdpop.integrations.trl.values import CollatedWithValues


class FastDPOTrainer(DPOTrainer):
    """TRL's ``DPOTrainer`` whose step is fastdpop's. It takes the same arguments, and

    Args:
        engine, workspace_bytes: as in :func:`fastdpop.attach`.
        loss: any loss of :mod:`fastdpop.losses`, its name, or a function of your own, in the place of the
            config's ``loss_type``. The reference is scored for the metrics even if the loss reads none. ``ld_alpha``
            and ``use_weighting`` apply to it. Rewards are logged with its beta, or the config's if it has none.

    ``args`` may be a ``DPOConfig`` or a :class:`FastDPOConfig`, of which the latter has `dpop_lambda`,
    `share_prefixes`, `global_batch`, `pair_values` and `warn_displacement`. Everything that ``DPOTrainer`` logs is
    logged, as means over the pairs or tokens since the last time; in nats, ``logratios/chosen`` and
    ``logratios/rejected``, with their standard errors over pairs after an evaluation; ``penalty``, DPOP's hinge in
    nats; and what shows whether chosen completions are displaced: ``hinge_on``, ``logps/first_difference``,
    ``logps/after_difference``, ``ches`` and ``ches_normalised`` (docs/trl.md).

    Raises:
        ValueError: the data are images, the loss types are not known or do not go together, a setting asks for
            another implementation of the loss, or one has no effect beside `loss`; a column that `pair_values` names is
            missing, holds something else than finite numbers, or is not read by the loss, or one that it needs is not
            named.
        TypeError: `loss` is no loss.
        RuntimeError: the model has no output embedding that can be read, as when it is quantised.
    """

    model = AttachedWhenSet("model")
    ref_model = AttachedWhenSet("ref_model")
    data_collator = CollatedWithValues("data_collator")

    def __init__(
        self,
        *args: Any,
        engine: EngineName = "auto",
        workspace_bytes: int | None = None,
        loss: Loss | None = None,
        **kwargs: Any,
    ) -> None:
        self._fastdpop = checked_settings(engine, workspace_bytes, loss)
        with without_padding_warning():
            super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing: Any, args: Any, name: str) -> Any:
        values.check_dataset(dataset, args, name, self._fastdpop.loss)
        return super()._prepare_dataset(dataset, processing, args, name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        values.keep_columns(self)

    def _compute_loss(self, model: nn.Module, inputs: Inputs, return_outputs: bool) -> Any:
        return step(self, model, inputs, return_outputs)

    def compute_ref_log_probs(self, *model_and_inputs: Any) -> tuple[Tensor, Tensor]:
        return precomputed(self, *model_and_inputs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        own = super()._precompute_ref_logps
        return references.with_logps(self, own, dataset, name, batch_size)

    def _get_train_sampler(self, *args: Any) -> Any:
        return by_prompt(self, super()._get_train_sampler(*args), *args)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        return metrics.evaluated(self, super().evaluation_loop, *args, **kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        metrics.fill(self, "train" if self.model.training else "eval")
        super().log(*args, **kwargs)
