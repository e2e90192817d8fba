"""The files for Axolotl: fastdpop's plugin takes them, and they have the recipes' values.

Axolotl's own schema is in tests/axolotl.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl")

from fastdpop.integrations.axolotl_args import FastDpopArgs
from recipes.smaug import stages

RECIPES = Path(stages.__file__).parent
SAME = {
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_steps": "max_steps",
    "optimizer": "optim",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_steps": "warmup_steps",
    "max_grad_norm": "max_grad_norm",
    "save_steps": "save_steps",
    "logging_steps": "logging_steps",
    "seed": "seed",
    "rl_beta": "beta",
    "dpo_loss_type": "loss_type",
    "dpop_lambda": "dpop_lambda",
}
"""Axolotl's names, and TRL's."""


@pytest.mark.parametrize("size", ["7b", "34b", "72b"])
def test_they_have_the_recipes_values(size: str) -> None:
    recipe = stages.read(RECIPES / f"{size}.yaml")
    # Of the 7B there is one file for both losses, as its first lines say.
    of_recipe = [stage for stage in recipe.stages if not stage.name.startswith("dpo-")]
    files = sorted((RECIPES / "axolotl" / size).iterdir())
    assert len(files) == len(of_recipe)
    adapter, former = recipe.stages[0].options, None
    for file, stage in zip(files, of_recipe, strict=True):
        given: dict[str, Any] = yaml.safe_load(file.read_text())
        assert file.stem.partition("-")[2] == stage.name.removeprefix("dpop-")
        expected = {name: stage.options.get(of_trl) for name, of_trl in SAME.items()}
        assert {name: given.get(name) for name in SAME} == expected
        assert (given["lora_r"], given["lora_alpha"]) == (adapter["lora_r"], adapter["lora_alpha"])
        assert given["base_model"] == (f"{former}/merged" if former else recipe.model)
        former = given["output_dir"]
        (data,) = given["datasets"]
        path = stage.options.get("pairs", "data/conversations.jsonl")
        assert (data["path"], data["split"]) == (
            path,
            stage.options.get("dataset_train_split", "train"),
        )
        for command in (recipe.data[name] for name in stage.data if "held-out" not in name):
            words = [
                word.replace(str(RECIPES), "recipes/smaug")
                for word in command
                if word != sys.executable
            ]
            text = file.read_text().replace("\\\n#", "")
            assert all(word in text for word in words if word != "-m")
        assert FastDpopArgs.model_validate(given).fastdpop is (
            True if stage.run == "train" else None
        )
        if "chat_template_path" in stage.options:
            template = RECIPES.parents[1] / given["chat_template_jinja"]
            assert template.samefile(stage.options["chat_template_path"])
