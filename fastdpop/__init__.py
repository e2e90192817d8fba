"""Fused DPO-Positive and the whole family of preference losses, with no full-vocabulary logits:
hidden states in, loss and gradients out.

    from fastdpop import fused_dpop_loss

    out = fused_dpop_loss(hidden, model.lm_head.weight, labels, ref_logps=ref_logps)
    out.loss.backward()

Nothing is imported before it is used, torch neither. `attach`, `detach`, `is_attached` and `preference_loss` need
transformers, `FastDPOTrainer`, `FastDPOConfig`, `patch_trl` and `unpatch_trl` also trl, `PackedPairs`, `PromptSampler`
and `pack` numpy; where that is not installed, the name is there and says so when it is called.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastdpop.version import VERSION

if TYPE_CHECKING:
    from fastdpop import engines, losses
    from fastdpop.api import fused_dpop_loss, fused_logps, fused_preference_loss
    from fastdpop.batch_check import BatchReport, check_batch
    from fastdpop.data.collate import collate
    from fastdpop.hf import attach, detach, is_attached, preference_loss
    from fastdpop.integrations.trl import FastDPOConfig, FastDPOTrainer, patch_trl, unpatch_trl
    from fastdpop.output import PreferenceOutput
    from fastdpop.prefix.pack import PackedPairs, pack
    from fastdpop.prefix.sampler import PromptSampler
    from fastdpop.unrounded import exact

__version__ = VERSION

__all__ = [
    "BatchReport",
    "FastDPOConfig",
    "FastDPOTrainer",
    "PackedPairs",
    "PreferenceOutput",
    "PromptSampler",
    "__version__",
    "attach",
    "check_batch",
    "collate",
    "detach",
    "engines",
    "exact",
    "fused_dpop_loss",
    "fused_logps",
    "fused_preference_loss",
    "is_attached",
    "losses",
    "pack",
    "patch_trl",
    "preference_loss",
    "unpatch_trl",
]

# A module of the package that had the name of a function here would take its place once it is imported.
_MODULES = {
    "BatchReport": "fastdpop.batch_check",
    "FastDPOConfig": "fastdpop.integrations.trl",
    "FastDPOTrainer": "fastdpop.integrations.trl",
    "PackedPairs": "fastdpop.prefix.pack",
    "PreferenceOutput": "fastdpop.output",
    "PromptSampler": "fastdpop.prefix.sampler",
    "attach": "fastdpop.hf",
    "check_batch": "fastdpop.batch_check",
    "collate": "fastdpop.data.collate",
    "detach": "fastdpop.hf",
    "engines": "fastdpop.engines",
    "exact": "fastdpop.unrounded",
    "fused_dpop_loss": "fastdpop.api",
    "fused_logps": "fastdpop.api",
    "fused_preference_loss": "fastdpop.api",
    "is_attached": "fastdpop.hf",
    "losses": "fastdpop.losses",
    "pack": "fastdpop.prefix.pack",
    "patch_trl": "fastdpop.integrations.trl",
    "preference_loss": "fastdpop.hf",
    "unpatch_trl": "fastdpop.integrations.trl",
}
"""Where each public name stands; one that is its module's own stands for the module."""


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:  # to a type checker a function of this name says that there are all names

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(_MODULES[name])
        except ImportError as error:
            if (error.name or "").partition(".")[0] == __name__:
                raise  # no package is missing, this one is broken
            from fastdpop.missing import Missing

            return Missing(name, error)
        value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
        globals()[name] = value
        return value
