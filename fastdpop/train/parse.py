"""The command line of ``fastdpop train``: TRL's parser, with the short options beside TRL's names."""

from __future__ import annotations

import argparse
import ast
import difflib
import itertools
import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
import yaml
from transformers.trainer_utils import IntervalStrategy
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser
from trl.trainer.model_config import ModelConfig

from fastdpop import losses
from fastdpop.integrations.trl import FastDPOConfig
from fastdpop.integrations.trl.config import shares_prefixes
from fastdpop.integrations.trl.loss import SETTINGS, check_config, default_of, setting
from fastdpop.integrations.trl.process import shard_on_cpus, sharding_asked
from fastdpop.losses import PreferenceLoss
from fastdpop.names import hint
from fastdpop.train.consistency import check, evaluates, missing
from fastdpop.train.options import DEFAULTS, SHORT, PairArguments, under_trl_names
from fastdpop.train.written import as_written, check_twice, flags

_LISTS = ("columns", "loss_option")
"""Options of which each may be given several times."""

_FORMER = {
    "group_by_length": "it is --train_sampling_strategy group_by_length",
    "evaluation_strategy": "it is --eval_strategy",
    "warmup_ratio": "it is --warmup with a number below 1",
    "max_prompt_length": "nothing is cut: --max-length is of prompt and completion together",
    "max_completion_length": "nothing is cut: --max-length is of prompt and completion together",
    "overwrite_output_dir": "nothing is overwritten: --resume goes on, or choose another folder",
    "torch_dtype": "it is --dtype",
    "no_cuda": "it is --device cpu",
    "lr": "it is --learning-rate",
    "batch_size": "it is --batch-pairs",
}
"""Options of earlier transformers and TRL, and of other commands, and what stands for them."""


@dataclass
class Asked:
    """A command line as it was understood.

    Attributes:
        own: fastdpop's options.
        data: TRL's options for data sets; ``data.dataset_name`` stands for ``own.pairs``.
        config: TRL's ``DPOConfig`` with DPOP's lambda.
        model: TRL's ``ModelConfig``.
        mixture: TRL's mixture of data sets.
        given: the names of all options that were given, by TRL's name if it has one.
        loss: what ``--loss`` stands for; None where TRL's ``loss_type`` decides.
    """

    own: PairArguments
    data: ScriptArguments
    config: FastDPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    given: set[str]
    loss: PreferenceLoss | None


def parse(argv: Sequence[str]) -> Asked:
    """Understand a command line, and the YAML file that it may name.

    Raises:
        SystemExit: it is no command line of ``fastdpop train`` (2), or asks for TRL's whole help (0).
        ValueError: a value is out of its range, or two options contradict each other.
        OSError: the YAML file cannot be read.
    """
    names = flags(argv)
    check_twice(names)
    arguments, given = _translated(list(argv))
    in_yaml = _in_yaml(arguments, "device")
    device = _device(_last(arguments, "--device") or in_yaml)
    kinds: Any = (PairArguments, ScriptArguments, FastDPOConfig, ModelConfig, DatasetMixtureConfig)
    parser = _Parser(
        kinds,
        prog="fastdpop train",
        allow_abbrev=False,
    )
    for action in parser._actions:
        if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True  # `--bf16` alone is `--bf16 true`
    on_cpu = device.type == "cpu"
    options = {"fsdp", "deepspeed"}
    shards = sharding_asked() or any(o in given or _in_yaml(arguments, o) for o in options)
    if on_cpu and shards:
        shard_on_cpus()
    parser.set_defaults_with_config(
        **DEFAULTS,
        bf16=not (on_cpu or "fp16" in given or _in_yaml(arguments, "fp16")),
        gradient_checkpointing=not on_cpu,
        use_cpu=on_cpu and not shards,
    )
    parser.given = given
    parser.written = {text.partition("=")[0][2:].replace("-", "_") for text in argv}
    try:
        *parsed, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except IndexError:
        parser.error("argument --config: expected one argument")
    except (TypeError, ValueError) as error:  # of a dataclass, about a value, by its own names
        raise ValueError(as_written(str(error), names, given)) from error
    if unknown:
        parser.error(_unknown(unknown, parser))
    own, data, config, model, mixture = parsed
    asked = Asked(own, data, config, model, mixture, given, None)
    for name in missing(asked):
        parser.error(f"{name} is missing")
    try:
        check(asked)
        asked.loss = _loss(asked)
        check_config(config, asked.loss)
    except ValueError as error:
        raise ValueError(as_written(str(error), names)) from error
    _settle(asked)
    return asked


class _Parser(TrlParser):
    """TRL's parser, to which YAML may give short names, and whose errors fit on a screen."""

    given: set[str]
    written: Collection[str] = ()

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        if not hasattr(self, "given"):
            return super().set_defaults_with_config(**values)  # the defaults themselves
        named: dict[str, Any] = {}
        for name, value in values.items():
            named |= under_trl_names(str(name).replace("-", "_"), value)
        self.given |= set(named)
        for action in self._actions:
            if action.dest in named:
                named[action.dest] = _as_given(action, named[action.dest])
        return super().set_defaults_with_config(**named)

    def error(self, message: str) -> NoReturn:
        for short, (name, *_) in SHORT.items():  # as it was written
            for flag in (f"--{name}/--{name.replace('_', '-')}", f"--{name}"):
                if message.startswith(f"argument {flag}:") and short in self.written:
                    message = message.replace(flag, f"--{short.replace('_', '-')}", 1)
        choice = re.match(r"argument .*: invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if choice:
            message += hint(choice[1], [word.strip("' ") for word in choice[2].split(",")])
        print(
            "usage: fastdpop train --model PATH_OR_ID --pairs FILE --output DIR [options]\n"
            f"fastdpop train: error: {message}",
            file=sys.stderr,
        )
        sys.exit(2)


def _as_given(action: argparse.Action, value: Any) -> Any:
    """A value of YAML such that it is read and checked as one of the command line.

    Raises:
        ValueError: it is none of this option.
    """
    name, kind = action.dest, action.type
    wrong = ValueError(f"{name} is {value!r}, expected " + (
        f"one of {tuple(action.choices)}" if action.choices else "one value"
    ))  # fmt: skip
    if name in _LISTS and isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    if action.nargs == "+" and value is not None:
        items = value if isinstance(value, list) else [value]
        try:
            return [kind(str(i)) if kind in (int, float, str) else i for i in items]
        except ValueError as error:
            raise ValueError(f"{name} is {value!r}: {error}") from None
    if value is False and name.endswith("_strategy"):
        return "no"  # which YAML takes for a boolean
    if value is None and kind not in (int, float):
        return None
    if action.choices and value not in action.choices:
        raise wrong
    if kind is str or isinstance(value, dict):
        return value
    if value is None or isinstance(value, list):
        raise wrong
    return str(value)  # argparse reads it, and says what it is not


def _translated(argv: list[str]) -> tuple[list[str], set[str]]:
    """The arguments under TRL's names, repeated lists joined, and the names that were given."""
    options: list[tuple[str, list[str]]] = []
    lists: dict[str, list[str]] = {}
    loose: list[str] = []
    values = loose  # what stands before the first option belongs to none
    for text in argv:
        if not text.startswith("--"):
            values.append(text)
            continue
        flag, sign, value = text.partition("=")
        name = flag[2:].replace("-", "_")
        name = "help" if name == "help_all" else name
        values = [value] if sign else []
        if name in _LISTS:
            known = lists.setdefault(name, [])
            known += values
            values = known
        else:
            options.append((name, values))
    arguments, given = loose, set()
    for name, values in [*options, *lists.items()]:
        trl = {name: values}
        if name in SHORT and len(values) == 1:
            trl = {k: _texts(v) for k, v in under_trl_names(name, values[0]).items()}
        elif name in SHORT:
            trl = {SHORT[name][0]: values}
        for trl_name, texts in trl.items():
            given.add(trl_name.removeprefix("no_"))
            arguments += ["--" + trl_name, *texts]
    return arguments, given


def _texts(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _last(arguments: list[str], flag: str) -> str | None:
    """The value of an option that must be known before the others are read."""
    found = None
    for text, following in itertools.pairwise(arguments):
        if text == flag:
            found = following
    return found


class _UniqueLoader(yaml.SafeLoader):
    """YAML of which no key stands twice in one mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _in_yaml(arguments: list[str], name: str) -> Any:
    """What the file of ``--config`` says of an option that must be known before the others are read.

    Raises:
        ValueError: the file is no YAML, or has an option under both of its names.
        OSError: it cannot be read.
    """
    path = _last(arguments, "--config")
    if path is None:
        return None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--config is {path!r}: there is no such file")
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.load(file, _UniqueLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        return None  # TRL says so
    for key in content:
        if not isinstance(key, str):
            raise ValueError(f"{path}: the key {key!r} is no option")
    try:
        check_twice([f"--{key}" for key in content])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return content.get(name)


def _unknown(arguments: list[str], parser: _Parser) -> str:
    name = next((a for a in arguments if a.startswith("--")), None)
    if name is None:
        return f"{arguments[0]!r} belongs to no option"
    now = _FORMER.get(name.removeprefix("--").replace("-", "_"))
    if now is not None:
        return f"there is no option {name}; {now}"
    known = {o for action in parser._actions for o in action.option_strings}
    known |= {"--" + short for short in SHORT}
    known = {o.replace("_", "-") for o in known}
    near = difflib.get_close_matches(name.replace("_", "-"), sorted(known), n=3)
    meant = f"; is {' or '.join(near)} meant?" if near else ""
    return f"there is no option {name}{meant}"


def _device(name: str | None) -> torch.device:
    """The device to train on, once it has computed something.

    Raises:
        ValueError: torch cannot use it here.
    """
    if name is None:
        if not torch.accelerator.is_available():
            return torch.device("cpu")
        name = str(torch.accelerator.current_accelerator())
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return torch.device("cpu")
        torch.ones(1, device=device).item()
    # What a build without CUDA raises, and one without a device's module.
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise ValueError(
            f"--device is {name!r}, expected a device that torch can use here, "
            f"such as cpu or cuda:0: {str(error).splitlines()[0]}"
        ) from error
    if device.index is not None and "LOCAL_RANK" not in os.environ:
        torch.accelerator.set_device_index(device.index)
    return device


def _loss(asked: Asked) -> PreferenceLoss | None:
    own = asked.own
    if own.loss is None:
        if own.loss_option:
            raise ValueError("--loss_option has no effect without --loss")
        return None
    try:
        options = dict(_option(text) for text in own.loss_option or ())
        for name, option in SETTINGS.items():
            if name not in asked.given:
                continue
            if option not in losses.options_of(own.loss):
                raise ValueError(f"--{name} has no effect: --loss {own.loss} does not read it")
            if option in options:
                raise ValueError(
                    f"--{name} and --loss-option {option}={options[option]} are one: give one of them"
                )
            options[option] = setting(asked.config, name)
        loss = losses.get(own.loss, **options)
    except TypeError as error:
        raise ValueError(str(error)) from None
    # The config's own are TRL's defaults again: the loss has them now. Rewards are logged with its beta.
    for field in fields(asked.config):
        if field.name in ("loss_type", *SETTINGS):
            setattr(asked.config, field.name, default_of(field))
    return loss


def _option(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, the value as Python writes it, or else as a word."""
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise ValueError(f"--loss_option is {text!r}, expected NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word, such as form=outside


def _settle(asked: Asked) -> None:
    """Defaults that follow from other options."""
    own, config, given = asked.own, asked.config, asked.given
    if not evaluates(asked):
        config.eval_strategy, config.do_eval = IntervalStrategy.NO, False
    if config.sync_ref_model and "precompute_ref_log_probs" not in given:
        config.precompute_ref_log_probs = False  # the reference moves
    if str(config.resume_from_checkpoint).lower() in ("true", "false"):  # TRL's way to say --resume
        own.resume = own.resume or str(config.resume_from_checkpoint).lower() == "true"
        config.resume_from_checkpoint = None
    config.share_prefixes, config.padding_free = shares_prefixes(config), False  # under one name
    if "per_device_eval_batch_size" not in given:
        config.per_device_eval_batch_size = config.per_device_train_batch_size
