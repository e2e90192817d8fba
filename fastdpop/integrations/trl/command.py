"""TRL's command ``trl dpo`` with the patch: in the process that parses it, and in those that it starts.

TRL parses the options and has ``accelerate launch`` run its training script. Here accelerate runs this module instead,
which patches TRL and runs the same script.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from importlib.resources import files

import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli import accelerate_launcher
from trl.cli import main as run_trl
from trl.cli.commands import training
from trl.scripts.dpo import make_parser

from fastdpop.integrations.trl.options import check_best_metric, check_revision
from fastdpop.integrations.trl.patching import patch_trl, unpatch_trl
from fastdpop.integrations.trl.process import (
    end_process,
    keep_process_groups,
    shard_on_cpus,
    sharding_asked,
)

_MODULE = "fastdpop.integrations.trl.command"
_LAUNCHER = "launch_training_script"


def launch(options: list[str]) -> int:
    """Run ``trl dpo`` with these options; the exit code is that of the process that failed first, or 0.

    Raises:
        ValueError, OSError: the options cannot be used.
    """
    # TRL 0.29 has the function in the module of the command, later versions import it when it runs.
    owners = [owner for owner in (accelerate_launcher, training) if hasattr(owner, _LAUNCHER)]
    own = getattr(accelerate_launcher, _LAUNCHER)
    patch_trl()
    try:
        for owner in owners:
            setattr(owner, _LAUNCHER, _launch_this_module)
        return run_trl(["dpo", *options])
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode)
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except yaml.YAMLError as error:
        raise ValueError(f"the file of --config is no YAML: {error}") from error
    finally:
        for owner in owners:
            setattr(owner, _LAUNCHER, own)
        unpatch_trl()


def _exit_code(code: int) -> int:
    """As a shell has it: 128 and the signal's number, which Python gives below 0."""
    return code if code > 0 else 128 - code


def _launch_this_module(
    script_name: str, launch_args: list[str], training_script_args: list[str]
) -> None:
    """``trl.cli.accelerate_launcher.launch_training_script``, for this module."""
    given = [*launch_args, "--module", _MODULE, *training_script_args]
    args = launch_command_parser().parse_args(given)
    if args.training_script != _MODULE:
        raise ValueError(f"{args.training_script!r} is no option of TRL or of accelerate launch")
    _, config, model, _ = make_parser().parse_args_and_config(
        training_script_args, fail_with_unknown_args=False
    )
    check_best_metric(config)
    check_revision(model.model_name_or_path, model.model_revision)
    launch_command(args)


def _train() -> int:
    """TRL's training script, in a process of its own."""
    patch_trl()
    keep_process_groups()
    if sharding_asked() and not torch.accelerator.is_available():
        shard_on_cpus()
    script = files("trl.scripts").joinpath("dpo.py")
    try:
        runpy.run_path(str(script), run_name="__main__")
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"fastdpop: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = _train()
    end_process(code)
    sys.exit(code)
