"""TRL's ``DPOConfig`` with DPOP's lambda."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl.trainer.dpo_config import DPOConfig

from fastdpop.integrations import dpop_lambda as lambdas


@dataclass
class FastDPOConfig(DPOConfig):
    """TRL's ``DPOConfig`` with DPOP's lambda.

    Attributes:
        dpop_lambda: weight of the penalty in ``loss_type="dpop"``, 0 or above; its beta is ``beta``.

    Raises:
        ValueError, TypeError: `dpop_lambda` is not a finite number, 0 or above.
    """

    dpop_lambda: float = field(default=lambdas.DEFAULT, metadata={"help": lambdas.HELP})

    def __post_init__(self) -> None:
        lambdas.check(self.dpop_lambda)
        super().__post_init__()
