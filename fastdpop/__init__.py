"""Fused DPO-Positive and the whole family of preference losses, with no full-vocabulary logits:
hidden states in, loss and gradients out.

    from fastdpop import fused_dpop_loss

    out = fused_dpop_loss(hidden, model.lm_head.weight, labels, ref_logps=ref_logps)
    out.loss.backward()
"""

from typing import TYPE_CHECKING, Any

from fastdpop import engines, losses
from fastdpop.api import fused_dpop_loss, fused_logps, fused_preference_loss
from fastdpop.exact import exact
from fastdpop.output import PreferenceOutput
from fastdpop.version import VERSION

if TYPE_CHECKING:
    from fastdpop.hf import attach, detach, is_attached
    from fastdpop.integrations.trl import patch_trl, unpatch_trl
    from fastdpop.prefix.pack import PackedPairs, pack
    from fastdpop.prefix.sampler import PromptSampler

__version__ = VERSION

__all__ = [
    "PackedPairs",
    "PreferenceOutput",
    "PromptSampler",
    "__version__",
    "attach",
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
    "unpatch_trl",
]


def __getattr__(name: str) -> Any:
    """attach, detach and is_attached need transformers, patch_trl and unpatch_trl also trl, pack and
    PromptSampler numpy, the rest only torch: import them when they are used.
    """
    if name in ("attach", "detach", "is_attached"):
        from fastdpop import hf

        return getattr(hf, name)
    if name in ("patch_trl", "unpatch_trl"):
        from fastdpop.integrations import trl

        return getattr(trl, name)
    if name in ("PackedPairs", "pack"):
        from fastdpop.prefix import pack

        return getattr(pack, name)
    if name == "PromptSampler":
        from fastdpop.prefix.sampler import PromptSampler

        return PromptSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
