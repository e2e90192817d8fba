"""TRL's ``DPOTrainer`` on fastdpop's loss: DPOP, and every loss that TRL has, without logits.

    fastdpop.patch_trl()
    trainer = DPOTrainer(model, args=DPOConfig(loss_type="dpop", dpop_lambda=50.0, beta=0.3), ...)

or :class:`FastDPOTrainer`, which changes nothing outside itself. What TRL's trainer does around the loss stays TRL's:
data, references, logging, checkpoints. Its step is replaced (:mod:`fastdpop.integrations.trl.step`).
"""

from fastdpop.installed import needs

try:
    import trl
except ImportError as error:
    raise ImportError(needs("fastdpop's TRL integration", "trl", "trl")) from error

from fastdpop.integrations.trl.version import check_version

check_version(trl.__version__)  # before the others are imported, which need what such a version has

from fastdpop.integrations.trl.config import FastDPOConfig  # noqa: E402
from fastdpop.integrations.trl.loss import LOSS_TYPES  # noqa: E402
from fastdpop.integrations.trl.patching import patch_trl, unpatch_trl  # noqa: E402
from fastdpop.integrations.trl.trainer import FastDPOTrainer  # noqa: E402

__all__ = [
    "LOSS_TYPES",
    "FastDPOConfig",
    "FastDPOTrainer",
    "check_version",
    "patch_trl",
    "unpatch_trl",
]
