"""DPOP in TRL: python examples/trl_dpop.py [MODEL]"""

import sys

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import fastdpop

model = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
pairs = [  # of solutions that differ in one intermediate result
    {
        "prompt": f"What is {a} * {b} + 5?\n",
        "chosen": f"{a} * {b} = {a * b}, and {a * b} + 5 = {a * b + 5}.",
        "rejected": f"{a} * {b} = {a * b + 1}, and {a * b} + 5 = {a * b + 5}.",
    }
    for a in range(3, 9)
    for b in range(3, 9)
]

fastdpop.patch_trl()  # loss_type="dpop", and no logits in DPOTrainer
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        "runs/dpop",
        loss_type="dpop",
        dpop_lambda=50.0,
        beta=0.3,
        learning_rate=5e-6,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(pairs),
)
trainer.train()
trainer.save_model()  # into runs/dpop
