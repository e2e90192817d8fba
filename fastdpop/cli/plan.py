"""``fastdpop plan``: memory and time of preference training on many GPUs, estimated."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpop.cli.pairs import add_reading, reading_options
from fastdpop.cli.values import above_zero, positive, share
from fastdpop.installed import needs

if TYPE_CHECKING:
    from fastdpop.plan import Job

NAME = "plan"
ABOUT = "estimate memory and time of training on many GPUs, from a model's configuration"
_GB, _GIB, _TERA = 1e9, 2**30, 1e12


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What is trained, on what, and how."""
    add = command.add_argument
    add(
        "--model",
        required=True,
        metavar="PATH_OR_ID",
        help="a config.json, a folder with one, or a model of the Hub; weights are not needed",
    )
    add("--gpus", default="8xH100", metavar="NxKIND", help="(default: %(default)s)")
    _add_batch(command.add_argument_group("a rank's batch"))
    _add_training(command.add_argument_group("training"))
    _add_assumptions(command.add_argument_group("in place of what is known or assumed"))
    add("--json", action="store_true", help="print JSON instead of a table")
    add_reading(command)


def _add_batch(group: Any) -> None:
    group.add_argument(
        "--pairs-per-gpu",
        type=positive,
        default=4,
        metavar="N",
        help="pairs in one forward pass of a rank; tensor-parallel ranks share them (default: %(default)s)",
    )
    group.add_argument(
        "--accumulate",
        type=positive,
        default=1,
        metavar="N",
        help="forward passes in one step (default: %(default)s)",
    )
    for side in ("prompt", "completion"):
        group.add_argument(
            f"--{side}-tokens",
            type=positive,
            metavar="N",
            help=f"of each {side} (default: 512)",
        )
    group.add_argument(
        "--tree-share",
        type=share,
        metavar="X",
        help="share prefixes, too: tokens in the trees over padded tokens, from 0 to 1",
    )
    group.add_argument(
        "--pairs",
        metavar="FILE",
        help="measure tokens and tree share of these pairs instead, as fastdpop pairs stats does",
    )


def _add_training(group: Any) -> None:
    group.add_argument("--lora", type=positive, metavar="RANK", help="train an adapter only")
    group.add_argument(
        "--lora-targets",
        metavar="NAMES",
        help="its modules, separated by commas (default: all-linear)",
    )
    group.add_argument(
        "--reference",
        choices=("precomputed", "live", "adapter"),
        default="precomputed",
        help="scored beforehand, by a second model in every step, or by the model without its adapter "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--precision",
        choices=("mixed", "bf16"),
        default="mixed",
        help="mixed keeps trained weights, gradients and AdamW's states in float32 (default: %(default)s)",
    )
    group.add_argument(
        "--checkpointing",
        choices=("auto", "on", "off"),
        default="auto",
        help="of activations; auto takes what is better in each setting (default: %(default)s)",
    )
    group.add_argument(
        "--steps", type=positive, metavar="N", help="say how long so many steps take"
    )


def _add_assumptions(group: Any) -> None:
    group.add_argument("--gpu-memory", type=above_zero, metavar="GIB", help="of a GPU")
    group.add_argument(
        "--peak", type=above_zero, metavar="TFLOPS", help="dense bfloat16 rate of a GPU"
    )
    group.add_argument(
        "--nvlink", type=above_zero, metavar="GB/S", help="of a GPU within a node, one way"
    )
    group.add_argument(
        "--network",
        type=above_zero,
        default=50.0,
        metavar="GB/S",
        help="of a GPU between nodes of 8, one way (default: %(default)s)",
    )
    group.add_argument(
        "--reserve",
        type=above_zero,
        default=4.0,
        metavar="GIB",
        help="of a GPU's memory, for all but tensors: CUDA, NCCL, fragments (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Estimate and print; 1 if nothing fits.

    Raises:
        ValueError, OSError, ImportError: with a message for the user.
    """
    _check(args)
    job = _job(args)
    from fastdpop.plan import report
    from fastdpop.plan.settings import beside, compare

    checkpointing = {"auto": None, "on": True, "off": False}[args.checkpointing]
    found, left_out = compare(job, checkpointing)
    best = found[0] if found[0].fits else None
    heads = beside(job, found[0].setting, checkpointing)
    if args.json:
        print(json.dumps(report.numbers(job, found, left_out, heads), indent=1))
    else:
        print(report.table(job, found, left_out))
        print("\n" + report.heads_table(heads))
        print("\n" + report.advice(job, best, args.steps))
    return 0 if best else 1


def _check(args: argparse.Namespace) -> None:
    """Options that contradict each other."""
    if args.reference == "adapter" and args.lora is None:
        raise ValueError("--reference is 'adapter', which needs --lora: there is no adapter")
    if args.lora_targets is not None and args.lora is None:
        raise ValueError(f"--lora-targets is {args.lora_targets!r}, which needs --lora")
    for name in ("prompt_tokens", "completion_tokens", "tree_share"):
        value = getattr(args, name)
        if args.pairs is not None and value is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {value}, but --pairs measures it: leave out one of them")
    if args.pairs is None and (given := reading_options(args)):
        raise ValueError(
            f"{given[0].replace('_', '-')} says how pairs are read, but there are no --pairs"
        )


def _job(args: argparse.Namespace) -> Job:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(needs("fastdpop plan", "transformers", "hf")) from error
    from fastdpop.plan import Job, Lora, Model, hardware, read_config

    cluster = hardware.parse(
        args.gpus,
        memory=args.gpu_memory and args.gpu_memory * _GIB,
        peak=args.peak and args.peak * _TERA,
        link=args.nvlink and args.nvlink * _GB,
        network=args.network * _GB,
    )
    config = read_config(args.model)
    targets = tuple((args.lora_targets or "all-linear").split(","))
    prompt, completion = args.prompt_tokens or 512, args.completion_tokens or 512
    batch: dict[str, Any] = {
        "length": prompt + completion,
        "completion": completion,
        "tree": args.tree_share,
    }
    if args.pairs is not None:
        batch = _measured(args)
    model = Model(config, None if args.lora is None else Lora(args.lora, targets))
    return Job(
        model,
        cluster,
        args.pairs_per_gpu,
        reference=args.reference,
        precision=args.precision,
        accumulate=args.accumulate,
        reserve=args.reserve * _GIB,
        **batch,
    )


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """A batch as the pairs of a file have it on average."""
    from fastdpop.pair_stats import read_pairs
    from fastdpop.prefix.stats import pair_statistics

    folder = str(Path(args.model).parent) if Path(args.model).is_file() else args.model
    options = ["--pairs", args.pairs, "--model", folder, *reading_options(args)]
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        _, _, (prompts, chosen, rejected) = read_pairs(options)
    found = pair_statistics(prompts, chosen, rejected, args.pairs_per_gpu)
    padded, sequences = found.total("padded"), 2 * len(prompts)
    return {
        "length": max(1, round(padded / sequences)),
        "completion": max(1, round(sum(map(len, [*chosen, *rejected])) / sequences)),
        "real": found.total("real") / padded,
        "tree": found.total("tree") / padded,
    }
