"""DPOP as a Lightning module, all weights trained, with a frozen copy as the reference.

python examples/lightning_loop.py                                     # tiny, seconds on a CPU
python examples/lightning_loop.py --model PATH --pairs pairs.jsonl
"""

from __future__ import annotations

import copy
from typing import Any

import lightning
import torch
from pairs import arguments, load
from torch import Tensor

import fastdpop
from fastdpop import losses


class Preference(lightning.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = fastdpop.attach(model)
        self.reference = copy.deepcopy(model).requires_grad_(False)  # attached, too
        self.dpop = losses.get("dpop", beta=0.3, lam=50.0)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        with torch.no_grad():
            ref_logps = self.reference(**batch, return_logps=True).logps
        out = self.model(**batch, preference=self.dpop, ref_logps=fastdpop.exact(ref_logps))
        self.log("margin", out.margins.mean(), batch_size=len(out.margins))
        self.print(
            f"step {self.global_step} loss {out.loss.item():.4f} "
            f"margin {out.margins.mean().item():.3f} penalty {out.penalty.mean().item():.3f}"
        )
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


def main() -> None:
    options = arguments(__doc__)
    model, batches = load(options)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # The modules stay in evaluation mode (no dropout), as `load` gives them: DPOP's penalty would react to the noise.
    trainer.fit(Preference(model), batches)


if __name__ == "__main__":
    main()
