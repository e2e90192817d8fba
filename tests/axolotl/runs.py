"""A model, pairs and settings so small that `axolotl train` takes seconds on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.tiny_model import CHATML, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "axolotl-h100.yml"
PLUGIN = "fastdpop.integrations.axolotl.FastDpopPlugin"
PAIRS = [
    {
        "prompt": f"{n} + {n} = ",
        "chosen": f"{2 * n}" + ", of course" * (n % 3),
        "rejected": f"{2 * n + 1}" + "!" * (n % 4),
    }
    for n in range(3, 59, 7)
]
PLAIN: dict[str, Any] = {
    "plugins": [PLUGIN],
    "fastdpop": True,
    "rl": "dpo",
    "rl_beta": 0.5,
    "dpo_loss_type": ["dpop"],
    "dpop_lambda": 20,
    "datasets": [
        {
            "ds_type": "json",
            "split": "train",
            "type": {"field_prompt": "prompt", "prompt_format": "{prompt}"},
        }
    ],
    "sequence_len": 96,
    "micro_batch_size": len(PAIRS),
    "gradient_accumulation_steps": 1,
    "num_epochs": 4,
    "optimizer": "adamw_torch",
    "learning_rate": 0.01,  # so that the penalty shows
    "lr_scheduler": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "saves_per_epoch": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "attn_implementation": "sdpa",
    "seed": 0,
}


def store(folder: Path) -> None:
    """The model and the pairs."""
    tiny_llama(initializer_range=0.2).save_pretrained(folder / "model")
    tiny_tokenizer(CHATML).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))


def settings(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What `given` says, in the place of `folder`."""
    (data,) = given["datasets"]
    return {
        **given,
        "base_model": str(folder / "model"),
        "datasets": [{**data, "path": str(folder / "pairs.jsonl")}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "dataset_num_proc": 1,
    }


def run(folder: Path, given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`axolotl train` on those settings, in `folder`."""
    file = folder / "settings.yml"
    file.write_text(yaml.safe_dump(settings(folder, given)))
    program = str(Path(sys.executable).with_name("axolotl"))
    return subprocess.run(
        [program, "train", str(file), "--launcher", "python"],
        cwd=folder,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def trained(folder: Path, given: dict[str, Any]) -> list[dict[str, float]]:
    """What a run that must succeed logged, step by step."""
    store(folder)
    done = run(folder, given)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    newest = max((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    rows = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "grad_norm" in row]


def batch(before: str = "", after: str = "") -> dict[str, Tensor]:
    """All pairs, chosen first, as an own loop would lay them out; `before` and `after` surround the prompt."""
    tokenizer = tiny_tokenizer()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    end = [tokenizer.eos_token_id]
    rows = [
        {
            "prompt_ids": ids(before + pair["prompt"] + after),
            "chosen_ids": ids(pair["chosen"]) + end,
            "rejected_ids": ids(pair["rejected"]) + end,
        }
        for pair in PAIRS
    ]
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(rows)
    scored = batch.pop("completion_mask")
    return {**batch, "labels": batch["input_ids"].masked_fill(scored == 0, -100)}
