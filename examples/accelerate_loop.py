"""DPOP with LoRA in a plain accelerate loop.

    python examples/accelerate_loop.py                                    # tiny, seconds on a CPU
    accelerate launch examples/accelerate_loop.py --model PATH --pairs pairs.jsonl

The reference is the model without its adapter: there is no second model.
"""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator
from pairs import arguments, load
from peft import LoraConfig, get_peft_model

import fastdpop
from fastdpop import losses


def main() -> None:
    options = arguments(__doc__)
    accelerator = Accelerator()
    model, batches = load(options)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    )
    fastdpop.attach(model)  # before `prepare`
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    dpop = losses.get("dpop", beta=0.3, lam=50.0)

    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    for step, batch in enumerate(itertools.islice(endless, options.steps)):
        with torch.no_grad(), accelerator.unwrap_model(model).disable_adapter():
            ref_logps = model(**batch, return_logps=True).logps
        out = model(**batch, preference=dpop, ref_logps=fastdpop.exact(ref_logps))
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(
            f"step {step} loss {out.loss.item():.4f} margin {out.margins.mean().item():.3f} "
            f"penalty {out.penalty.mean().item():.3f}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
