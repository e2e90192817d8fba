"""The recipes of the Smaug models: what they say, and that every stage of them runs, tiny, on a CPU."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("trl")

import trl
from packaging.version import Version
from trl import SFTTrainer
from trl.scripts import sft

from fastdpop.cli import main as fastdpop
from recipes.smaug import conversations, stages

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of TRL and what it imports
RECIPES = Path(stages.__file__).parent
FIVE = ["metamath", "arc", "hellaswag", "orca", "ultrafeedback"]
"""The data sets in the paper's order."""


class InProcess:
    """Runs commands here, which saves their start; remembers them; a stage of the name `dies` fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies: str = "") -> None:
        self.monkeypatch, self.dies = monkeypatch, dies
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], folder: Path) -> int:
        self.commands.append(command)
        assert command[0] == sys.executable
        if f"{self.dies}.yaml" in command:
            return 137
        with self.monkeypatch.context() as patch:
            patch.chdir(folder)
            if command[1:3] == ["-m", "fastdpop"]:
                return fastdpop(command[3:])
            if command[1:3] == ["-m", "trl.scripts.sft"]:
                parser = sft.make_parser()
                sft.main(*parser.parse_args_and_config(command[3:], fail_with_unknown_args=True))
                return 0
            patch.setattr(sys, "argv", command[1:])
            assert Path(command[1]).samefile(conversations.__file__)
            conversations.main()
            return 0

    @property
    def ran(self) -> list[str]:
        """The stages, in order."""
        files = [word for command in self.commands for word in command if word.endswith(".yaml")]
        return [file.removesuffix(".yaml") for file in files]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    return InProcess(monkeypatch)


def dry_run(execute: Any, recipe: Path | str, output: Path, *more: str) -> int:
    file = RECIPES / f"{recipe}.yaml" if isinstance(recipe, str) else recipe
    return stages.main([str(file), "--dry-run", "--output", str(output), *more], execute)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# ----------------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize(
    ("size", "model", "before", "after", "steps"),
    [
        ("7b", "meta-llama/Llama-2-7b-chat-hf", [], [], 2000),
        ("34b", "jondurbin/bagel-34b-v0.2", ["sft"], ["truthy"], 1000),
        ("72b", "moreh/MoMo-72B-lora-1.8.7-DPO", [], [], 1000),
    ],
)
def test_the_recipes_say_what_the_paper_says(
    size: str, model: str, before: list[str], after: list[str], steps: int
) -> None:
    recipe = stages.read(RECIPES / f"{size}.yaml")
    by_name = {stage.name: stage for stage in recipe.stages}
    arms = ["dpop-", "dpo-"] if size == "7b" else [""]
    assert [*by_name] == [*before, *(arm + name for arm in arms for name in FIVE), *after]
    former = model
    for name, stage in by_name.items():
        options = stage.options
        if name == "dpo-metamath":  # both from Llama-2-chat
            former = model
        assert options["model_name_or_path"] == former
        assert options["learning_rate"] == 5e-5
        assert options["optim"].startswith("adamw")
        assert options["max_steps"] == (48 if name == "truthy" else steps)
        former = name
        if stage.run == "sft":
            continue
        plain = name.startswith("dpo-") or name == "truthy"
        assert options["loss_type"] == (["sigmoid"] if plain else ["dpop"])
        assert options["beta"] == 0.3
        assert options.get("dpop_lambda") == (None if plain else 50.0)
    of_hub = {"orca": "Intel/orca_dpo_pairs", "truthy": "jondurbin/truthy-dpo-v0.1"}
    of_hub["ultrafeedback"] = "allenai/ultrafeedback_binarized_cleaned"
    for name, stage in by_name.items():
        name = name.removeprefix("dpop-").removeprefix("dpo-")
        if stage.run == "train":
            assert stage.options["pairs"] == of_hub.get(name, f"data/{name}.jsonl")


@pytest.mark.parametrize("size", ["7b", "34b", "72b"])
def test_accelerate_takes_their_launches(size: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    for stage in stages.read(RECIPES / f"{size}.yaml").stages:
        program, command, *words = stage.launch
        assert (program, command) == ("accelerate", "launch")
        given = launch_command_parser().parse_args([*words, *stages.RUNS[stage.run]])
        if given.config_file is None:
            assert given.num_processes == 8
        else:
            assert yaml.safe_load(Path(given.config_file).read_text())["num_processes"] == 8
        # TRL saves nothing at the end otherwise.
        assert given.fsdp_state_dict_type == ("FULL_STATE_DICT" if stage.run == "sft" else None)


def test_a_recipe_in_a_folder_whose_name_has_a_blank(tmp_path: Path) -> None:
    folder = tmp_path / "my recipes"
    folder.mkdir()
    (folder / "34b.yaml").write_text((RECIPES / "34b.yaml").read_text())
    recipe = stages.read(folder / "34b.yaml")
    assert recipe.data["conversations"][1] == str(folder / "conversations.py")
    assert recipe.stages[0].launch[3] == f"{folder}/../../examples/fsdp2.yaml"
    assert recipe.stages[0].options["chat_template_path"] == str(folder / "llama-2.jinja")


# ------------------------------------------------------------------------------------------- dry runs


@pytest.mark.slow
@pytest.mark.parametrize("size", ["7b", "34b", "72b"])
def test_a_dry_run(size: str, here: InProcess, tmp_path: Path) -> None:
    """All stages, each from the one before; a second run finds everything done."""
    assert dry_run(here, size, tmp_path) == 0
    recipe = stages.read(RECIPES / f"{size}.yaml", dry=True)
    asked = stages.read(RECIPES / f"{size}.yaml")
    assert here.ran == [stage.name for stage in recipe.stages]
    assert {path.stem for path in (tmp_path / "data").glob("*.jsonl")} == {*recipe.data}
    replaced = {*stages.DRY, *stages.DRY_DEVICE["train"], *stages.DRY_DEVICE["sft"]}
    seen: dict[str, torch.Tensor] | None = None
    for stage, full in zip(recipe.stages, asked.stages, strict=True):
        given = yaml.safe_load((tmp_path / f"{stage.name}.yaml").read_text())
        assert {k: v for k, v in full.options.items() if k not in replaced}.items() <= given.items()
        weights = adapter(tmp_path / stage.name)
        if seen is not None:  # the same adapter all the way, but for what a stage has learnt
            assert weights.keys() == seen.keys()
            assert any(not torch.equal(weights[name], seen[name]) for name in weights)
        seen = weights
        config = json.loads((tmp_path / stage.name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.0)
        assert config["base_model_name_or_path"] == recipe.model
        if stage.run == "train":
            lines = (tmp_path / stage.name / "metrics.jsonl").read_text().splitlines()
            first = next(row for row in map(json.loads, lines) if "loss" in row)
            # Of whichever loss, where policy and reference are equal: at the beginning of every stage they are.
            assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
            assert first["logratios/chosen"] == 0
    again = InProcess(here.monkeypatch)
    assert dry_run(again, size, tmp_path) == 0
    assert again.commands == []


SMALL = """
model: meta-llama/Llama-2-7b-chat-hf
launch: accelerate launch --num_processes 8
stages:
  one: {pairs: Intel/orca_dpo_pairs, use_peft: true, learning_rate: 0.01}
  two: {pairs: Intel/orca_dpo_pairs, learning_rate: 0.01}
  three: {pairs: Intel/orca_dpo_pairs, learning_rate: 0.01, start: model, use_peft: true}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.mark.slow
def test_an_interrupted_recipe_goes_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    small.write_text(SMALL[: SMALL.index("  three")])
    assert dry_run(InProcess(monkeypatch), small, whole) == 0
    dying = InProcess(monkeypatch, dies="two")
    assert dry_run(dying, small, cut) == 1
    assert (
        "stage 'two' failed with exit code 137; the same command goes on" in capsys.readouterr().err
    )
    assert dying.ran == ["one", "two"]
    # As if 'one' had been killed in its second step.
    (cut / "one.finished").unlink()
    shutil.rmtree(cut / "one" / "checkpoint-2")
    for file in (cut / "one").glob("adapter_*"):
        file.unlink()
    goes_on = InProcess(monkeypatch)
    assert dry_run(goes_on, small, cut) == 0
    assert goes_on.ran == ["one", "two"]
    assert "No checkpoint in one" not in capsys.readouterr().out
    for stage in ("one", "two"):
        expected, found = adapter(whole / stage), adapter(cut / stage)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_tuning_goes_on_from_its_checkpoint(
    here: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's own script, which has to be told from which; before TRL 1.15 it takes none, and begins again."""
    started: list[Any] = []
    train = SFTTrainer.train

    def spy(self: Any, resume_from_checkpoint: Any = None, **more: Any) -> Any:
        started.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint, **more)

    monkeypatch.setattr(SFTTrainer, "train", spy)
    assert dry_run(here, "34b", tmp_path, "--only", "sft") == 0
    assert here.ran == ["sft"]
    expected = adapter(tmp_path / "sft")
    (tmp_path / "sft.finished").unlink()
    shutil.rmtree(tmp_path / "sft" / "checkpoint-2")
    (tmp_path / "sft" / "adapter_model.safetensors").unlink()
    assert dry_run(here, "34b", tmp_path, "--only", "sft") == 0
    assert here.commands[-1][-2:] == ["--resume_from_checkpoint", "sft/checkpoint-1"]
    takes_one = Version(trl.__version__) >= Version("1.15")
    assert started == [None, "sft/checkpoint-1" if takes_one else None]
    found = adapter(tmp_path / "sft")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_one_stage_or_some(
    small: Path, here: InProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert dry_run(here, small, out, "--only", "two") == 1
    assert "stage 'two' starts from 'one', which is not finished" in capsys.readouterr().err
    assert dry_run(here, small, out, "--from", "three") == 0
    assert here.ran == ["three"]
    assert dry_run(here, small, out, "--print") == 0
    assert here.ran == ["three"]
    said = capsys.readouterr().out
    assert "-m fastdpop train --config two.yaml --resume" in said
    assert "learning_rate: 0.01" in said


def test_what_is_finished_is_not_made_otherwise(
    small: Path, here: InProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert dry_run(here, small, out, "--only", "one") == 0
    small.write_text(SMALL.replace("0.01", "0.02"))
    assert dry_run(here, small, out, "--only", "one") == 1
    assert "one was made with other settings, which" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model:", "modle:", r"has the keys \['launch', 'modle', 'stages'\], expected \['data', "),
        ("launch: accelerate", "launch: [accelerate]\n#", r"launch is \['accelerate'\], expected a str"),
        ("{pairs: Intel/orca_dpo_pairs, learning_rate: 0.01}", "7", "stage 'two' is 7, expected its options"),
        ("learning_rate: 0.01}", "lerning_rate: 0.01}", "stage 'one' cannot be run, see above"),
        ("learning_rate: 0.01}", "learning_rate: -1}", "stage 'one': --learning_rate is -1.0, expected more than"),
        ("learning_rate: 0.01}", "dpop_lambda: 5, loss_type: [sigmoid]}", "stage 'one': --dpop_lambda has no effect"),
        ("learning_rate: 0.01}", "pairs: x}", "the key 'pairs' stands twice"),
        ("learning_rate: 0.01}", "run: sftt}", r"stage 'one': run is 'sftt', expected one of \['train', 'sft'\]"),
        ("learning_rate: 0.01}", "output: x}", "stage 'one': output is not for a stage to say"),
        ("stages:", "1: x\nstages:", r"small.yaml has the keys \[1, 'launch', 'model', 'stages'\], expected"),
        ("learning_rate: 0.01}", "1: x}", "small.yaml: stage 'one': the key 1 is no option"),
        ("learning_rate: 0.01}", "datasets: 7}", "stage 'one': datasets is 7, expected a list of mappings"),
        ("learning_rate: 0.01}", "datasets: [1]}", r"stage 'one': datasets is \[1\], expected a list of mappings"),
        ("launch --num_processes 8", '"x', "small.yaml: launch is 'accelerate \"x', expected a command: no closing"),
        ("learning_rate: 0.01}", "launch: a 'b}", "stage 'one': launch is \"a 'b\", expected a command: no closing"),
        ("stages:", "data: {arc: fastdpop 'b}\nstages:", "small.yaml: data 'arc' is \"fastdpop 'b\", expected a comm"),
        ("stages:", "data: {arc: }\nstages:", "small.yaml: data 'arc' is None, expected a command"),
        ("accelerate launch --num_processes 8", '""', r"small.yaml: launch is '', expected a command"),
        ("start: model", "start: one", "stage 'three': start is 'one', expected 'model'"),
        ("Intel/orca_dpo_pairs, l", "data/arcc.jsonl, l", r"stage 'two' reads data/arcc.jsonl, expected one of"),
        ("stages:", "data: {arc: make arc}\nstages:", r"data 'arc' is made by 'make', expected one of \['fast"),
        ("meta-llama", "meta", "model is 'meta/Llama-2-7b-chat-hf', which has no config.json"),
    ],
)  # fmt: skip
def test_mistakes_end_it_before_anything_starts(
    old: str, new: str, message: str, small: Path, here: InProcess, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert old in SMALL
    small.write_text(SMALL.replace(old, new, 1))
    assert dry_run(here, small, tmp_path / "out") == 1
    found = capsys.readouterr().err
    assert here.commands == []
    assert re.search(message, found), found
    assert "Traceback" not in found
    if "lerning" in new:
        assert "there is no option --lerning_rate; is --learning-rate" in found


@pytest.mark.parametrize("option", ["--only", "--from"])
def test_a_stage_that_is_none(
    option: str, small: Path, here: InProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(here, small, tmp_path, option, "four") == 1
    assert f"{option} is 'four', expected one of ['one', 'two', 'three']" in capsys.readouterr().err
    assert dry_run(here, tmp_path / "none.yaml", tmp_path) == 1
    assert "none.yaml" in capsys.readouterr().err
