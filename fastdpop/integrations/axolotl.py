"""Axolotl's DPO training on fastdpop's losses.

    plugins: [fastdpop.integrations.axolotl.FastDpopPlugin]
    fastdpop: true
    rl: dpo
    dpo_loss_type: ["dpop"]
    dpop_lambda: 50

Axolotl trains with TRL's ``DPOTrainer``, so this checks the file (:mod:`fastdpop.integrations.axolotl_args`), hands
lambda and its like to the trainer's arguments and calls :func:`fastdpop.patch_trl`. Versions of Axolotl that look for
installed plugins find it without the first line; without ``fastdpop: true`` it does nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

try:
    from axolotl.integrations.base import BasePlugin
except ImportError as error:
    raise ImportError(
        "fastdpop's Axolotl plugin needs axolotl, in the environment that fastdpop is installed in: pip install axolotl"
    ) from error

_ARGS = "fastdpop.integrations.axolotl_args"


class FastDpopPlugin(BasePlugin):
    """``fastdpop: true`` in a YAML file lets Axolotl compute its DPO losses with fastdpop, and know ``dpop``."""

    _patched: ClassVar[bool] = False  # Axolotl makes a new plugin for each file that lists it

    def get_input_args(self) -> str:
        return f"{_ARGS}.FastDpopArgs"

    def get_training_args_mixin(self) -> str:
        # Once a process, whatever later files say: the classes of training arguments are made only once.
        return f"{_ARGS}.FastDpopTrainingArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """What the file says of the trainer's arguments that fastdpop adds."""
        if not cfg.fastdpop:
            return {}
        said = {
            "dpop_lambda": cfg.dpop_lambda,
            "pair_values": cfg.fastdpop_pair_values,
            "warn_displacement": cfg.fastdpop_warn_displacement,
        }
        return {name: value for name, value in said.items() if value is not None}

    def pre_model_load(self, cfg: Any) -> None:
        """Patch TRL, or undo it after another file's run. Called for the policy, and for a reference model."""
        if not cfg.fastdpop:
            self.post_train_unload(cfg)
            return
        from fastdpop.integrations.trl import patch_trl

        patch_trl(
            engine=cfg.fastdpop_engine or "auto",
            workspace_bytes=cfg.fastdpop_workspace_bytes,
            share_prefixes=bool(cfg.fastdpop_share_prefixes),
            global_batch=bool(cfg.fastdpop_global_batch),
        )
        FastDpopPlugin._patched = True

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """
        Raises:
            ValueError: the trainer computes a loss of its own.
        """
        if not cfg.fastdpop:
            return
        from trl.trainer.dpo_trainer import DPOTrainer

        kind = type(trainer)
        if getattr(kind, "_compute_loss", None) is not DPOTrainer._compute_loss:
            raise ValueError(
                f"the trainer is a {kind.__module__}.{kind.__name__}, expected one that leaves the loss to TRL's "
                "DPOTrainer with fastdpop: true: leave out trainer_cls, and plugins that bring a trainer"
            )

    def post_train_unload(self, cfg: Any) -> None:
        """Leave TRL as it was."""
        if FastDpopPlugin._patched:
            from fastdpop.integrations.trl import unpatch_trl

            unpatch_trl()
            FastDpopPlugin._patched = False
