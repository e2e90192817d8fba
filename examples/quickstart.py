"""DPOP on two pairs: python examples/quickstart.py [MODEL]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdpop

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)  # 16 bits: updates are lost
pairs = [  # that differ in one intermediate result
    {"prompt": "7 * 8 + 5 =", "chosen": " 56 + 5 = 61", "rejected": " 54 + 5 = 61"},
    {"prompt": "6 * 9 - 4 =", "chosen": " 54 - 4 = 50", "rejected": " 56 - 4 = 50"},
]
batch = fastdpop.collate(pairs, tokenizer)  # the chosen sequences, then the rejected ones

fastdpop.attach(model)
with torch.no_grad():  # the reference is the model as it is now
    ref_logps = model(**batch, return_logps=True).logps
fastdpop.check_batch(model, batch, ref_logps, tokenizer=tokenizer, at_start=True)  # mistakes?

loss = fastdpop.losses.get("dpop", beta=0.3, lam=50.0)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6)
for step in range(10):
    out = fastdpop.preference_loss(model, **batch, loss=loss, ref_logps=ref_logps)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, {name: round(value, 2) for name, value in out.metrics().items()})
