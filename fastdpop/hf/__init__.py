"""Preference losses inside a Hugging Face model's own ``forward``.

    out = fastdpop.preference_loss(model, **batch, loss="dpop", ref_logps=ref_logps)

    fastdpop.attach(model)                 the same, for a model that others call
    out = model(input_ids=ids, labels=labels, preference="dpop", ref_logps=ref_logps)
    out.loss.backward()

A loss computed in ``forward`` is seen by everything around the model: DDP, FSDP, accelerate, PEFT. No architecture
is patched by name. The model runs its own code on logits that do not exist (:mod:`fastdpop.hf.lazy_logits`), and the
fused loss takes over from the hidden states, the weight and the transform that they stand for.
"""

from fastdpop.installed import needs

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(needs("fastdpop.attach", "transformers", "hf")) from error

from fastdpop.hf.attachment import attach, detach, is_attached
from fastdpop.hf.on_demand import preference_loss
from fastdpop.hf.output import PreferenceModelOutput

__all__ = ["PreferenceModelOutput", "attach", "detach", "is_attached", "preference_loss"]
