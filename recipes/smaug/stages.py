"""Run a recipe: make its data, then one stage of training after the other, each from the result of the one before.

    python recipes/smaug/stages.py recipes/smaug/34b.yaml --output runs/smaug-34b

A stage that is finished is skipped, and one that was interrupted goes on from its newest checkpoint: after any
interruption the same command goes on. All runs in the folder of --output, where the settings of a stage are STAGE.yaml,
its result is STAGE/, and data are in data/; paths in a recipe are relative to it. `--print` says what would run.

A recipe is a YAML file of

    model    where the first stage starts: a model of the Hub, or a folder
    launch   the command that starts one of the training processes on every GPU
    data     commands that make files, by name; each writes data/NAME.jsonl
    shared   settings that stages have in common, for YAML's own references (`<<: *name`)
    stages   by name, in order: options of `fastdpop train` under TRL's names, or of TRL's SFT script with `run: sft`;
             `start: model` is the recipe's model instead of the former stage's result, `launch` another way to start

in which {here} stands for its own folder.

With `--dry-run` every stage takes 2 steps on a CPU, from a random model with the architecture of the one named, on a
few rows in the form of each data set. Of its options only sizes, steps and the device are others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "recipes" / "fixtures"
KEYS = {"model", "launch", "data", "shared", "stages"}
RUNS = {"train": ["-m", "fastdpop", "train"], "sft": ["-m", "trl.scripts.sft"]}
DRY = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_steps": 1,
    "logging_steps": 1,
}
DRY_DEVICE = {"train": {"device": "cpu"}, "sft": {"use_cpu": True, "bf16": False}}
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

Execute = Callable[[list[str], Path], int]
"""Runs a command in a folder, and returns its exit code."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        name: also of its folder.
        run: one of :data:`RUNS`.
        launch: the words before what is run.
        options: all of its settings, the model and the folder among them.
    """

    name: str
    run: str
    launch: tuple[str, ...]
    options: dict[str, Any]

    @property
    def settings(self) -> str:
        """As its file has them."""
        return str(yaml.safe_dump(self.options, sort_keys=False))

    @property
    def data(self) -> set[str]:
        """The names of the files in data/ that it needs."""
        files = [self.options.get("pairs"), self.options.get("eval_pairs")]
        files += [each.get("data_files") for each in self.options.get("datasets", ())]
        return {Path(file).stem for file in files if str(file).startswith("data/")}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a file says.

    Attributes:
        model: where it starts.
        data: commands by name.
        stages: in order.
    """

    model: str
    data: dict[str, list[str]]
    stages: list[Stage]


class _Loader(yaml.SafeLoader):
    """YAML of which no key stands twice in one mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


# ---------------------------------------------------------------------------------------------- reading


def read(path: Path, dry: bool = False) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError, OSError: it is none; the message names the key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict) or not {"model", "launch", "stages"} <= content.keys() <= KEYS:
        found = sorted(content, key=str) if isinstance(content, dict) else content
        raise ValueError(f"{path} has the keys {found}, expected {sorted(KEYS)}")
    for key, kind in (("model", str), ("launch", str), ("data", dict), ("stages", dict)):
        if not isinstance(content.setdefault(key, kind()), kind):
            raise ValueError(f"{path}: {key} is {content[key]!r:.80}, expected a {kind.__name__}")
    data = {str(name): _made(path, name, command) for name, command in content["data"].items()}
    stages: list[Stage] = []
    for name, given in content["stages"].items():
        if not isinstance(given, dict):
            raise ValueError(f"{path}: stage '{name}' is {given!r}, expected its options")
        for key in given:
            if not isinstance(key, str):
                raise ValueError(f"{path}: stage '{name}': the key {key!r} is no option")
        sets = given.get("datasets", [])
        if not isinstance(sets, list) or not all(isinstance(each, dict) for each in sets):
            raise ValueError(
                f"{path}: stage '{name}': datasets is {sets!r}, expected a list of mappings"
            )
        own = {k: _placed(v, path) if isinstance(v, str) else v for k, v in given.items()}
        run, start = own.pop("run", "train"), own.pop("start", None)
        own.pop("launch", None)
        if "launch" in given:
            launch = _words(given["launch"], path, f"stage '{name}': launch")
        else:
            launch = _words(content["launch"], path, "launch")
        if run not in RUNS:
            raise ValueError(f"{path}: stage '{name}': run is {run!r}, expected one of {[*RUNS]}")
        if start not in (None, "model"):
            raise ValueError(f"{path}: stage '{name}': start is {start!r}, expected 'model'")
        for key in ("model", "model_name_or_path", "output", "output_dir", "resume"):
            if key in own:
                raise ValueError(f"{path}: stage '{name}': {key} is not for a stage to say")
        former = stages[-1].name if stages and start is None else content["model"]
        options = {"model_name_or_path": former, "output_dir": str(name), **own}
        if dry:
            options |= DRY | DRY_DEVICE[run]
            launch = [sys.executable]
        stages.append(Stage(str(name), run, tuple(launch), options))
        if missing := sorted(stages[-1].data - data.keys()):
            raise ValueError(
                f"{path}: stage '{name}' reads data/{missing[0]}.jsonl, expected one of data {[*data]}"
            )
    return Recipe(content["model"], data, stages)


def _placed(text: str, path: Path) -> str:
    return text.replace("{here}", str(path.resolve().parent))


def _words(command: Any, path: Path, key: str) -> list[str]:
    """Of a command line, each placed by itself: a path may hold blanks."""
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError as error:
        raise ValueError(
            f"{path}: {key} is {command!r}, expected a command: {str(error).lower()}"
        ) from None
    if not words:
        raise ValueError(f"{path}: {key} is {command!r}, expected a command")
    return [_placed(word, path) for word in words]


def _made(path: Path, name: str, command: Any) -> list[str]:
    word, *others = _words(command, path, f"data '{name}'")
    programs = {"fastdpop": [sys.executable, "-m", "fastdpop"], "python": [sys.executable]}
    if word not in programs:
        raise ValueError(
            f"{path}: data '{name}' is made by {word!r}, expected one of {[*programs]}"
        )
    return [*programs[word], *others]


def check(recipe: Recipe) -> None:
    """Have every stage's settings read by what will run it, so that the last one's mistakes do not cost days.

    Raises:
        ValueError: of a stage; the message names it.
        SystemExit: the same, once the parser has said what is wrong.
    """
    from trl.scripts import sft

    from fastdpop.train.parse import parse

    with tempfile.TemporaryDirectory() as folder:
        for stage in recipe.stages:
            file = Path(folder) / f"{stage.name}.yaml"
            file.write_text(stage.settings, encoding="utf-8")
            try:
                if stage.run == "train":
                    parse(["--config", str(file), "--device", "cpu"])
                else:
                    cpu = ["--use_cpu", "true", "--bf16", "false"]
                    sft.make_parser().parse_args_and_config(
                        ["--config", str(file), *cpu], fail_with_unknown_args=True
                    )
            except (ValueError, OSError) as error:
                raise ValueError(f"stage '{stage.name}': {error}") from None
            except SystemExit:
                raise ValueError(f"stage '{stage.name}' cannot be run, see above") from None


def chosen(recipe: Recipe, only: str | None, first: str | None) -> list[Stage]:
    """The stages that were asked for.

    Raises:
        ValueError: there is none of that name.
    """
    names = [stage.name for stage in recipe.stages]
    for option, name in (("--only", only), ("--from", first)):
        if name is not None and name not in names:
            raise ValueError(f"{option} is {name!r}, expected one of {names}")
    if only is not None:
        return [stage for stage in recipe.stages if stage.name == only]
    return recipe.stages[names.index(first) if first is not None else 0 :]


# ---------------------------------------------------------------------------------------------- running


def run(recipe: Recipe, stages: Sequence[Stage], output: Path, execute: Execute) -> None:
    """Make the data that the stages need, and run those that are not finished.

    Raises:
        ValueError: something is finished otherwise than it is asked for, cannot start, or failed.
    """
    needed = set().union(*(stage.data for stage in stages))
    for name, command in recipe.data.items():
        if name in needed and not _finished(output / "data" / f"{name}.made", shlex.join(command)):
            part = Path("data") / f"part-{name}.jsonl"
            (output / part).unlink(missing_ok=True)
            _do(f"data '{name}'", [*command, "--out", str(part)], output, execute)
            os.replace(output / part, output / "data" / f"{name}.jsonl")
            (output / "data" / f"{name}.made").write_text(shlex.join(command), encoding="utf-8")
    for stage in stages:
        mark = output / f"{stage.name}.finished"
        if _finished(mark, stage.settings):
            continue
        start = stage.options["model_name_or_path"]
        if start != recipe.model and not (output / f"{start}.finished").exists():
            raise ValueError(f"stage '{stage.name}' starts from '{start}', which is not finished")
        (output / f"{stage.name}.yaml").write_text(stage.settings, encoding="utf-8")
        _do(f"stage '{stage.name}'", command_of(stage, output), output, execute)
        folder = output / stage.name
        if not any((folder / f"{kind}.json").exists() for kind in ("adapter_config", "config")):
            raise ValueError(f"stage '{stage.name}' ended and left no model in {folder}")
        mark.write_text(stage.settings, encoding="utf-8")


def command_of(stage: Stage, output: Path) -> list[str]:
    """What runs a stage in the folder `output`."""
    command = [*stage.launch, *RUNS[stage.run], "--config", f"{stage.name}.yaml"]
    if stage.run == "train":
        return [*command, "--resume"]
    saved = (output / stage.name).glob("checkpoint-*")
    newest = max(saved, key=lambda folder: int(folder.name.partition("-")[2]), default=None)
    if newest is None:
        return command
    return [*command, "--resume_from_checkpoint", str(newest.relative_to(output))]


def _finished(mark: Path, asked: str) -> bool:
    if not mark.exists():
        return False
    if mark.read_text(encoding="utf-8") != asked:
        raise ValueError(
            f"{mark.with_suffix('')} was made with other settings, which {mark} has: remove that file to make "
            "it again, or name another --output"
        )
    print(f"{mark.with_suffix('')}: finished before")
    return True


def _do(what: str, command: list[str], folder: Path, execute: Execute) -> None:
    print(f"\n{what}, in {folder}:\n{shlex.join(command)}", flush=True)
    code = execute(command, folder)
    if code:
        raise ValueError(
            f"{what} failed with exit code {code}; the same command goes on from there"
        )


def plan(recipe: Recipe, stages: Sequence[Stage], output: Path) -> None:
    """Print what would run."""
    needed = set().union(*(stage.data for stage in stages))
    for name, command in recipe.data.items():
        if name in needed:
            print(shlex.join([*command, "--out", f"data/{name}.jsonl"]))
    for stage in stages:
        print(f"\n# {stage.name}.yaml\n{stage.settings}{shlex.join(command_of(stage, output))}")


def tiny(name: str, output: Path) -> None:
    """Put the rows of the data sets into a folder, and a random model of the architecture of `name`.

    Raises:
        ValueError: there is no configuration of it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (FIXTURES / name / "config.json").exists():
        raise ValueError(f"model is {name!r}, which has no config.json in {FIXTURES} for a dry run")
    shutil.copytree(FIXTURES, output, dirs_exist_ok=True)
    fields = json.loads((FIXTURES / name / "config.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / name)
    grouped = fields["num_key_value_heads"] < fields["num_attention_heads"]
    fields |= TINY | {
        "num_key_value_heads": 1 if grouped else 2,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    model.save_pretrained(output / name)


def _subprocess(environment: dict[str, str]) -> Execute:
    return lambda command, folder: (
        subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    )


def main(argv: Sequence[str] | None = None, execute: Execute | None = None) -> int:
    """Read the command line, and run; the exit code is 1 for an error, 130 for an interruption."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    add("--output", type=Path, metavar="DIR", help="where all is kept (default: runs/RECIPE)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", metavar="STAGE", help="run this stage alone")
    which.add_argument(
        "--from", dest="first", metavar="STAGE", help="run this stage and those after"
    )
    add("--dry-run", action="store_true", help="2 steps a stage, tiny, on a CPU")
    add("--print", action="store_true", help="say what would run, and run nothing")
    args = parser.parse_args(argv)
    execute = execute or _subprocess(dict(os.environ))  # before libraries write into it
    warnings.simplefilter("ignore", FutureWarning)  # between libraries, not for their users
    try:
        recipe = read(args.recipe, args.dry_run)
        stages = chosen(recipe, args.only, args.first)
        with _folder(args) as output:
            check(recipe)
            if args.print:
                plan(recipe, stages, output)
                return 0
            (output / "data").mkdir(parents=True, exist_ok=True)
            if args.dry_run:
                tiny(recipe.model, output)
            run(recipe, stages, output, execute)
    except (ValueError, OSError) as error:
        print(f"stages.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstages.py: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    if args.output is None and args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        yield (args.output or Path("runs") / args.recipe.stem).resolve()


if __name__ == "__main__":
    sys.exit(main())
